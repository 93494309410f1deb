"""Arrivals: the complete checkpoints below a folder or an S3 prefix, and how each is recognised again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from featherweight.checkpoint.files import CONFIG, Listing, is_complete
from featherweight.errors import DataError
from featherweight.store.artifact import content_digest

DEPTH = 4


@dataclass(frozen=True)
class Arrival:
    """A complete checkpoint: what a recipe's `checkpoint.source` takes, and a fingerprint that changes with its files."""

    source: str
    fingerprint: str


def arrivals(source: str) -> list[Arrival]:
    """Complete checkpoints at or below `source`, sorted by name; one still being uploaded is left for the next look.

    Only listings and headers are read, so that looking is cheap. Raises DataError where a folder is missing, ServiceError where
    S3 refuses.
    """
    found = _in_s3(source) if source.startswith("s3://") else _in_folder(Path(source))
    return sorted(found, key=lambda arrival: arrival.source)


def _in_folder(root: Path) -> Iterator[Arrival]:
    if not root.is_dir():
        raise DataError(f"watched folder {root} does not exist; create it, or check the path")
    pattern = [CONFIG, *("/".join(["*"] * depth) + f"/{CONFIG}" for depth in range(1, DEPTH))]
    for config in (path for one in pattern for path in root.glob(one)):
        folder = config.parent
        if is_complete(Listing.of(folder)):
            files = sorted(path for path in folder.iterdir() if path.is_file())
            marks = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
            yield Arrival(str(folder.absolute()), content_digest([str(folder.absolute()), marks]))


def _in_s3(source: str) -> Iterator[Arrival]:
    from featherweight.checkpoint.s3 import list_objects, listing, split_uri

    bucket, _ = split_uri(source)
    objects = list_objects(source)
    for config in (one for one in objects if one.key.rpartition("/")[2] == CONFIG):
        folder = config.key.rpartition("/")[0]
        address = f"s3://{bucket}/{folder}"
        if is_complete(listing(address)):
            files = [one for one in objects if one.key.rpartition("/")[0] == folder]
            yield Arrival(address, content_digest([bucket, sorted((one.key, one.size, one.etag) for one in files)]))
