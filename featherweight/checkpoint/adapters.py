"""Adapters (LoRA and its kin), merged into the model that they were trained on, through peft."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

from featherweight.checkpoint.adapter_merging import merged
from featherweight.checkpoint.files import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    Listing,
    Weights,
    adapter_files,
    base_named,
    check_length,
    companions,
    find_weights,
    has_tokenizer,
    has_weights,
    read_header,
    read_json,
)
from featherweight.checkpoint.opening import load_config, load_model
from featherweight.checkpoint.saving import copy_companions, save_model
from featherweight.checkpoint.sentence_files import MODULES
from featherweight.checkpoint.spec import LoadSpec
from featherweight.checkpoint.tensors import read_shapes, require_finite, saving
from featherweight.errors import CheckpointError
from featherweight.model.architecture import task_of
from featherweight.progress import Progress

LORA = "LORA"
FACTOR = re.compile(r"base_model\.model\.(?P<matrix>.+)\.lora_(?P<factor>[AB])\.weight")
NEVER_MERGED = {
    "layer_replication": "repeats layers of its base",
    "alora_invocation_tokens": "takes effect behind certain tokens alone (aLoRA)",
}
"""Settings of a LoRA that no weights of its base stand for."""
MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` with which peft, as it loads a LoRA, takes from the base what its factors began with."""
DRAWN = ("pissa_niter", "corda", "lora_ga")
"""Those that are drawn, or reckoned from a text, so that it takes something else each time."""
HEADS: Mapping[str, str] = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}
"""What a base with the head is for that peft was given, by what it calls the task."""
PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT")
"""peft's kinds that put something before a text, or beside attention, and change no weight."""


def has_adapter(found: Path, spec: LoadSpec) -> bool:
    """Whether an adapter in the folder is to be merged. Raises CheckpointError where the recipe has to say so first."""
    if not found.is_dir() or not adapter_files(listing := Listing.of(found)):
        return False
    if not has_weights(listing):
        return True
    if spec.adapter is None:
        raise CheckpointError(
            f"{found} holds full weights and an adapter ({ADAPTER}); set checkpoint.adapter: merge to add it to them, "
            "or ignore to take the weights as they are"
        )
    return spec.adapter == "merge"


def base_of(found: Path, spec: LoadSpec) -> str | None:
    """Where the model that the adapter belongs to comes from; None where it is the folder itself."""
    if has_weights(Listing.of(found)) and spec.base is None:
        return None
    told = spec.base or base_named(found)
    if not told:
        raise CheckpointError(f"{found}/{ADAPTER} names no base model; set checkpoint.base")
    if Path(told).expanduser().resolve() == found.resolve():
        raise CheckpointError(f"{found} is named as its own base model; set checkpoint.base to the model that it was trained on")
    return told


def merge(base: Path, adapter: Path, spec: LoadSpec, out: Path, progress: Progress) -> None:
    """Write to `out` the model in `base` with the adapter's weights added: float32, with the adapter's tokenizer if it has one."""
    weights = adapter_weights(adapter, spec)
    listing = Listing.of(base)
    require_same_use(adapter, load_config(base))
    require_factors(adapter, read_shapes(listing, base, find_weights(listing)))
    progress.note(f"merging the adapter into {spec.base or 'its base'}")
    if weights == ADAPTER_WEIGHTS[0]:
        require_finite(adapter, Weights((weights,)))
    whole = merged(load_model(base), adapter, weights)
    with saving(out):
        save_model(whole, out, base)
    if has_tokenizer(Listing.of(adapter)):
        _take_tokenizer(adapter, out)


def adapter_weights(adapter: Path, spec: LoadSpec) -> str:
    """The file of an adapter's weights; raises CheckpointError where there is none, or it is a pickle that nobody allowed."""
    listing = Listing.of(adapter)
    told = read_json(listing, ADAPTER)
    _require_settings(adapter, told)
    if (kind := told["peft_type"]) in PROMPTS:
        raise CheckpointError(
            f"{adapter} is a {kind} adapter, which changes no weight and so cannot be merged; train a LoRA, or give the base alone"
        )
    weights = next((name for name in ADAPTER_WEIGHTS if name in listing.sizes), None)
    if weights is None:
        raise CheckpointError(f"{adapter} has an {ADAPTER}, but no {ADAPTER_WEIGHTS[0]}; copy it again")
    if weights == ADAPTER_WEIGHTS[1] and not spec.allow_pickle:
        raise CheckpointError(
            f"{adapter} holds its adapter as a pickle ({weights}), which can run code; ask for a safetensors copy, "
            "or set checkpoint.allow_pickle: true to convert it"
        )
    if weights == ADAPTER_WEIGHTS[0]:
        check_length(listing, weights)
    return weights


def _require_settings(adapter: Path, told: Mapping[str, Any]) -> None:
    """Refuse what peft only stumbles over once the base is loaded."""
    kind, where = told.get("peft_type"), adapter / ADAPTER
    known = _kinds()
    if not isinstance(kind, str) or (known and kind not in known):
        raise CheckpointError(f"{where}: peft_type is {kind!r}, which peft {version('peft')} does not know; a LoRA's is {LORA}")
    if kind != LORA:
        return
    require_scale(str(where), told)
    if initialized(told).startswith(DRAWN):
        raise CheckpointError(
            f"{where}: init_lora_weights is {initialized(told)}, which peft makes anew, and not the same, when it loads the "
            "adapter; save it with path_initial_model_for_weight_conversion"
        )
    if never := next((key for key in NEVER_MERGED if told.get(key)), None):
        raise CheckpointError(
            f"{where}: the adapter {NEVER_MERGED[never]} ({never}), and so cannot be merged; train a plain LoRA, or give the base"
        )


def require_scale(where: str, told: Mapping[str, Any]) -> None:
    """Refuse what the product of a LoRA's factors cannot be multiplied with."""
    for key, kinds, wanted in (("r", int, "a whole number above 0"), ("lora_alpha", int | float, "a number")):
        value = told.get(key, 1)
        right = isinstance(value, kinds) and not isinstance(value, bool) and isfinite(value)
        if not right or (key == "r" and value < 1):
            raise CheckpointError(f"{where}: {key} is {value!r}, and a LoRA's is {wanted}; copy it again")


def initialized(told: Mapping[str, Any]) -> str:
    """What a LoRA's factors began with, by its settings; '' where that is peft's usual."""
    begun = told.get("init_lora_weights")
    return begun.lower() if isinstance(begun, str) else ""


def require_same_use(adapter: Path, config: Any) -> None:
    """Refuse an adapter that was trained under a head that its base, of this `config`, does not have."""
    listing, task = Listing.of(adapter), task_of(config)
    wanted = HEADS.get(str(read_json(listing, ADAPTER).get("task_type")), task)
    if wanted != task:
        raise CheckpointError(
            f"{adapter}: the adapter is one for {wanted}, and its base is for {task}: the head is the adapter's own; merge it "
            "where its labels are known (AutoPeftModelFor....from_pretrained(..., num_labels=...).merge_and_unload()) and save that"
        )
    if MODULES in listing.sizes:
        raise CheckpointError(
            f"{adapter}: sentence-transformers saved this adapter, and its files say how vectors are made; call merge_and_unload() "
            "on the model that it opens, save that, and give its folder"
        )


@cache
def _kinds() -> tuple[str, ...]:
    """The kinds of adapters that peft knows, from its source: importing it would import torch."""
    found = find_spec("peft")
    path = Path(found.origin or "").with_name("utils") / "peft_types.py" if found else Path()
    listed = re.search(r"^class PeftType\b.*?(?=^class |\Z)", path.read_text(), re.M | re.S) if path.is_file() else None
    return tuple(re.findall(r'^    \w+ = "(\w+)"', listed[0], re.M)) if listed else ()


@dataclass(frozen=True)
class Factor:
    """One of the two that a LoRA adds the product of to the weight named `matrix`; the first is applied to the layer's inputs."""

    matrix: str
    first: bool
    rank: int
    channels: int


def factors(listing: Listing) -> dict[str, Factor | None]:
    """What each tensor of an adapter's safetensors is, by its name; None for what is no factor of two dimensions."""
    return {name: _factor(name, entry["shape"]) for name, entry in read_header(listing, ADAPTER_WEIGHTS[0]).items()}


def _factor(name: str, shape: list[int]) -> Factor | None:
    found = FACTOR.fullmatch(name)
    if found is None or len(shape) != 2:
        return None
    first = found["factor"] == "A"
    rank, channels = shape if first else reversed(shape)
    return Factor(f"{found['matrix']}.weight", first, rank, channels)


def require_factors(adapter: Path, shapes: Mapping[str, tuple[int, ...]] | None) -> None:
    """Refuse factors of a LoRA that are not of the matrices of its base, `shapes` by name, as far as both are told by headers."""
    require_factors_of(Listing.of(adapter), shapes or {})


def require_factors_of(listing: Listing, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The same of an adapter that lies anywhere; of its ranks alone where no shapes are known."""
    told, adapter = read_json(listing, ADAPTER), listing.where
    if ADAPTER_WEIGHTS[0] not in listing.sizes or told.get("peft_type") != LORA:
        return
    several = told.get("rank_pattern") or told.get("target_parameters")  # of those one factor is as wide as all experts' together
    fixed = None if several else told.get("r")
    for name, factor in factors(listing).items():
        if factor is None:
            continue
        shape = shapes.get(factor.matrix)
        if fixed is not None and factor.rank != fixed:
            raise CheckpointError(f"{adapter}: {name} is of rank {factor.rank}, and {ADAPTER} says {fixed}; copy both again")
        if shape is not None and len(shape) == 2 and factor.channels not in shape:
            raise CheckpointError(
                f"{adapter}: {name} is of {factor.channels} channels, and its base's matrix of {shape[0]} times {shape[1]}; they "
                "do not belong together: set checkpoint.base to the model that it was trained on"
            )


def _take_tokenizer(adapter: Path, out: Path) -> None:
    """The adapter's tokenizer in the place of the base's, under the model's own config.json."""
    for name in companions(Listing.of(out).sizes):
        if name != "generation_config.json":
            (out / name).unlink()
    copy_companions(adapter, out)
