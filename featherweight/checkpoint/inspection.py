"""The checks that a checkpoint passes before anything is built on it.

Nothing here loads a model. Names and shapes come from the files' headers and are compared with the architecture on
torch's meta device; values are read tensor by tensor.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.files import (
    CONFIG,
    WEIGHTS,
    Listing,
    Weights,
    companions,
    find_weights,
    is_companion,
    read_json,
    require_tokenizer,
)
from featherweight.checkpoint.fit import beyond_embedding, beyond_vocabulary
from featherweight.checkpoint.gguf_tokenizer import gguf_tokenizer
from featherweight.checkpoint.quantized_formats import method_of
from featherweight.checkpoint.tensors import read_shapes, require_finite, stream_tensors
from featherweight.errors import CheckpointError, one_line, reason
from featherweight.model.architecture import answers_by_decoder, class_by_type, family_of, head_class, head_refusal, task_of
from featherweight.model.decoding import decoder_refusal, language_refusal, random_refusal, windows_refusal
from featherweight.spec import Task
from featherweight.system.bars import hidden_bars

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


# What encoders were pre-trained with beside their masked-language-model head, and decoders by reinforcement, and need no more.
_BESIDE = re.compile(r"(^|\.)(pooler|seq_relationship|sop_classifier)\.|^v_head\.")
# Constants that transformers once stored with the weights and makes anew now.
_CONSTANTS = re.compile(
    r"(^|\.)((attn|attention)\.bias|masked_bias|causal_mask|inv_freq|position_ids|token_type_ids|version|_float_tensor)$"
)
_EXPERT = re.compile(r"(?P<layer>.*\bexperts\.)(?P<number>\d+)(?P<part>\..+)")
# Heads that a file holds beside the base model that embeddings are made with.
_HEADS = re.compile(r"^(cls|lm_head|mlm|vocab_\w+|generator_\w+|discriminator_predictions|classifier|qa_outputs|predictions)\.")


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
    require_described(listing, trust_remote_code)
    _require_float(listing)
    weights = find_weights(listing, allow_pickle=allow_pickle)
    require_tokenizer(listing)
    shapes = read_shapes(listing, folder, weights)
    model = dry_load(folder, shapes, task, trust_remote_code=trust_remote_code)
    _check_vocabulary(folder, _rows(model), trust_remote_code)
    if check_values:
        read = model.state_dict().keys()
        require_finite(folder, weights, unless=lambda name: name not in read and _CONSTANTS.search(name) is not None)
        beside = (name for name in companions(listing.sizes) if is_companion(name, (f"[0-9]_*/{WEIGHTS}",)))
        require_finite(folder, Weights(tuple(beside)))
    return _describe(model, folder, weights, sum(listing.sizes[name] for name in weights.files))


def _require_float(listing: Listing) -> None:
    """Refuse packed weights."""
    if (method := method_of(read_json(listing, CONFIG))) is not None:
        where = f"{listing.where}/{CONFIG}"
        raise CheckpointError(f"{where}: the weights are quantized already ({method}); start from the float checkpoint")


def require_described(listing: Listing, trust_remote_code: bool) -> None:
    """Refuse what config.json says we cannot take: no model type, code of its own."""
    if not isinstance(read_json(listing, CONFIG).get("model_type"), str):
        raise CheckpointError(f"{listing.where}/{CONFIG} names no model_type; is it a transformers checkpoint?")
    for name in (CONFIG, "tokenizer_config.json"):
        if name in listing.sizes and not trust_remote_code and read_json(listing, name).get("auto_map"):
            raise CheckpointError(
                f"{listing.where}/{name} wants code of its own to run (auto_map); read that code, then set "
                "checkpoint.trust_remote_code: true, or remove auto_map to use what transformers has"
            )


def config_refusal(config: PreTrainedConfig) -> str | None:
    """Why no model of this configuration is taken, whatever the weights are, in one line; None where one is."""
    asked = (_layers_refusal, windows_refusal, decoder_refusal, language_refusal, random_refusal)
    return next((reason for ask in asked if (reason := ask(config))), None)


def _layers_refusal(config: PreTrainedConfig) -> str | None:
    """That some layers are wider than others by the very configuration, as Gemma 4's: nothing here asks each layer."""
    told = getattr(config.get_text_config(), "_heterogeneity_spec", None)
    if told is None:
        return None
    names = ", ".join(sorted(told.per_layer_attributes))
    return f"the layers of a {config.model_type} model differ in {names}, which is not taken here yet; take another"


def dry_load(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], task: Task | None = None, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The architecture on the meta device (no memory), after transformers' own loading of tensors with these shapes.

    Raises CheckpointError where the model is for another task, or a tensor is missing, unexpected or mis-shaped; tied weights
    need be there once only.
    """
    from transformers import AutoConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
            require_task(folder, config, task)
            if reason := config_refusal(config):
                raise CheckpointError(f"{folder}: {reason}")
            model, info = load_dry(folder, model_class(config, folder, trust_remote_code), config, shapes)
    except CheckpointError:
        raise
    except Exception as error:  # a config can fail in as many ways as there are architectures
        raise CheckpointError(
            f"{folder / CONFIG} describes no model that transformers can build: {built(error, folder)}"
        ) from error
    check_loading(folder, model, info)
    return model


def load_dry(folder: Path, made: Any, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model of the class `made` on the meta device, and transformers' own info on loading tensors with these shapes into it.

    Raises CheckpointError for an expert that lacks a tensor which others have, or has another shape: they are stored one by one.
    """
    import torch

    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    options = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = made.from_pretrained(None, config=config, state_dict=tensors, **options)
    except RuntimeError as error:
        if (odd := odd_expert(shapes)) is None:
            raise
        raise CheckpointError(f"{folder}: {odd}; copy it again") from error
    return model, info


def odd_expert(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What an expert lacks, or has in another shape, of what most of a layer's experts have; None where all are alike."""
    layers: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    numbers: dict[str, set[str]] = {}
    for name, shape in shapes.items():
        if place := _EXPERT.match(name):
            layers.setdefault((place["layer"], place["part"]), {})[place["number"]] = shape
            numbers.setdefault(place["layer"], set()).add(place["number"])
    for (layer, part), found in layers.items():
        usual = Counter(found.values()).most_common(1)[0][0]
        for number in sorted(numbers[layer], key=int):
            if found.get(number) != usual:
                what = "is missing" if number not in found else f"has shape {list(found[number])}, the others' {list(usual)}"
                return f"tensor {layer}{number}{part} {what}"
    return None


def built(error: Exception, folder: Path) -> str:
    """Why transformers builds nothing of config.json: of a name that it does not know, which it is of which entry."""
    told = read_json(Listing.of(folder), CONFIG) if (folder / CONFIG).is_file() else {}
    name = error.args[0] if isinstance(error, KeyError) and error.args else None
    entry = next((key for key, value in told.items() if isinstance(name, str) and value == name), None)
    if "Padding_idx" in str(error) and not told:
        return "its padding token lies beyond its vocabulary"
    if "Padding_idx" in str(error):
        return f"pad_token_id is {told.get('pad_token_id')}, and {beyond_vocabulary(told.get('vocab_size', 0))}"
    return f"it knows no {entry} '{name}'" if entry else reason(error)


def require_head(where: Path | str, config: Any) -> None:
    """Refuse a model whose head nothing here answers by."""
    if reason := head_refusal(config):
        raise CheckpointError(f"{where}: {reason}")


def require_task(folder: Path | str, config: Any, task: Task | None) -> None:
    """Refuse a model that is made for another task, or for none."""
    require_head(folder, config)
    found = task_of(config)
    if task is not None and task != found:
        kind = (config.architectures or [config.model_type])[0]
        reranker = (found, task) == ("text-generation", "text-classification")
        otherwise = ", or give a reranker of two words' logits as a classifier (its score: their difference)" if reranker else ""
        raise CheckpointError(
            f"{folder} is a model for {found} ({kind}), but the recipe's task is {task}; set task: {found}{otherwise}"
        )


def model_class(config: Any, folder: Path, trust_remote_code: bool) -> Any:
    """The class that config.json names: transformers' own, or the folder's where that is trusted.

    An encoder or an encoder-decoder must have the head that it is measured by, whatever config.json names; of a decoder whose
    class is not named, or not known, the model type tells it, as it does to transformers.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    remote = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if trust_remote_code and remote:
        return get_class_from_dynamic_module(remote, folder)
    headed = head_class(config)
    if headed and (family_of(config) != "causal" or is_base(config)):
        return headed
    name = class_by_type(config) or (config.architectures or [""])[0]
    found = getattr(transformers, name, None)
    if found is None:
        raise ValueError(f"transformers {transformers.__version__} has no architecture '{name or config.model_type}'")
    return found


def is_base(config: Any) -> bool:
    """Whether config.json names the base model alone, without a head: what AutoModel saves."""
    from transformers import AutoModel

    made = AutoModel._model_mapping.get(type(config), None)
    bases = made if isinstance(made, tuple | list) else (made,)
    return [one.__name__ for one in bases if one] == (config.architectures or [])


_OUTPUT = re.compile(r"(^|\.)(lm_head|embed_out|proj_out|output_projection|output|head|pred_layer|lm_loss)\.")
HEADLESS = (
    "was saved from the base model, without its output head; save the whole model, or, of one that makes vectors of texts, put "
    "sentence-transformers' modules.json beside it"
)


def require_output_head(where: str, config: Any, shapes: Mapping[str, Any]) -> None:
    """Refuse a decoder by its headers that has lost its head: the base model alone, whose embedding is not the head as well."""
    kinds = getattr(config, "architectures", None) or [""]
    base = kinds[0].endswith("Model") and not kinds[0].endswith("LMHeadModel")
    tied = getattr(config, "tie_word_embeddings", True)
    if not base or tied or family_of(config) != "causal" or answers_by_decoder(config):
        return
    if not any(_OUTPUT.search(name) for name in shapes):
        raise CheckpointError(f"{where} {HEADLESS}")


@contextmanager
def quiet() -> Iterator[None]:
    """No bars, no load report: what matters of it becomes an error."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with hidden_bars():
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
    unexpected = sorted(name for name in info["unexpected_keys"] if not (_BESIDE.search(name) or _CONSTANTS.search(name)))
    mismatched = sorted(info["mismatched_keys"])
    if task_of(model.config) == "feature-extraction":
        missing = [name for name in missing if not _BESIDE.search(name)]
        unexpected = [name for name in unexpected if not _HEADS.search(name)]
    if missing:
        beside = (
            f"; there is {unexpected[0]}{and_more(unexpected)}, of another model: they do not belong together" if unexpected else ""
        )
        raise CheckpointError(
            f"{folder}: tensor {missing[0]} of {architecture} is missing{and_more(missing)}{beside or '; copy it again'}"
        )
    if mismatched:
        name, found, wanted = mismatched[0]
        raise CheckpointError(
            f"{folder}: tensor {name} has shape {list(found)}, but {CONFIG} asks for {list(wanted)}{and_more(mismatched)}; "
            "weights and config.json do not belong together"
        )
    if unexpected:
        raise CheckpointError(
            f"{folder}: tensor {unexpected[0]} has no place in {architecture}{and_more(unexpected)}; "
            "weights and config.json do not belong together"
        )
    if info["error_msgs"]:
        raise CheckpointError(f"{folder}: {one_line(info['error_msgs'][0])}")


def and_more(names: Sized) -> str:
    """How many others there are beside the one that an error names."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _check_vocabulary(folder: Path, rows: int, trust_remote_code: bool) -> None:
    """The tokenizer loads, and none of its ids lies outside the embedding."""
    ids = opened_tokenizer(folder, trust_remote_code=trust_remote_code)[1]
    if ids > rows:
        raise CheckpointError(f"{folder}: {beyond_embedding(ids - 1, rows)}")


def opened_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> tuple[Any, int]:
    """The tokenizer of a folder or GGUF file, and one more than its largest id. Raises CheckpointError where it does not load, has
    none, or cuts no text.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer: Any = gguf_tokenizer(folder) if folder.is_file() else None
            options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder, **options)
        ids = max(tokenizer.get_vocab().values(), default=-1) + 1
    except Exception as error:  # each tokenizer family fails in its own way
        raise CheckpointError(f"{folder}: the tokenizer does not load: {reason(error)}") from error
    if ids == 0:
        raise CheckpointError(f"{folder}: the tokenizer's vocabulary is empty; copy the tokenizer's files again")
    try:
        tokenizer("a")
    except Exception as error:
        raise CheckpointError(f"{folder}: the tokenizer loads, and cuts no text: {reason(error)}") from error
    return tokenizer, ids


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
