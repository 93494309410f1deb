"""Checkpoints below a prefix of S3, s3://bucket/prefix, or a GGUF file there, s3://bucket/prefix/model.gguf."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from featherweight.checkpoint import s3
from featherweight.checkpoint.arrival import DEPTH, Arrival, is_done
from featherweight.checkpoint.files import ADAPTER, CONFIG, Listing, files_of, has_weights, is_companion, missing_part
from featherweight.checkpoint.gguf_parts import gguf_identity, lacking_of, models_among, names_of_parts, only_model
from featherweight.checkpoint.identity import may_be_read
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import CheckpointError, ServiceError
from featherweight.progress import Progress
from featherweight.store.artifact import content_digest


def fetch_s3(spec: LoadSpec, work: Path, progress: Progress) -> Path:
    """Download what is needed, after a look from afar at whether it is whole."""
    names = _wanted(_listing(spec), spec)
    s3.download(_prefix(spec), work / "s3", progress, names)
    gguf = only_model(names)
    return work / "s3" / gguf[0] if gguf else work / "s3"


def look_s3(spec: LoadSpec) -> Listing:
    """The objects, of which so many bytes are read as are asked for."""
    listing = _listing(spec)
    _wanted(listing, spec)
    return listing


def _prefix(spec: LoadSpec) -> str:
    """Below which the objects lie: of a GGUF file it is where its further parts lie too."""
    return spec.source.rpartition("/")[0] if spec.source.endswith(".gguf") else spec.source


def _listing(spec: LoadSpec) -> Listing:
    """What lies below the prefix; of a GGUF file it and its parts alone."""
    found = s3.listing(_prefix(spec))
    if not spec.source.endswith(".gguf"):
        return found
    parts = names_of_parts(spec.source.rpartition("/")[2])
    return replace(found, where=spec.source, sizes={name: size for name, size in found.sizes.items() if name in parts})


def _wanted(listing: Listing, spec: LoadSpec) -> list[str]:
    """Names to download: one GGUF model, or a complete checkpoint's needed files."""
    if not listing.sizes:
        raise ServiceError(f"{listing.where} holds no objects; check the prefix (it is case-sensitive)")
    gguf = only_model(listing.sizes)
    if gguf and (CONFIG not in listing.sizes or not (has_weights(listing) or ADAPTER in listing.sizes)):
        return list(gguf)
    names = files_of(listing, allow_pickle=spec.allow_pickle, trust_remote_code=spec.trust_remote_code)
    problem = missing_part(listing) if has_weights(listing) else None
    if problem:
        raise CheckpointError(problem)
    return names


def identify_s3(spec: LoadSpec) -> list[list[Any]]:
    """Name, size and ETag of every object that is taken."""
    names = _wanted(_listing(spec), spec)
    return sorted([item.name, item.size, item.etag] for item in s3.list_objects(_prefix(spec)) if item.name in names)


def prefixes_below(source: str) -> Iterator[Arrival]:
    """The prefixes at or below a watched one, DEPTH deep, that hold a configuration, and the GGUF models that lie by themselves.

    One listing tells all.
    """
    bucket, prefix = s3.bucket_of(source), s3.split_uri(source)[1]
    places: dict[str, list[s3.S3Object]] = {}
    for item in bucket.objects(source):
        parts = PurePosixPath(item.key).parts
        if ".." not in parts:
            places.setdefault(item.key.rpartition("/")[0], []).append(item)
    for place in places:
        below = place.removeprefix(prefix).strip("/")
        if len(PurePosixPath(below).parts) < DEPTH and not is_companion(f"{place.rpartition('/')[2]}/{CONFIG}"):
            inside = [item for other in places if other == place or other.rpartition("/")[0] == place for item in places[other]]
            yield from _arrivals(bucket, place, inside)


def _arrivals(bucket: s3.Bucket, place: str, items: list[s3.S3Object]) -> Iterator[Arrival]:
    """The checkpoint that lies there, or the GGUF models, of which a place without weights of another kind may hold several."""
    uri = f"s3://{bucket.name}/{place}".rstrip("/")
    named = {item.key.removeprefix(place).strip("/"): item for item in items}
    named = {name: item for name, item in named.items() if "/" not in name or is_companion(name)}
    listing = s3.listing_of(uri, named, bucket)
    done, models = is_done(tuple(named)), set() if ADAPTER in named else models_among(named)
    if (CONFIG in named or ADAPTER in named) and (not models or has_weights(listing)):
        read = {name: item for name, item in named.items() if may_be_read(name)}
        yield Arrival(uri, _stamp(uri, read), listing, fixed=done)
        return
    for parts in models:
        source, read = f"{uri}/{parts[0]}", {name: named[name] for name in parts if name in named}
        stamp, identify = _stamp(source, read), partial(gguf_identity, parts, listing)
        yield Arrival(source, stamp, listing, fixed=done, lacking=partial(lacking_of, parts), identify=identify)


def _stamp(source: str, read: Mapping[str, s3.S3Object]) -> str:
    return content_digest([source, sorted((name, item.size, item.etag) for name, item in read.items())])
