"""Where a checkpoint comes from: a folder, S3, the Hugging Face hub or the MLflow registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.checkpoint.files import Listing, base_named
from featherweight.checkpoint.hub import fetch_hf, identify_hf, look_hf
from featherweight.checkpoint.local_folder import fetch_local, identify_local, local_path
from featherweight.checkpoint.registered_model import fetch_registered, identify_registered, look_registered
from featherweight.checkpoint.s3_prefix import fetch_s3, identify_s3, look_s3
from featherweight.checkpoint.spec import LoadSpec
from featherweight.progress import Progress
from featherweight.store.artifact import content_digest

WORK = ".fetch"
HUB = "hf:"


@dataclass(frozen=True)
class Source:
    """One kind of source. `fetch(spec, work, progress)` brings it to a local folder or GGUF file, at most into `work`.

    look: the files where they are, without fetching weights; None where they have to be fetched to be seen.
    """

    fetch: Callable[[LoadSpec, Path, Progress], Path]
    identity: Callable[[LoadSpec], Any]
    look: Callable[[LoadSpec], Listing | Path | None]


def source_fingerprint(spec: LoadSpec) -> str:
    """Identity of what `load` would take from the source, without taking it: content, ETags, or a resolved version.

    With that of an adapter's base, where the recipe or the adapter names it, and of adapters that are kept beside it.
    """
    kind, source = source_of(spec)
    identity, base = source.identity(spec), spec.base or _base_named_at(spec)
    under = [source_fingerprint(spec.model_copy(update={"source": base, "base": None, "adapters": {}}))] if base else []
    kept = [[name, _alone(LoadSpec(source=adapter))] for name, adapter in sorted(spec.adapters.items())]
    return content_digest([kind, identity, *under, *kept])


def _alone(spec: LoadSpec) -> list[Any]:
    """Identity of an adapter without its base."""
    kind, source = source_of(spec)
    return [kind, source.identity(spec)]


def _base_named_at(spec: LoadSpec) -> str | None:
    """The source of the base model that an adapter names where it lies; None for what is no adapter, or cannot be looked into."""
    seen = look_at(spec)
    return None if seen is None else base_named(seen)


def source_of(spec: LoadSpec) -> tuple[str, Source]:
    kind = next(kind for kind in SOURCES if spec.source.startswith(kind))
    return kind, SOURCES[kind]


def look_at(spec: LoadSpec) -> Listing | Path | None:
    """The files of the source where they are: a folder or GGUF file here, or a listing; None where they must be fetched first."""
    return source_of(spec)[1].look(spec)


SOURCES = {
    "s3://": Source(fetch_s3, identify_s3, look_s3),
    HUB: Source(fetch_hf, identify_hf, look_hf),
    "models:": Source(fetch_registered, identify_registered, look_registered),
    "": Source(fetch_local, identify_local, local_path),
}
"""By how the source begins; what begins with none of them is a path."""
