"""Which models Optimum exports, and of which it knows fusions: by its own lists, in its toolchain.

Nothing is refused where that is not installed.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from featherweight.model.architecture import attention_cap, task_of
from featherweight.model.positions import rotary_kinds
from featherweight.runtimes.known_models import Otherwise, otherwise_refusal
from featherweight.runtimes.refusals import answers_refusal
from featherweight.spec import HEADED
from featherweight.system.toolchains import text_of

REFUSED = {
    **dict.fromkeys(("flaubert", "xlm"), "adds to each word what it has learned of another, as token types that nobody gave"),
    "layoutlm": "reads the places of words on a page, which a text does not have",
    "longformer": "wants to be told which tokens all others see, which a text does not say",
    "qwen3_moe": "holds one expert's weights for all",
    "trocr": "writes no texts",
}
"""Of the types that it exports, those whose graph is none to serve from."""
OTHERWISE = {
    **{kind: Otherwise(f"Optimum's graph of a {kind} model {why}; take another engine") for kind, why in REFUSED.items()},
    "falcon": Otherwise(
        "Optimum cannot export a falcon of the new decoder architecture; take another engine",
        lambda config: getattr(config, "new_decoder_architecture", False),
    ),
    "phi": Otherwise(
        "Optimum cannot export a phi whose heads share their keys; take another engine",
        lambda config: getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads),
    ),
}
"""By model type what its graph has otherwise, or not at all."""
WITHOUT_TYPES = ("camembert", "roberta", "xlm-roberta")
"""Of them, those whose graph is told no token types: most checkpoints have one, and lose nothing."""
VECTORS = ("llama", "mistral", "qwen2", "qwen3")
"""Decoders whose graphs of vectors were tried; those of labels read one text at a time."""
EXPORTED, FUSED = "optimum/exporters/onnx/model_configs.py", "optimum/onnxruntime/utils.py"


def refusal(model_type: str, level: str | None) -> str | None:
    """Why a model is not exported, or not optimized to a level; None where it is, and where the lists cannot be read."""
    fused = names(FUSED, r'^        "([\w-]+)": "\w+",$')
    if _exported() and not is_exported(model_type):
        return f"Optimum does not export {model_type} models to ONNX; take another engine"
    if level and fused and _normal(model_type) not in fused:
        return f"Optimum knows no fusions for {model_type} models; say optimize: null"
    return None


def vectors_refusal(config: Any) -> str | None:
    """Why a decoder's answers are not those of its graph; None where they are, and for all that is no decoder that answers."""
    if task_of(config) == "feature-extraction" and config.model_type in VECTORS and getattr(config, "is_causal", True):
        return None
    return answers_refusal("Optimum", config)


def left_out_refusal(config: Any) -> str | None:
    """What the graph of an exported type has not: seen with optimum-onnx 0.1 and the transformers 4.57 of its toolchain."""
    kind = config.model_type
    if attention_cap(config):
        return f"Optimum's graphs leave out the soft cap on attention that this {kind} has; take another engine"
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return f"Optimum's graphs leave out that this {kind} scales attention by the number of the layer; take another engine"
    types = getattr(config, "type_vocab_size", None) or 1
    if kind in WITHOUT_TYPES and types > 1 and task_of(config) in HEADED:
        return f"Optimum's graph of a {kind} is told no token types, of which this one has {types}; take another engine"
    if reason := otherwise_refusal(OTHERWISE, kind, config):
        return reason
    heads = {getattr(config, name, None) for name in ("encoder_attention_heads", "decoder_attention_heads")}
    if getattr(config, "is_encoder_decoder", False) and None not in heads and len(heads) > 1:
        return f"Optimum cannot export a {kind} whose stacks differ in their heads; take another engine"
    if "longrope" in rotary_kinds(config):
        return f"Optimum's graphs have not this {kind}'s rotary embeddings (longrope); take another engine"
    return None


def is_exported(model_type: str) -> bool:
    """Whether Optimum says that it exports it."""
    return _normal(model_type) in _exported()


def _exported() -> frozenset[str]:
    return names(EXPORTED, r'register_tasks_manager_onnx\(\s*"([\w-]+)"')


@cache
def names(file: str, pattern: str) -> frozenset[str]:
    """Model types that a pattern finds in a file of Optimum's."""
    return frozenset(map(_normal, re.findall(pattern, text_of("optimum", file), re.MULTILINE)))


def _normal(model_type: str) -> str:
    return model_type.replace("_", "-")
