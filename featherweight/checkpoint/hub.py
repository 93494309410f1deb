"""Checkpoints of the Hugging Face hub: hf:org/name@revision."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from featherweight.checkpoint.arrival import Arrival
from featherweight.checkpoint.files import (
    COMPANIONS,
    CONFIG,
    INDEX,
    WEIGHTS,
    Listing,
    adapter_files,
    files_of,
    has_weights,
    is_companion,
)
from featherweight.checkpoint.gguf_parts import models_among
from featherweight.checkpoint.identity import content_identity, may_be_read, read_by_the_product
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import CheckpointError, ServiceError, one_line
from featherweight.model.sparsity import FILE as SPARSITY
from featherweight.progress import Progress
from featherweight.store.artifact import content_digest


def fetch_hf(spec: LoadSpec, work: Path, progress: Progress) -> Path:
    """Download the needed files of a repository into huggingface_hub's own cache, which resumes and deduplicates."""
    progress.note(f"downloading {spec.source}")
    with _hub_explained(spec):
        return _snapshot(spec, _hub_names(spec))


def _snapshot(spec: LoadSpec, names: list[str] | None) -> Path:
    """The folder of a repository in huggingface_hub's cache; with no names, out of reach of the hub, what lies there already."""
    from huggingface_hub import snapshot_download

    repo, revision = _repository(spec)
    patterns = names or [CONFIG, WEIGHTS, INDEX, "model-*-of-*.safetensors", SPARSITY, *COMPANIONS]
    folder = Path(
        snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=names is None, **_hub_places())
    )
    _gguf(spec, Listing.of(folder))
    return folder


def _gguf(spec: LoadSpec, listing: Listing) -> list[str]:
    """The parts of the one GGUF model that a repository holds in the place of other weights; CheckpointError for several."""
    models = set() if has_weights(listing) or adapter_files(listing) else models_among(listing.sizes)
    if len(models) > 1:
        get = f"hf download {_repository(spec)[0]} {min(models)[0]}"
        raise CheckpointError(f"{spec.source} holds {len(models)} GGUF models; fetch one ({get}), and give its path")
    return [name for parts in models for name in parts]


def _repository(spec: LoadSpec) -> tuple[str, str]:
    repo, _, revision = str(spec.source).removeprefix("hf:").partition("@")
    return repo, revision or "main"


def _hub_places() -> dict[str, Any]:
    """Read now: huggingface_hub itself reads the environment only when it is first imported."""
    return {"endpoint": os.environ.get("HF_ENDPOINT") or None, "cache_dir": os.environ.get("HF_HUB_CACHE") or None}


def _hub_info(spec: LoadSpec) -> Any:
    """What the hub says about the repository at the revision; None where the hub is out of reach."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    repo, revision = _repository(spec)
    try:
        return HfApi(_hub_places()["endpoint"]).model_info(repo, revision=revision, files_metadata=True, timeout=20)
    except (httpx.TransportError, OfflineModeIsEnabled):
        return None


def look_hf(spec: LoadSpec) -> Listing | Path:
    """The files on the hub, read as far as is asked for; the cached folder where it is out of reach. Raises ServiceError."""
    with _hub_explained(spec):
        info = _hub_info(spec)
        if info is None:
            return _snapshot(spec, None)
    listing = _hub_listing(spec, info, _read_hub)
    _gguf(spec, listing)
    return listing


def _read_hub(spec: LoadSpec, revision: str, name: str, length: int) -> bytes:
    """The first bytes of a file of the repository, by a ranged request. Raises ServiceError where the hub is out of reach."""
    import httpx
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(_repository(spec)[0], name, revision=revision, endpoint=_hub_places()["endpoint"])
    wanted = {**build_hf_headers(), "range": f"bytes=0-{max(0, length - 1)}"}
    try:
        with _hub_explained(spec):
            answer = get_session().get(url, headers=wanted, follow_redirects=True, timeout=20)
            hf_raise_for_status(answer)
    except httpx.TransportError as error:
        raise ServiceError(f"{spec.source}: the Hugging Face hub is out of reach: {one_line(error)}") from error
    return bytes(answer.content[:length])


def _download_hub(spec: LoadSpec, revision: str, name: str, length: int) -> bytes:
    """The same of a whole file, which is kept in huggingface_hub's cache."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(_repository(spec)[0], name, revision=revision, **_hub_places())).read_bytes()


def _hub_listing(spec: LoadSpec, info: Any, read: Callable[[LoadSpec, str, str, int], bytes]) -> Listing:
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    sizes = {name: size for name, size in sizes.items() if "/" not in name or is_companion(name)}
    return Listing(spec.source, sizes, lambda name, length: read(spec, info.sha, name, length))


def _hub_names(spec: LoadSpec) -> list[str] | None:
    """Names to download; None where the hub is out of reach. Refuses a pickle before anything is downloaded."""
    info = _hub_info(spec)
    if info is None:
        return None
    listing = _hub_listing(spec, info, _download_hub)
    if gguf := _gguf(spec, listing):
        return gguf
    return files_of(listing, allow_pickle=spec.allow_pickle, trust_remote_code=spec.trust_remote_code)


@contextmanager
def _hub_explained(spec: LoadSpec) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line."""
    from huggingface_hub import errors

    repo, revision = _repository(spec)
    try:
        yield
    except errors.HFValidationError as error:
        raise CheckpointError(f"'{spec.source}' names no repository; expected hf:org/name or hf:org/name@revision") from error
    except errors.GatedRepoError as error:
        raise ServiceError(f"{spec.source}: access is gated; accept its terms on the hub and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{spec.source}: '{repo}' has no revision '{revision}'; check the branch, tag or commit") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{spec.source}: there is no repository '{repo}', or it is private: then set HF_TOKEN") from error
    except errors.LocalEntryNotFoundError as error:
        raise ServiceError(
            f"{spec.source}: the Hugging Face hub is out of reach and nothing is cached; check the network, or give a folder"
        ) from error
    except errors.HfHubHTTPError as error:
        raise ServiceError(f"{spec.source}: the Hugging Face hub answered: {one_line(error)}") from error


def identify_hf(spec: LoadSpec) -> list[str]:
    """The commit that the revision stands for, asked of the hub, else of the local cache."""
    with _hub_explained(spec):
        info = _hub_info(spec)
        if info is not None:
            return [_repository(spec)[0], info.sha]
    return [_repository(spec)[0], fetch_hf(spec, Path(), Progress()).name]


def revisions(source: str) -> Iterator[Arrival]:
    """The commits that a repository's branches and tags stand for, or the one of `hf:org/name@revision`.

    A commit is whole and never changes. Those whose files are the same by the hub's word (sha256 of the large ones, git's own
    digest of the others) are read once; a new one is downloaded, into the cache from which it is loaded, and known by its content
    as one from anywhere else. Raises ServiceError where the hub does not answer.
    """
    from huggingface_hub import HfApi

    spec = LoadSpec(source=source)
    repo, _ = _repository(spec)
    with _hub_explained(spec), _answering(spec):
        names = [source.partition("@")[2]]
        if not names[0]:
            refs = HfApi(_hub_places()["endpoint"]).list_repo_refs(repo)
            names = [ref.name for ref in (*refs.branches, *refs.tags)]
        commits = {info.sha: info for name in names if (info := _hub_info(LoadSpec(source=f"hf:{repo}@{name}"))) is not None}
    for commit, info in commits.items():
        at = LoadSpec(source=f"hf:{repo}@{commit}")
        told = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings}
        stamp = content_digest({name: digest for name, digest in told.items() if may_be_read(name)})
        yield Arrival(at.source, stamp, fixed=True, identify=partial(_content, at, info))


@contextmanager
def _answering(spec: LoadSpec) -> Iterator[None]:
    """A hub that is out of reach, in one line."""
    import httpx
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except (httpx.TransportError, OfflineModeIsEnabled) as error:
        raise ServiceError(f"{spec.source}: the Hugging Face hub is out of reach ({one_line(error)}); check the network") from error


def _content(spec: LoadSpec, info: Any) -> str:
    """Digest of the files that are read; raises CheckpointError where they make no checkpoint."""
    with _hub_explained(spec):
        folder = _snapshot(spec, read_by_the_product(_hub_listing(spec, info, _download_hub)))
    return content_identity(Listing.of(folder))
