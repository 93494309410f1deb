"""An adapter's weights added to those of the model that it was trained on, by peft, with nothing left out."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.files import ADAPTER, Listing, read_json
from featherweight.checkpoint.inspection import and_more, quiet
from featherweight.checkpoint.settling import heeds
from featherweight.errors import CheckpointError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDING = "embed_tokens.weight"
SHARED = ("vblora_vector_bank", "prompt_encoder", "tinylora_v", "unilora_theta_d")
"""What peft holds once for all layers, so that no layer misses its own."""
BESIDE = r"(?!weight$|base_layer\.|modules_to_save\.|token_adapter\.)"
"""What an adapter's file says of a module that it has not trained two factors for."""


def merged(model: PreTrainedModel, adapter: Path, weights: str, *, safe: bool = True) -> PreTrainedModel:
    """`model` with the adapter's weights, in the file of that name, added to its own; a model without memory may be given too.

    safe: numbers that are none are looked for. Raises CheckpointError where peft cannot, or would leave something out.
    """
    from peft import PeftModel, get_peft_model_state_dict

    rows = _rows(adapter / weights)
    embedding: Any = model.get_input_embeddings()
    if rows is not None and rows != embedding.weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    _untie(model, adapter, weights)
    _require_rows(adapter, model)
    try:
        with quiet():
            adapted: Any = PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
            _require_placed(adapter, adapted.load_adapter(str(adapter), "default", local_files_only=True))
            _require_biases(adapter, get_peft_model_state_dict(adapted, save_embedding_layers=False), _names(adapter / weights))
            whole: PreTrainedModel = adapted.merge_and_unload(safe_merge=safe)
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(
            f"{adapter}: {error.args[0]} is missing, which {ADAPTER} says that the adapter has trained; copy both again"
        ) from error
    except Exception as error:  # each kind of adapter fails in its own way
        told = reason(error).rstrip(".")
        raise CheckpointError(
            f"{adapter}: the adapter cannot be merged into its base ({told}); set checkpoint.base to the model that it "
            "was trained on, or give the base alone"
        ) from error
    _part(whole)
    return whole


def _untie(model: PreTrainedModel, adapter: Path, weights: str) -> None:
    """Give the head a matrix of its own where the adapter has trained it, or the embedding that it is.

    peft adds to each what was learned for it alone; merged into a matrix that both are it would change the other too.
    """
    import torch

    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    every = model.named_modules(remove_duplicate=False)
    places = [name for name, module in every if getattr(module, "weight", None) is embedding.weight]
    trained = re.compile(rf"\.({'|'.join(map(re.escape, places))})\.{BESIDE}")
    if not any(trained.search(name) for name in _names(adapter / weights)):
        return
    if model.config.is_encoder_decoder:
        raise CheckpointError(
            f"{adapter}: the adapter has trained the embedding or the head alone, which are one matrix of this "
            f"{model.config.model_type}; train it on other layers"
        )
    head.weight = torch.nn.Parameter(head.weight.detach().clone())


def _part(model: PreTrainedModel) -> None:
    """Where an adapter has left tied weights different, have the configuration say so, and each stored: none is found by another.

    The head of a T5, whose configuration says that it is tied whatever it is told, is found by its own name.
    """
    import torch

    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    weights = dict(model.named_parameters(remove_duplicate=False))
    apart = [name for name, source in ties.items() if name in weights and weights[name] is not weights.get(source)]
    if not apart or not heeds(model.config, False):
        return
    for name in ties.keys() - apart:
        if name in weights:
            module, _, kind = name.rpartition(".")
            setattr(model.get_submodule(module), kind, torch.nn.Parameter(weights[name].detach().clone()))
    model.config.tie_word_embeddings = False


def _require_rows(adapter: Path, model: PreTrainedModel) -> None:
    """Refuse tokens that an adapter has trained by themselves and the embedding has no rows of."""
    told = read_json(Listing.of(adapter), ADAPTER)
    embedding: Any = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    for key in ("trainable_token_indices", "token_indices"):
        listed = told.get(key) or []
        numbers = [one for some in (listed.values() if isinstance(listed, dict) else [listed]) for one in some]
        beyond = [one for one in numbers if not 0 <= one < rows]
        if beyond:
            raise CheckpointError(
                f"{adapter}/{ADAPTER}: {key} has the token {beyond[0]}, and its base has {rows}; set checkpoint.base to the model "
                "that it was trained on"
            )


def _require_biases(adapter: Path, wanted: Collection[str], given: Collection[str]) -> None:
    """Refuse an adapter whose file has lost the biases that it has trained: peft says nothing, and takes the base's."""
    told = read_json(Listing.of(adapter), ADAPTER).get("bias")
    lost = [name for name in sorted(set(wanted) - set(given)) if name.endswith("bias")]
    if lost and told not in (None, "none"):
        raise CheckpointError(
            f"{adapter}: {lost[0]} is missing{and_more(lost)}, and {ADAPTER} says that biases were trained (bias: {told}); save it "
            "again with a newer peft, or say bias: none there to take it without them"
        )


def _names(path: Path) -> list[str]:
    """Of the tensors of an adapter."""
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        import torch

        return list(torch.load(path, map_location="meta", weights_only=True))
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _require_placed(adapter: Path, loaded: Any) -> None:
    """Refuse an adapter that peft leaves out, whole or in part, where the base has no such layers, or others: it only warns."""
    missing = [name for name in loaded.missing_keys if not any(shared in name for shared in SHARED)]
    problems = {"has no place in its base": loaded.unexpected_keys, "is missing, and its base has a place for it": missing}
    for problem, names in problems.items():
        if names:
            raise CheckpointError(
                f"{adapter}: the adapter's {names[0]} {problem}{and_more(names)}; the two do not belong together: set "
                "checkpoint.base to the model that it was trained on, or copy the adapter's two files again"
            )


def _rows(path: Path) -> int | None:
    """Rows of the embedding that an adapter brings along, where its training added tokens."""
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        found = [name for name in _names(path) if name.endswith(EMBEDDING)]
        return int(file.get_slice(found[0]).get_shape()[0]) if found else None
