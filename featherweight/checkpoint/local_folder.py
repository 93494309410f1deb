"""Checkpoints in a local folder, or a GGUF file."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from featherweight.checkpoint.files import Listing, files_of
from featherweight.checkpoint.gguf import gguf_file
from featherweight.checkpoint.gguf_parts import parts_of
from featherweight.checkpoint.spec import LoadSpec
from featherweight.progress import Progress
from featherweight.store.artifact import file_sha256


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
