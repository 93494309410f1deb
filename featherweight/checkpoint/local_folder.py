"""Checkpoints in a local folder, or a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from featherweight.checkpoint.arrivals import DEPTH, Arrival, is_done
from featherweight.checkpoint.files import ADAPTER, CONFIG, Listing, files_of, is_companion
from featherweight.checkpoint.gguf import gguf_file
from featherweight.checkpoint.gguf_parts import parts_of
from featherweight.checkpoint.identity import may_be_read
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import DataError
from featherweight.progress import Progress
from featherweight.store.artifact import content_digest, file_sha256


def fetch_local(spec: LoadSpec, work: Path, progress: Progress) -> Path:
    return local_path(spec)


def local_path(spec: LoadSpec) -> Path:
    """The folder, or the GGUF file."""
    return Path(spec.source).expanduser()


def identify_local(spec: LoadSpec) -> dict[str, str]:
    """sha256 of every file that is taken, by name."""
    path = local_path(spec)
    gguf = gguf_file(path)
    if gguf is not None:
        return {part.name: file_sha256(part) for part in parts_of(gguf)}
    listing = Listing.of(path)
    names = files_of(listing, allow_pickle=spec.allow_pickle, trust_remote_code=spec.trust_remote_code)
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: file_sha256(path / name), names), strict=True))


def folders_below(source: str) -> Iterator[Arrival]:
    """The folders at or below a watched one, DEPTH deep, that hold a configuration. Hidden folders are passed by.

    Links to folders are not followed, and a file that lies elsewhere is not taken. Raises DataError where the folder is missing.
    """
    root = Path(source).expanduser().absolute()
    if not root.is_dir():
        raise DataError(f"watched folder {root} does not exist; create it, or check the path")
    for place, inside, names in os.walk(root):
        folder = Path(place)
        inside[:] = sorted(name for name in inside if not name.startswith(".") and not is_companion(f"{name}/{CONFIG}"))
        if len(folder.relative_to(root).parts) >= DEPTH - 1:
            inside.clear()
        if CONFIG in names or ADAPTER in names:
            yield _arrival(folder, root)


def _arrival(folder: Path, root: Path) -> Arrival:
    listing = Listing.of(folder)
    read = [name for name in listing.sizes if may_be_read(name)]
    elsewhere = [name for name in read if not (folder / name).resolve().is_relative_to(root.resolve())]
    problem = f"{elsewhere[0]} is a link that leads out of {root}; copy the file" if elsewhere else None
    marks = [(name, *_marks(folder / name)) for name in read]
    stamp = content_digest([str(folder), marks])
    return Arrival(str(folder), stamp, listing, problem, is_done(tuple(listing.sizes)))


def _marks(path: Path) -> tuple[int, ...]:
    """What changes when a file is written, whatever its times were set to."""
    told = path.stat()
    return told.st_size, told.st_mtime_ns, told.st_ctime_ns, told.st_ino
