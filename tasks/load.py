"""load: a checkpoint from wherever it lies, as a checked folder of safetensors."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight import s3
from featherweight.artifact import content_digest, file_sha256
from featherweight.checkpoint import (
    COMPANIONS,
    CONFIG,
    INDEX,
    PICKLE,
    PICKLE_INDEX,
    SPARSITY,
    TOKENIZERS,
    WEIGHTS,
    CheckpointInfo,
    Listing,
    Weights,
    check_loading,
    dry_load,
    find_weights,
    inspect_checkpoint,
    load_pickle,
    missing_part,
    needed_files,
    one_line,
    quiet,
    stream_tensors,
)
from featherweight.errors import CheckpointError, FeatherweightError, ServiceError
from featherweight.prequantized import method_of
from featherweight.progress import Progress
from featherweight.recipe import LoadSpec
from featherweight.serving import FILE as SERVING
from featherweight.serving import Serving
from featherweight.workspace import local_path
from tasks.stage import Metrics, stage
from tasks.unpack import read_config, unpack
from tasks.zeros import take_stock

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

METRICS = ("parameters", "size_bytes", "vocab", "layers", "context")
_WORK = ".fetch"


@dataclass(frozen=True)
class Source:
    """One kind of source. `fetch(spec, work, progress)` brings it to a local folder or GGUF file, at most into `work`."""

    fetch: Callable[[LoadSpec, Path, Progress], Path]
    identity: Callable[[LoadSpec], Any]


def source_fingerprint(spec: LoadSpec) -> str:
    """Identity of what `load` would take from the source, without taking it: content, ETags, or a resolved version."""
    kind, source = _source(spec)
    return content_digest([kind, source.identity(spec)])


@stage("load", libraries=("transformers", "safetensors", "gguf", "compressed-tensors"), source=source_fingerprint)
def load(spec: LoadSpec, *, out: Path, seed: int = 0, progress: Progress = Progress()) -> Metrics:
    """Bring a checkpoint into `out` as safetensors with its tokenizer, and check it; `spec.source` is one of

    a Hugging Face folder or a GGUF file (or a folder with one), `s3://bucket/prefix`, `hf:org/name@revision`,
    `models:/name@alias`, `models:/name/version`. Local weights are hard-linked, shards stay shards. The model must be one for
    `spec.task`. Weights that are quantized already (GPTQ, AWQ, compressed-tensors) keep their integers where a grid holds them,
    as a quantize stage leaves them, and else become float; metrics `quantized_layers` and `dequantized_layers` count them.
    A sparse checkpoint, with a `sparsity.json` or at least half zeros in its blocks, keeps its zeros; metric `zero_share`.
    Raises CheckpointError or ServiceError; then `out` is empty again.
    """
    work = out / _WORK
    work.mkdir()
    try:
        found = _source(spec)[1].fetch(spec, work, progress)
        with _named(found, str(spec.source)):
            unpacked: dict[str, float] = {}
            info = _adopt(found, spec, out, progress, unpacked)
        # Coarse grids have many zeros that nobody pruned.
        zeros = take_stock(out, str(spec.source), search=not unpacked, progress=progress)
        shutil.rmtree(work)
    except BaseException:
        _clear(out)
        raise
    return {name: float(asdict(info)[name]) for name in METRICS} | unpacked | zeros


def _source(spec: LoadSpec) -> tuple[str, Source]:
    if spec.source is None:
        raise CheckpointError("there is nothing to load: the recipe trains its checkpoint (checkpoint.train)")
    kind = next((kind for kind in SOURCES if spec.source.startswith(kind)), "")
    return kind, SOURCES.get(kind, LOCAL)


@contextmanager
def _named(path: Path, source: str) -> Iterator[None]:
    """Errors name the source as the recipe has it, not where it was fetched to."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(path), source)) from error


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _adopt(found: Path, spec: LoadSpec, out: Path, progress: Progress, unpacked: dict[str, float]) -> CheckpointInfo:
    """Check a local folder or GGUF file and put it into `out`, converted where it is not plain float safetensors.

    Of weights that are quantized already, `unpacked` gets what became of them.
    """
    progress.note(f"checking {spec.source}")
    gguf = _gguf_file(found)
    if gguf is not None:
        _convert_gguf(gguf, out, progress)
        return inspect_checkpoint(out, task=spec.task)
    weights = find_weights(Listing.of(found), allow_pickle=spec.allow_pickle)
    if weights.pickled:
        _convert_pickle(found, weights, spec, out, progress)
        return inspect_checkpoint(out, task=spec.task, trust_remote_code=spec.trust_remote_code)
    config = read_config(found)
    if method_of(config) is not None:
        with _saving(out):
            unpacked |= unpack(found, config, weights, out, progress)
        return inspect_checkpoint(out, task=spec.task)
    info = inspect_checkpoint(found, task=spec.task, trust_remote_code=spec.trust_remote_code)
    for name in needed_files(Listing.of(found), weights, trust_remote_code=spec.trust_remote_code):
        _take(found / name, out / name)
    return info


def _take(source: Path, target: Path) -> None:
    """Weights are hard-linked, or copied where the file systems differ; of a symbolic link, what it points at.

    Small files are copied: some tools rewrite a config.json in place, and must not reach the user's own checkpoint.
    """
    if source.suffix == ".safetensors":
        try:
            os.link(source.resolve(), target)
            return
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                raise
    shutil.copyfile(source, target)


# --- conversions


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that lies in it instead of safetensors or a pickle."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is a file; expected a checkpoint folder, or a .gguf file")
        return path
    if not path.is_dir() or any((path / name).exists() for name in (WEIGHTS, INDEX, PICKLE, PICKLE_INDEX)):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(f"{path} holds {len(files)} GGUF files; name one, such as {path / files[0].name}")
    return files[0] if files else None


def _convert_gguf(file: Path, out: Path, progress: Progress) -> None:
    """Write a GGUF file's weights, as float32 safetensors, and its tokenizer into `out`, through transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise CheckpointError(f"{file} is not a GGUF file (its first bytes are not 'GGUF'); copy it again")
    progress.note(f"dequantizing {file.name}")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
            _set_special_tokens(tokenizer, file)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                # Without this the weights may stay packed, and the model cannot be saved.
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # the reader trusts the file: a damaged one fails anywhere
        raise CheckpointError(f"{file} cannot be read as a GGUF checkpoint: {one_line(error)}") from error
    model, info = loaded
    check_loading(file, model, info)
    with _saving(out), quiet():
        tokenizer.save_pretrained(out)
        model.save_pretrained(out, max_shard_size="5GB")


def _set_special_tokens(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """The special tokens that the file names; transformers 5.17 takes the first control token for EOS, and forgets padding."""
    from transformers.integrations.gguf import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(file))
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for theirs, ours in names.items():
        number = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if number is not None:
            setattr(tokenizer, f"{ours}_token", tokenizer.convert_ids_to_tokens(int(number)))


def _convert_pickle(folder: Path, weights: Weights, spec: LoadSpec, out: Path, progress: Progress) -> None:
    """Write a pickled checkpoint's tensors as safetensors, shard by shard, and link the rest."""
    from safetensors.torch import save_file

    shapes = {name: tuple(tensor.shape) for _, name, tensor in stream_tensors(folder, weights)}
    ties = dry_load(folder, shapes, spec.task, trust_remote_code=spec.trust_remote_code).all_tied_weights_keys
    mapping: dict[str, str] = {}
    size = 0
    for number, file in enumerate(weights.files, 1):
        progress.note(f"converting {file} ({number} of {len(weights.files)})")
        shard = f"model-{number:05}-of-{len(weights.files):05}.safetensors" if weights.index else WEIGHTS
        tensors = _unshared(load_pickle(folder / file), ties)
        with _saving(out):
            save_file(tensors, out / shard, metadata={"format": "pt"})
        mapping |= dict.fromkeys(tensors, shard)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if weights.index:
        (out / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": mapping}, indent=1))
    listing = Listing.of(folder)
    for name in needed_files(listing, weights, trust_remote_code=spec.trust_remote_code):
        if name not in (*weights.files, PICKLE_INDEX):
            _take(folder / name, out / name)


def _unshared(tensors: Mapping[str, Tensor], ties: Mapping[str, str]) -> dict[str, Tensor]:
    """Contiguous tensors without common storage: the tied copies left out, others that share copied."""
    kept: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        twin = tensors.get(ties.get(name, ""))
        if twin is not None and twin.data_ptr() == tensor.data_ptr() and twin.shape == tensor.shape:
            continue
        storage = tensor.untyped_storage().data_ptr()
        kept[name] = tensor.clone().contiguous() if storage in storages else tensor.contiguous()
        storages.add(storage)
    return kept


@contextmanager
def _saving(out: Path) -> Iterator[None]:
    """safetensors tells of a full disk in words only."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if "os error 28" not in str(error) and "No space left" not in str(error):
            raise
        raise ServiceError(f"no space left on the disk while writing {out}; free some, run it again") from error


# --- local


def _fetch_local(spec: LoadSpec, work: Path, progress: Progress) -> Path:
    return Path(str(spec.source)).expanduser()


def _identify_local(spec: LoadSpec) -> dict[str, str]:
    """sha256 of every file that is taken, by name."""
    path = _fetch_local(spec, Path(), Progress())
    gguf = _gguf_file(path)
    if gguf is not None:
        return {gguf.name: file_sha256(gguf)}
    listing = Listing.of(path)
    weights = find_weights(listing, allow_pickle=spec.allow_pickle)
    names = needed_files(listing, weights, trust_remote_code=spec.trust_remote_code)
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: file_sha256(path / name), names), strict=True))


# --- s3://bucket/prefix


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


# --- hf:org/name@revision


def _fetch_hf(spec: LoadSpec, work: Path, progress: Progress) -> Path:
    """Download the needed files of a repository into huggingface_hub's own cache, which resumes and deduplicates."""
    from huggingface_hub import snapshot_download

    repo, revision = _repository(spec)
    progress.note(f"downloading {spec.source}")
    with _hub_explained(spec):
        names = _hub_names(spec)
        offline = names is None
        patterns = names or [CONFIG, WEIGHTS, INDEX, "model-*-of-*.safetensors", SPARSITY, *TOKENIZERS, *COMPANIONS]
        folder = snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=offline, **_hub_places())
    return Path(folder)


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


def _hub_names(spec: LoadSpec) -> list[str] | None:
    """Names to download; None where the hub is out of reach. Refuses a pickle before anything is downloaded."""
    from huggingface_hub import hf_hub_download

    info = _hub_info(spec)
    if info is None:
        return None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings if "/" not in file.rfilename}

    def read(name: str, length: int) -> bytes:
        path = hf_hub_download(_repository(spec)[0], name, revision=info.sha, **_hub_places())
        return Path(path).read_bytes()

    listing = Listing(str(spec.source), sizes, read)
    weights = find_weights(listing, allow_pickle=spec.allow_pickle)
    return needed_files(listing, weights, trust_remote_code=spec.trust_remote_code)


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


def _identify_hf(spec: LoadSpec) -> list[str]:
    """The commit that the revision stands for, asked of the hub, else of the local cache."""
    with _hub_explained(spec):
        info = _hub_info(spec)
        if info is not None:
            return [_repository(spec)[0], info.sha]
    return [_repository(spec)[0], _fetch_hf(spec, Path(), Progress()).name]


# --- models:/name@alias, models:/name/version


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


@contextmanager
def _registry_explained(spec: LoadSpec) -> Iterator[None]:
    """Turn what MLflow raises into one line."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except FeatherweightError:
        raise
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise CheckpointError(f"{spec.source}: the registry has no such model ({one_line(error)})") from error
        raise ServiceError(f"{spec.source}: MLflow failed: {one_line(error)}; check MLFLOW_TRACKING_URI") from error


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
            _take(path, joined / path.name)
    return joined


def _identify_registered(spec: LoadSpec) -> list[str]:
    """The location that an alias stands for now: every version has its own."""
    return [_model_location(spec)]


LOCAL = Source(_fetch_local, _identify_local)
SOURCES = {
    "s3://": Source(_fetch_s3, _identify_s3),
    "hf:": Source(_fetch_hf, _identify_hf),
    "models:": Source(_fetch_registered, _identify_registered),
}
