"""Where a checkpoint comes from: a folder, S3, the Hugging Face hub or the MLflow registry."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.checkpoint import s3
from featherweight.checkpoint.conversion import take
from featherweight.checkpoint.files import CONFIG, TOKENIZERS, Listing, find_weights, missing_part, needed_files
from featherweight.checkpoint.gguf import gguf_file
from featherweight.checkpoint.hub import fetch_hf, identify_hf
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import CheckpointError, ServiceError
from featherweight.progress import Progress
from featherweight.store.artifact import content_digest, file_sha256
from featherweight.store.mlflow_errors import mlflow_explained
from featherweight.store.served_folder import FILE as SERVING
from featherweight.store.served_folder import Serving
from featherweight.store.workspace import local_path

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
    kind = next((kind for kind in SOURCES if spec.source.startswith(kind)), "")
    return kind, SOURCES.get(kind, LOCAL)


def _fetch_local(spec: LoadSpec, work: Path, progress: Progress) -> Path:
    return Path(str(spec.source)).expanduser()


def _identify_local(spec: LoadSpec) -> dict[str, str]:
    """sha256 of every file that is taken, by name."""
    path = _fetch_local(spec, Path(), Progress())
    gguf = gguf_file(path)
    if gguf is not None:
        return {gguf.name: file_sha256(gguf)}
    listing = Listing.of(path)
    weights = find_weights(listing, allow_pickle=spec.allow_pickle)
    names = needed_files(listing, weights, trust_remote_code=spec.trust_remote_code)
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: file_sha256(path / name), names), strict=True))


def _fetch_s3(spec: LoadSpec, work: Path, progress: Progress) -> Path:
    """Download what is needed, after a look from afar at whether it is whole."""
    names = _wanted(s3.listing(str(spec.source)), spec)
    s3.download(str(spec.source), work / "s3", progress, names)
    only = next(iter(names), "")
    return work / "s3" / only if only.endswith(".gguf") else work / "s3"


def _wanted(listing: Listing, spec: LoadSpec) -> list[str]:
    """Names to download: one GGUF file, or a complete checkpoint's needed files."""
    if not listing.sizes:
        raise ServiceError(f"{listing.where} holds no objects; check the prefix (it is case-sensitive)")
    gguf = [name for name in listing.sizes if name.endswith(".gguf")]
    if len(gguf) == 1 and CONFIG not in listing.sizes:
        return gguf
    weights = find_weights(listing, allow_pickle=spec.allow_pickle)
    problem = missing_part(listing)
    if problem:
        raise CheckpointError(problem)
    return needed_files(listing, weights, trust_remote_code=spec.trust_remote_code)


def _identify_s3(spec: LoadSpec) -> list[list[Any]]:
    """Name, size and ETag of every object that is taken."""
    names = _wanted(s3.listing(str(spec.source)), spec)
    return sorted([item.name, item.size, item.etag] for item in s3.list_objects(str(spec.source)) if item.name in names)


def _fetch_registered(spec: LoadSpec, work: Path, progress: Progress) -> Path:
    """The Hugging Face folder inside a registered model; where its store is a local folder, that very folder."""
    from mlflow.artifacts import download_artifacts

    uri = _model_location(spec)
    root = local_path(uri)
    if root is None:
        progress.note(f"downloading {spec.source}")
        with _registry_explained(spec):
            root = Path(download_artifacts(artifact_uri=uri, dst_path=str(work)))
    return _with_tokenizer(_model_folder(root, spec), root, work)


def _model_location(spec: LoadSpec) -> str:
    """Where the artifacts of a registered version lie.

    Not through `download_artifacts("models:/...")`: that writes a file of its own into a local store.
    """
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository

    uri = str(spec.source)
    with _registry_explained(spec):
        while uri.startswith("models:"):
            uri = ModelsArtifactRepository.get_underlying_uri(uri)
    return uri


def _registry_explained(spec: LoadSpec) -> AbstractContextManager[None]:
    from mlflow import get_tracking_uri

    missing = CheckpointError(f"{spec.source}: the registry has no such model; `featherweight ui` lists what it has")
    return mlflow_explained(get_tracking_uri(), missing, files=True)


def _model_folder(root: Path, spec: LoadSpec) -> Path:
    """The folder nearest to `root` that holds a configuration beside safetensors."""
    configs = sorted(root.rglob(CONFIG), key=lambda path: (len(path.parts), path))
    for config in configs:
        if any(config.parent.glob("*.safetensors")):
            return config.parent
    served = next(iter(sorted(root.rglob(SERVING))), None)
    if served is not None:
        raise CheckpointError(
            f"{spec.source} is packed for {Serving.read(served.parent).engine} and holds no safetensors; "
            "start from the checkpoint that it was made of (featherweight lineage names it)"
        )
    raise CheckpointError(f"{spec.source} holds no Hugging Face checkpoint (no {CONFIG} beside safetensors)")


def _with_tokenizer(folder: Path, root: Path, work: Path) -> Path:
    """The folder itself where it has a tokenizer, else links to its files and to the tokenizer's that lie elsewhere below `root`.

    MLflow's transformers flavour keeps the two apart.
    """
    if any((folder / name).exists() for name in TOKENIZERS):
        return folder
    elsewhere = sorted({path.parent for name in TOKENIZERS for path in root.rglob(name)})
    if not elsewhere:
        return folder
    joined = work / "joined"
    joined.mkdir()
    for path in (*elsewhere[0].iterdir(), *folder.iterdir()):
        if path.is_file() and not (joined / path.name).exists():
            take(path, joined / path.name)
    return joined


def _identify_registered(spec: LoadSpec) -> list[str]:
    """The location that an alias stands for now: every version has its own."""
    return [_model_location(spec)]


LOCAL = Source(_fetch_local, _identify_local)


SOURCES = {
    "s3://": Source(_fetch_s3, _identify_s3),
    "hf:": Source(fetch_hf, identify_hf),
    "models:": Source(_fetch_registered, _identify_registered),
}
