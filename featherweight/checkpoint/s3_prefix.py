"""Checkpoints below a prefix of S3: s3://bucket/prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featherweight.checkpoint import s3
from featherweight.checkpoint.files import CONFIG, Listing, files_of, has_weights, missing_part
from featherweight.checkpoint.gguf_parts import only_model
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import CheckpointError, ServiceError
from featherweight.progress import Progress


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
