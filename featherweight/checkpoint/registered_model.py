"""Checkpoints inside registered models of MLflow: models:/name@alias, models:/name/version."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from featherweight.checkpoint.arrival import Arrival
from featherweight.checkpoint.files import CONFIG, Listing, has_tokenizer
from featherweight.checkpoint.identity import content_identity
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import CheckpointError
from featherweight.progress import Progress
from featherweight.store.artifact import content_digest
from featherweight.store.mlflow_errors import mlflow_explained
from featherweight.store.served_folder import FILE as SERVING
from featherweight.store.served_folder import Serving
from featherweight.store.workspace import local_path


def fetch_registered(spec: LoadSpec, work: Path, progress: Progress) -> Path:
    """The Hugging Face folder inside a registered model; where its store is a local folder, that very folder."""
    from mlflow.artifacts import download_artifacts

    uri = _model_location(spec)
    root = local_path(uri)
    if root is None:
        progress.note(f"downloading {spec.source}")
        with _registry_explained(spec):
            root = Path(download_artifacts(artifact_uri=uri, dst_path=str(work)))
    return _with_tokenizer(_model_folder(root, spec), root, work)


def look_registered(spec: LoadSpec) -> Path | None:
    """The Hugging Face folder inside the model where its store is a local folder and it has all; None elsewhere."""
    root = local_path(_model_location(spec))
    folder = root and _model_folder(root, spec)
    return folder if folder and has_tokenizer(Listing.of(folder)) else None


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
    if has_tokenizer(Listing.of(folder)):
        return folder
    elsewhere = [path for path in sorted(root.rglob("*")) if path.is_dir() and has_tokenizer(Listing.of(path))]
    if not elsewhere:
        return folder
    joined = work / "joined"
    for place in (elsewhere[0], folder):
        for name in Listing.of(place).sizes:
            (joined / name).parent.mkdir(parents=True, exist_ok=True)
            (joined / name).unlink(missing_ok=True)
            (joined / name).symlink_to((place / name).resolve())
    return joined


def identify_registered(spec: LoadSpec) -> list[str]:
    """The location that an alias stands for now: every version has its own."""
    return [_model_location(spec)]


def versions(source: str) -> Iterator[Arrival]:
    """The versions of `models:/name` that lie ready in the registry MLflow points to; none that Featherweight made itself."""
    from mlflow import MlflowClient

    spec, name = LoadSpec(source=source), source.removeprefix("models:").strip("/")
    if not name or set("/@'") & set(name):
        raise CheckpointError(f"{source}: watch a whole registered model, models:/NAME")
    with _registry_explained(spec):
        found = MlflowClient().search_model_versions(f"name='{name}'")
    for one in found:
        if one.status == "READY" and not any(tag.startswith("featherweight.") for tag in one.tags):
            at = LoadSpec(source=f"models:/{name}/{one.version}")
            stamp = content_digest([at.source, one.source, one.creation_timestamp])
            yield Arrival(at.source, stamp, fixed=True, identify=partial(_content, at))


def _content(spec: LoadSpec) -> str:
    """Digest of the checkpoint inside a version, which is downloaded for it where its store is no local folder."""
    with tempfile.TemporaryDirectory() as work:
        return content_identity(Listing.of(fetch_registered(spec, Path(work), Progress())))
