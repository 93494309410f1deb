"""Checkpoints: folders in Hugging Face layout, and the checks that one passes before anything is built on it.

Nothing here loads a model. Names and shapes come from the files' headers and are compared with the architecture on
torch's meta device; values are read tensor by tensor.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.architecture import TASKS, family_of, head_class
from featherweight.errors import CheckpointError, one_line
from featherweight.recipe import Task
from featherweight.sparsity import FILE as SPARSITY

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
COMPANIONS = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "source.spm",
    "target.spm",
    "chat_template.jinja",
    "chat_template.json",
)
# safetensors itself refuses longer headers.
_MAX_HEADER = 100_000_000
_CHUNK = 1 << 24
# What encoders were pre-trained with beside their masked-language-model head, and need no more.
_BESIDE = re.compile(r"(^|\.)(pooler|seq_relationship)\.")


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is. `parameters` counts tied weights once; `context` is in tokens, 0 where there is no bound."""

    architecture: str
    model_type: str
    parameters: int
    size_bytes: int
    vocab: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    context: int


@dataclass(frozen=True)
class Listing:
    """A checkpoint's files wherever they lie: sizes in bytes by name, and `read(name, n)` for the first n bytes of one."""

    where: str
    sizes: Mapping[str, int]
    read: Callable[[str, int], bytes]

    @classmethod
    def of(cls, folder: Path) -> Listing:
        """The files right inside a local folder; raises CheckpointError where it is missing."""
        if not folder.is_dir():
            problem = "is a file, not a folder" if folder.is_file() else "does not exist"
            raise CheckpointError(f"checkpoint folder {folder} {problem}; check its path in the recipe")
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        return cls(str(folder), sizes, lambda name, length: _head(folder / name, length))


@dataclass(frozen=True)
class Weights:
    """The files that hold the tensors. `index` maps each tensor to its shard; None where there is one file only."""

    files: tuple[str, ...]
    index: Mapping[str, str] | None = None
    pickled: bool = False


def _head(path: Path, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def is_complete(listing: Listing) -> bool:
    """Whether everything that a checkpoint needs is there, every shard in full length."""
    return missing_part(listing) is None


def missing_part(listing: Listing) -> str | None:
    """What a checkpoint still lacks, in one line; None when it is complete. Reads headers only, so that polling is cheap."""
    try:
        _read_json(listing, CONFIG)
        weights = find_weights(listing, allow_pickle=True)
        for name in weights.files if not weights.pickled else ():
            _check_length(listing, name)
        _require_tokenizer(listing)
        for name in ("tokenizer.json", *COMPANIONS):
            if name in listing.sizes and name.endswith(".json"):
                _read_json(listing, name)
    except CheckpointError as error:
        return str(error)
    return None


def needed_files(listing: Listing, weights: Weights, *, trust_remote_code: bool = False) -> list[str]:
    """Names of the files to take: configuration, weights, their zeros, tokenizer; code only where it is trusted. Nothing else."""
    wanted = {CONFIG, SPARSITY, *weights.files, *TOKENIZERS, *COMPANIONS}
    if weights.index is not None:
        wanted.add(PICKLE_INDEX if weights.pickled else INDEX)
    return [name for name in sorted(listing.sizes) if name in wanted or (trust_remote_code and name.endswith(".py"))]


def find_weights(listing: Listing, *, allow_pickle: bool = False) -> Weights:
    """The weight files, safetensors first. Raises CheckpointError where there are none, a shard is missing, or only pickles."""
    if WEIGHTS in listing.sizes:
        return Weights((WEIGHTS,))
    if INDEX in listing.sizes:
        return _shards(listing, INDEX)
    if PICKLE not in listing.sizes and PICKLE_INDEX not in listing.sizes:
        raise CheckpointError(f"{listing.where} holds no weights: expected {WEIGHTS}, or shards and {INDEX}")
    if not allow_pickle:
        raise CheckpointError(
            f"{listing.where} holds its weights as a pickle ({PICKLE}), which can run code; ask for a safetensors copy, "
            "or set checkpoint.allow_pickle: true to convert it"
        )
    if PICKLE in listing.sizes:
        return Weights((PICKLE,), pickled=True)
    return _shards(listing, PICKLE_INDEX, pickled=True)


def _shards(listing: Listing, index: str, *, pickled: bool = False) -> Weights:
    mapping = _read_json(listing, index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(file, str) for file in mapping.values()):
        raise CheckpointError(f"{listing.where}/{index} has no weight_map of tensors to shards; copy it again")
    files = tuple(sorted(set(mapping.values())))
    missing = [name for name in files if name not in listing.sizes]
    if missing:
        raise CheckpointError(
            f"{listing.where}: {index} names shard {missing[0]}, which is missing "
            f"({len(files) - len(missing)} of {len(files)} shards are there); copy the whole checkpoint"
        )
    return Weights(files, mapping, pickled)


def _read_json(listing: Listing, name: str) -> dict[str, Any]:
    """A JSON object of the checkpoint."""
    if name not in listing.sizes:
        adapter = name == CONFIG and "adapter_config.json" in listing.sizes
        hint = "it is an adapter: merge it into its base model first" if adapter else "is it a Hugging Face checkpoint?"
        raise CheckpointError(f"{listing.where} has no {name}; {hint}")
    try:
        value = json.loads(listing.read(name, listing.sizes[name]))
    except ValueError as error:
        raise CheckpointError(f"{listing.where}/{name} is not JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{listing.where}/{name} must hold a JSON object, found {type(value).__name__}")
    return value


def _check_length(listing: Listing, name: str) -> None:
    """Compare a safetensors file's size with what its header promises."""
    size = listing.sizes[name]
    lead = listing.read(name, 8)
    length = struct.unpack("<Q", lead)[0] if len(lead) == 8 else _MAX_HEADER + 1
    try:
        if length > _MAX_HEADER:
            raise ValueError("no header length")
        expected = 8 + length
        if size >= expected:
            header = json.loads(listing.read(name, expected)[8:])
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
            expected += max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{listing.where}/{name} ({size} bytes) has no safetensors header; copy it again") from error
    if size != expected:
        least = "at least " if size < 8 + length else ""
        problem = "is truncated" if size < expected else "has bytes after its end"
        raise CheckpointError(f"{listing.where}/{name} {problem}: {size} of {least}{expected} bytes; copy it again")


def _require_tokenizer(listing: Listing) -> None:
    if not any(name in listing.sizes for name in TOKENIZERS):
        raise CheckpointError(f"{listing.where} has no tokenizer (expected tokenizer.json or tokenizer.model); copy it in too")


def inspect_checkpoint(
    folder: Path,
    *,
    task: Task | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    check_values: bool = True,
) -> CheckpointInfo:
    """Check a checkpoint folder from its headers to its values, and say what it is.

    Compares tensor names and shapes with the architecture that config.json describes, and the tokenizer with the embedding.
    task: what it must be made for; None where that does not matter.
    check_values: also look for NaN and infinity, reading every tensor once, one at a time.
    Raises CheckpointError with one line that names the file or the tensor.
    """
    listing = Listing.of(folder)
    _check_config(listing, trust_remote_code)
    weights = find_weights(listing, allow_pickle=allow_pickle)
    _require_tokenizer(listing)
    shapes = _read_shapes(listing, folder, weights)
    model = dry_load(folder, shapes, task, trust_remote_code=trust_remote_code)
    _check_vocabulary(folder, _rows(model), trust_remote_code)
    if check_values:
        _check_values(folder, weights)
    return _describe(model, folder, weights, sum(listing.sizes[name] for name in weights.files))


def _check_config(listing: Listing, trust_remote_code: bool) -> None:
    """Refuse what config.json says we cannot take: no model type, packed weights, code of its own."""
    config = _read_json(listing, CONFIG)
    where = f"{listing.where}/{CONFIG}"
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{where} names no model_type; is it a transformers checkpoint?")
    if config.get("quantization_config"):
        packed = config["quantization_config"]
        method = packed.get("quant_method", "unknown method") if isinstance(packed, dict) else packed
        raise CheckpointError(f"{where}: the weights are quantized already ({method}); start from the float checkpoint")
    for name in (CONFIG, "tokenizer_config.json"):
        if name in listing.sizes and not trust_remote_code and _read_json(listing, name).get("auto_map"):
            raise CheckpointError(
                f"{listing.where}/{name} wants code of its own to run (auto_map); read that code, then set "
                "checkpoint.trust_remote_code: true, or remove auto_map to use what transformers has"
            )


def _read_shapes(listing: Listing, folder: Path, weights: Weights) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, from the headers; checks each file's length and the shard index."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weights.files:
        if not weights.pickled:
            _check_length(listing, file)
        found = _pickled_shapes(folder / file) if weights.pickled else _header_shapes(folder / file)
        for name, shard in (weights.index or {}).items():
            if shard == file and name not in found:
                raise CheckpointError(f"{folder / file} lacks tensor {name}, which the shard index puts there; copy it again")
        shapes |= found
    return shapes


def _header_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)


def _pickled_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in load_pickle(path).items()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A memory-mapped safetensors file, its header validated."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path} is corrupt ({one_line(error)}); copy it again") from error


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, memory-mapped where the format allows it; anything but tensors is refused."""
    import pickle
    import zipfile

    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is not a pickle of plain tensors ({one_line(error)}); it was not loaded") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path} must hold a mapping of names to tensors; it was not loaded")
    return state


def dry_load(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], task: Task | None = None, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The architecture on the meta device (no memory), after transformers' own loading of tensors with these shapes.

    Raises CheckpointError where the model is for another task, or a tensor is missing, unexpected or mis-shaped; tied weights
    need be there once only.
    """
    import torch
    from transformers import AutoConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
            _check_task(folder, config, task)
            model, info = _model_class(config, folder, trust_remote_code).from_pretrained(
                None,
                config=config,
                state_dict={name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except CheckpointError:
        raise
    except Exception as error:  # a config can fail in as many ways as there are architectures
        raise CheckpointError(f"{folder / CONFIG} describes no model that transformers can build: {one_line(error)}") from error
    check_loading(folder, model, info)
    return model


def _check_task(folder: Path, config: Any, task: Task | None) -> None:
    """Refuse a model that is made for another task."""
    found = TASKS[family_of(config)]
    if task is not None and task != found:
        kind = (config.architectures or [config.model_type])[0]
        raise CheckpointError(f"{folder} is a model for {found} ({kind}), but the recipe's task is {task}; set task: {found}")


def _model_class(config: Any, folder: Path, trust_remote_code: bool) -> Any:
    """The class that config.json names: transformers' own, or the folder's where that is trusted.

    An encoder or an encoder-decoder must have the head that it is measured by, whatever config.json names.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    remote = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if trust_remote_code and remote:
        return get_class_from_dynamic_module(remote, folder)
    if family_of(config) != "causal" and (headed := head_class(config)):
        return headed
    name = (config.architectures or ["AutoModelForCausalLM"])[0]
    found = getattr(transformers, name, None)
    if found is None:
        raise ValueError(f"transformers {transformers.__version__} has no architecture '{name}'")
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """No bars, no load report: what matters of it becomes an error."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def check_loading(folder: Path, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Turn transformers' loading info into a CheckpointError where it tells of any difference."""
    architecture, ties = type(model).__name__, model.all_tied_weights_keys
    # Of tied weights that are all missing, name the one that should have been stored.
    missing = sorted(info["missing_keys"], key=lambda name: (name in ties, name))
    unexpected = sorted(name for name in info["unexpected_keys"] if not _BESIDE.search(name))
    mismatched = sorted(info["mismatched_keys"])
    if missing:
        raise CheckpointError(f"{folder}: tensor {missing[0]} of {architecture} is missing{_more(missing)}; copy it again")
    if mismatched:
        name, found, wanted = mismatched[0]
        raise CheckpointError(
            f"{folder}: tensor {name} has shape {list(found)}, but {CONFIG} asks for {list(wanted)}{_more(mismatched)}; "
            "weights and config.json do not belong together"
        )
    if unexpected:
        raise CheckpointError(
            f"{folder}: tensor {unexpected[0]} has no place in {architecture}{_more(unexpected)}; "
            "weights and config.json do not belong together"
        )
    if info["error_msgs"]:
        raise CheckpointError(f"{folder}: {one_line(info['error_msgs'][0])}")


def _more(names: list[Any]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _check_vocabulary(folder: Path, rows: int, trust_remote_code: bool) -> None:
    """The tokenizer loads, and none of its ids lies outside the embedding."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        size = max(tokenizer.get_vocab().values(), default=-1) + 1
    except Exception as error:  # each tokenizer family fails in its own way
        raise CheckpointError(f"{folder}: the tokenizer does not load: {one_line(error)}") from error
    if size == 0:
        raise CheckpointError(f"{folder}: the tokenizer's vocabulary is empty; copy the tokenizer's files again")
    if size > rows:
        raise CheckpointError(
            f"{folder}: the tokenizer has ids up to {size - 1}, but the embedding has only {rows} rows; "
            "tokenizer and weights do not belong together"
        )


def _check_values(folder: Path, weights: Weights) -> None:
    """Name the first tensor that holds NaN or infinity."""
    for file, name, tensor in stream_tensors(folder, weights):
        if not _is_finite(tensor):
            raise CheckpointError(f"{folder / file}: tensor {name} holds NaN or infinite values; take an earlier checkpoint")


def stream_tensors(folder: Path, weights: Weights) -> Iterator[tuple[str, str, Tensor]]:
    """(file, name, tensor) one by one; the tensors are memory-mapped."""
    for file in weights.files:
        if weights.pickled:
            yield from ((file, name, tensor) for name, tensor in load_pickle(folder / file).items())
            continue
        with _opened(folder / file) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                yield file, name, opened.get_tensor(name)


def _is_finite(tensor: Tensor) -> bool:
    """In one pass without temporaries: the extremes of a tensor are finite exactly when all of it is."""
    import torch

    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    for chunk in tensor.flatten().split(_CHUNK):
        wide = chunk.float() if chunk.element_size() == 1 else chunk
        if not torch.isfinite(torch.stack(torch.aminmax(wide))).all():
            return False
    return True


def _describe(model: PreTrainedModel, folder: Path, weights: Weights, size_bytes: int) -> CheckpointInfo:
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    tied, copies = _ties(model, folder, weights)
    return CheckpointInfo(
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        parameters=sum(parameter.numel() for parameter in model.parameters()) - copies,
        size_bytes=size_bytes,
        vocab=_rows(model),
        layers=getattr(config, "num_hidden_layers", 0),
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0),
        tied=tied,
        context=getattr(config, "max_position_embeddings", None) or 0,
    )


def _rows(model: PreTrainedModel) -> int:
    """Rows of the embedding: how many token ids the model knows."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def _ties(model: PreTrainedModel, folder: Path, weights: Weights) -> tuple[bool, int]:
    """(is the output head the embedding, parameters stored twice). Where a file holds both, equal values count as tied."""
    output, source = model.get_output_embeddings(), model.get_input_embeddings()
    if output is None or source is None or output.weight.shape != source.weight.shape:
        return False, 0
    if output.weight is source.weight:
        return True, 0
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    pair = (names[id(output.weight)], names[id(source.weight)])
    if pair[0] not in model.all_tied_weights_keys:
        return False, 0
    stored = {name: tensor for _, name, tensor in stream_tensors(folder, weights) if name in pair}
    equal = len(stored) == 2 and bool(stored[pair[0]].equal(stored[pair[1]]))
    return equal, output.weight.numel() if equal else 0
