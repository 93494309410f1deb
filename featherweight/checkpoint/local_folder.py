"""Checkpoints in a local folder, or a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from featherweight.checkpoint.arrival import DEPTH, Arrival, is_done
from featherweight.checkpoint.files import ADAPTER, CONFIG, Listing, base_named, files_of, has_weights, is_companion
from featherweight.checkpoint.gguf import gguf_file
from featherweight.checkpoint.gguf_parts import gguf_identity, lacking_of, models_among, parts_of
from featherweight.checkpoint.identity import content_identity, may_be_read
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import CheckpointError, DataError, told
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
    """The folders at or below a watched one, DEPTH deep, that hold a configuration, and the GGUF models that lie by themselves.

    Hidden folders are passed by. Links to folders are not followed, and a file that lies elsewhere is not taken. Raises DataError
    where the folder is missing.
    """
    root = Path(source).expanduser().absolute()
    if not root.is_dir():
        raise DataError(f"watched folder {root} does not exist; create it, or check the path")
    closed: list[OSError] = []
    for place, inside, names in os.walk(root, onerror=closed.append):
        folder = Path(place)
        inside[:] = sorted(name for name in inside if not name.startswith(".") and not is_companion(f"{name}/{CONFIG}"))
        if len(folder.relative_to(root).parts) >= DEPTH - 1:
            inside.clear()
        try:
            yield from list(_arrivals_in(folder, root, names))
        except Exception as error:  # whatever its files hold, or who replaces it meanwhile, costs this folder alone
            yield _left_out(folder, told(error))
    yield from (_left_out(Path(one.filename), f"cannot be read: {one.strerror}") for one in closed if Path(one.filename).exists())


def _arrivals_in(folder: Path, root: Path, names: Sequence[str]) -> Iterator[Arrival]:
    """The checkpoint right inside a folder, or its GGUF models."""
    models = set() if ADAPTER in names else models_among(names)
    if (CONFIG in names or ADAPTER in names) and (not models or has_weights(Listing.of(folder))):
        yield _arrival(folder, root)
    else:
        yield from (_gguf_arrival(folder, root, parts) for parts in models)


def _left_out(folder: Path, problem: str) -> Arrival:
    return Arrival(str(folder), content_digest([str(folder), problem]), problem=problem)


def _arrival(folder: Path, root: Path) -> Arrival:
    listing = Listing.of(folder)
    read = [name for name in listing.sizes if may_be_read(name)]
    stamp, facts = _stamp(folder, read), (listing, _problem(folder, root, read), is_done(tuple(listing.sizes)))
    base = _base(folder) if ADAPTER in listing.sizes else None
    if base is None:
        return Arrival(str(folder), stamp, *facts)
    under = Listing.of(base)
    stamp = content_digest([stamp, _stamp(base, [name for name in under.sizes if may_be_read(name)])])
    return Arrival(str(folder), stamp, *facts, identify=partial(_adapted_identity, listing, under))


def _base(adapter: Path) -> Path | None:
    """The local folder of the model that an adapter belongs to: another one under the same name makes it another arrival."""
    try:
        named = Path(base_named(adapter) or "").expanduser()
    except CheckpointError:  # it is not readable, or not yet
        return None
    return named if named != Path() and (named / CONFIG).is_file() else None


def _adapted_identity(adapter: Listing, base: Listing) -> str:
    return content_digest([content_identity(adapter), content_identity(base)])


def _gguf_arrival(folder: Path, root: Path, parts: Sequence[str]) -> Arrival:
    """One model, known by its first part's name; a folder without weights of another kind may hold several."""
    listing = Listing.of(folder)
    read = [name for name in parts if name in listing.sizes]
    source, stamp = str(folder / parts[0]), _stamp(folder / parts[0], read)
    problem, done = _problem(folder, root, read), is_done(tuple(listing.sizes))
    return Arrival(source, stamp, listing, problem, done, partial(lacking_of, parts), partial(gguf_identity, parts, listing))


def _problem(folder: Path, root: Path, read: Sequence[str]) -> str | None:
    elsewhere = [name for name in read if not (folder / name).resolve().is_relative_to(root.resolve())]
    return f"{elsewhere[0]} is a link that leads out of {root}; copy the file" if elsewhere else None


def _stamp(source: Path, read: Sequence[str]) -> str:
    folder = source if source.is_dir() else source.parent
    return content_digest([str(source), [(name, *_marks(folder / name)) for name in read]])


def _marks(path: Path) -> tuple[int, ...]:
    """What changes when a file is written, whatever its times were set to."""
    now = path.stat()
    return now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino
