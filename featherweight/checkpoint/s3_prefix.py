"""Checkpoints below a prefix of S3: s3://bucket/prefix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from featherweight.checkpoint import s3
from featherweight.checkpoint.arrivals import DEPTH, Arrival, is_done
from featherweight.checkpoint.files import ADAPTER, CONFIG, Listing, files_of, has_weights, is_companion, missing_part
from featherweight.checkpoint.gguf_parts import only_model
from featherweight.checkpoint.identity import may_be_read
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import CheckpointError, ServiceError
from featherweight.progress import Progress
from featherweight.store.artifact import content_digest


def fetch_s3(spec: LoadSpec, work: Path, progress: Progress) -> Path:
    """Download what is needed, after a look from afar at whether it is whole."""
    names = _wanted(s3.listing(str(spec.source)), spec)
    s3.download(str(spec.source), work / "s3", progress, names)
    gguf = only_model(names)
    return work / "s3" / gguf[0] if gguf else work / "s3"


def look_s3(spec: LoadSpec) -> Listing:
    """The objects, of which so many bytes are read as are asked for."""
    listing = s3.listing(spec.source)
    _wanted(listing, spec)
    return listing


def _wanted(listing: Listing, spec: LoadSpec) -> list[str]:
    """Names to download: one GGUF model, or a complete checkpoint's needed files."""
    if not listing.sizes:
        raise ServiceError(f"{listing.where} holds no objects; check the prefix (it is case-sensitive)")
    gguf = only_model(listing.sizes)
    if gguf and CONFIG not in listing.sizes:
        return list(gguf)
    names = files_of(listing, allow_pickle=spec.allow_pickle, trust_remote_code=spec.trust_remote_code)
    problem = missing_part(listing) if has_weights(listing) else None
    if problem:
        raise CheckpointError(problem)
    return names


def identify_s3(spec: LoadSpec) -> list[list[Any]]:
    """Name, size and ETag of every object that is taken."""
    names = _wanted(s3.listing(str(spec.source)), spec)
    return sorted([item.name, item.size, item.etag] for item in s3.list_objects(str(spec.source)) if item.name in names)


def prefixes_below(source: str) -> Iterator[Arrival]:
    """The prefixes at or below a watched one, DEPTH deep, that hold a configuration; one listing tells all."""
    bucket, prefix = s3.bucket_of(source), s3.split_uri(source)[1]
    places: dict[str, list[s3.S3Object]] = {}
    for item in bucket.objects(source):
        parts = PurePosixPath(item.key).parts
        if ".." not in parts:
            places.setdefault(item.key.rpartition("/")[0], []).append(item)
    for place in places:
        below = place.removeprefix(prefix).strip("/")
        if _is_place(place, places[place]) and len(PurePosixPath(below).parts) < DEPTH:
            inside = [item for other in places if other == place or other.rpartition("/")[0] == place for item in places[other]]
            yield _arrival(bucket, place, inside)


def _is_place(place: str, items: list[s3.S3Object]) -> bool:
    """Whether a configuration lies there that is of a checkpoint, not of a part of one."""
    names = {item.key.rpartition("/")[2] for item in items}
    return bool(names & {CONFIG, ADAPTER}) and not is_companion(f"{place.rpartition('/')[2]}/{CONFIG}")


def _arrival(bucket: s3.Bucket, place: str, items: list[s3.S3Object]) -> Arrival:
    uri = f"s3://{bucket.name}/{place}"
    named = {item.key.removeprefix(place).strip("/"): item for item in items}
    named = {name: item for name, item in named.items() if "/" not in name or is_companion(name)}
    marks = sorted((name, item.size, item.etag) for name, item in named.items() if may_be_read(name))
    listing = s3.listing_of(uri, named, bucket)
    return Arrival(uri, content_digest([uri, marks]), listing, fixed=is_done(tuple(named)))
