"""Where a checkpoint comes from: a folder, S3, the Hugging Face hub or the MLflow registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.checkpoint.hub import fetch_hf, identify_hf
from featherweight.checkpoint.local_folder import fetch_local, identify_local
from featherweight.checkpoint.registered_model import fetch_registered, identify_registered
from featherweight.checkpoint.s3_prefix import fetch_s3, identify_s3
from featherweight.checkpoint.spec import LoadSpec
from featherweight.progress import Progress
from featherweight.store.artifact import content_digest

WORK = ".fetch"


@dataclass(frozen=True)
class Source:
    """One kind of source. `fetch(spec, work, progress)` brings it to a local folder or GGUF file, at most into `work`."""

    fetch: Callable[[LoadSpec, Path, Progress], Path]
    identity: Callable[[LoadSpec], Any]


def source_fingerprint(spec: LoadSpec) -> str:
    """Identity of what `load` would take from the source, without taking it: content, ETags, or a resolved version."""
    kind, source = source_of(spec)
    return content_digest([kind, source.identity(spec)])


def source_of(spec: LoadSpec) -> tuple[str, Source]:
    kind = next(kind for kind in SOURCES if spec.source.startswith(kind))
    return kind, SOURCES[kind]


SOURCES = {
    "s3://": Source(fetch_s3, identify_s3),
    "hf:": Source(fetch_hf, identify_hf),
    "models:": Source(fetch_registered, identify_registered),
    "": Source(fetch_local, identify_local),
}
"""By how the source begins; what begins with none of them is a path."""
