"""Why llama.cpp does not serve a model: what of its configuration llama.cpp would compute otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from featherweight.model.architecture import task_of
from featherweight.model.parent import FEW
from featherweight.model.positions import head_width, rotary_kinds, rotary_switch, rotated_channels, sliding_window
from featherweight.runtimes.llama_cpp.architectures import ARCHITECTURES, Architecture
from featherweight.runtimes.llama_cpp.shapes import (
    CONVOLUTION,
    attention_scale,
    expert_width,
    experts,
    has_windows,
    inner_width,
    key_heads,
    window_period,
)
from featherweight.spec import HEADED

if TYPE_CHECKING:
    from featherweight.runtimes.candidate import Candidate

BLOCK = 32
"""Weights that share a scale in Q8_0 and Q4_0."""
OTHERS = "take another engine"
YARN = {"beta_fast": (None, 32), "beta_slow": (None, 1), "truncate": (None, True)}
"""What of YaRN's parameters it takes as given."""
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")
"""What configurations call it."""


def refusal(model: Candidate) -> str | None:
    """Why a model is not served, in one line; None where it is."""
    config, kind = model.config, model.facts.model_type
    if kind not in ARCHITECTURES:
        return f"no GGUF file is written here for {kind} models; {OTHERS}"
    known = ARCHITECTURES[kind]
    reason = _direction_refusal(config) or _activation_refusal(config, known) or _value_refusal(config, known)
    reason = reason or _head_refusal(config, known) or _layers_refusal(config, known)
    return reason or _rotary_refusal(model, known) or _window_refusal(model, known) or _heads_refusal(config, known)


def _direction_refusal(config: Any) -> str | None:
    if getattr(config, "is_causal", True):
        return None
    return f"llama.cpp's decoders see what stands before a token, and this model all of a text (is_causal false); {OTHERS}"


def _activation_refusal(config: Any, known: Architecture) -> str | None:
    told = next((one for name in ACTIVATIONS if (one := getattr(config, name, None))), known.activations[0])
    if told in known.activations:
        return None
    return f"llama.cpp computes {known.activations[0]} in {known.name} models, not {told}; {OTHERS}"


def _value_refusal(config: Any, known: Architecture) -> str | None:
    for name, computed in known.only.items():
        allowed = computed if isinstance(computed, tuple) else (computed,)
        told = _told(config, name, allowed[0])
        if told not in allowed:
            return f"llama.cpp's {known.name} computes with {name} {allowed[0]} alone, and this model's is {told}; {OTHERS}"
    return None


def _told(config: Any, name: str, default: Any) -> Any:
    """What a configuration says under a name, or one of its parts under a name behind a dot."""
    part, _, rest = name.partition(".")
    found = config.get(part, default) if isinstance(config, Mapping) else getattr(config, part, default)
    return _told(found, rest, default) if rest and found is not default else found


def _head_refusal(config: Any, known: Architecture) -> str | None:
    if (task := task_of(config)) in HEADED:
        none = f"llama.cpp's {known.name} wants a head of its own, and a model for {task} has none; {OTHERS}"
        return none if known.tied is False else None
    tied = bool(getattr(config, "tie_word_embeddings", False))
    if known.tied is None or tied == known.tied:
        return None
    reason = "wants a head of its own, and this model's is its embedding" if tied else "has no head but the embedding"
    return f"llama.cpp's {known.name} {reason}; {OTHERS}"


def _rotary_refusal(model: Candidate, known: Architecture) -> str | None:
    config = model.config
    if other := rotary_kinds(config) - {"default", *known.rotary}:
        return f"rotary embeddings of kind {min(other)} are not written for llama.cpp's {known.name}; {OTHERS}"
    told = getattr(config, "rope_parameters", None) or {}
    near, far = (told.get(name, {}) for name in ("sliding_attention", "full_attention"))
    if near and (near.get("rope_type") != "default" or (not known.bases and near["rope_theta"] != far["rope_theta"])):
        return f"llama.cpp's {known.name} rotates layers with a window as all others, this model otherwise; {OTHERS}"
    if unread := _other_yarn(config):
        return f"llama.cpp computes YaRN with {unread} {YARN[unread][-1]} alone, and this model's is another; {OTHERS}"
    switch = rotary_switch(config)
    if switch and model.max_tokens > switch:
        return (
            f"the rotary embeddings that are written are those of texts up to {switch} tokens, and {model.max_tokens} are to be "
            f"served; say max_tokens {switch}, or take another engine"
        )
    channels = rotated_channels(config)
    if channels != head_width(config) and not known.partial:
        return f"llama.cpp's {known.name} rotates whole heads, these in part; {OTHERS}"
    plain = getattr(config, "no_rope_layers", None) or []
    if known.unrotated and plain != [int((layer + 1) % known.unrotated != 0) for layer in range(len(plain))]:
        return f"llama.cpp's {known.name} leaves each {known.unrotated}th layer unrotated, this model others; {OTHERS}"
    return None


def _other_yarn(config: Any) -> str | None:
    """What a configuration says of YaRN that llama.cpp does not read; None where it says what is usual."""
    told = getattr(config, "rope_parameters", None) or {}
    told = told.get("full_attention", told)
    return next((name for name, usual in YARN.items() if told.get("rope_type") == "yarn" and told.get(name) not in usual), None)


def _window_refusal(model: Candidate, known: Architecture) -> str | None:
    config = model.config
    window, period = sliding_window(config), window_period(config)
    computed = has_windows(config, known)
    if computed and period is None:
        return f"llama.cpp's {known.name} has windows in all layers but each nth, this model in others; {OTHERS}"
    if computed and window is None and known.windows != "told":
        return f"llama.cpp's {known.name} has a sliding window in some layers, this model in none; {OTHERS}"
    if computed or window is None:
        return None
    if known.windows:
        return f"llama.cpp's {known.name} has a sliding window with {known.deep} layers alone, this one has others; {OTHERS}"
    if model.max_tokens <= window:
        return None
    return (
        f"llama.cpp does not compute {model.facts.model_type}'s sliding window of {window} tokens, and {model.max_tokens} are to "
        f"be served; say max_tokens {window}, or take another engine"
    )


def _layers_refusal(config: Any, known: Architecture) -> str | None:
    if known.convolves and set(config.layer_types) != {CONVOLUTION, "full_attention"}:
        return f"llama.cpp's {known.name} has layers that convolve and layers that attend, this model one kind; {OTHERS}"
    return None


def speculation_refusal(config: Any) -> str | None:
    """Why nothing can be drafted for a model: it writes no text, or what a convolution has read is not taken back."""
    if (task := task_of(config)) in HEADED:
        return f"speculation: a model for {task} writes no text that could be drafted; leave it out"
    if CONVOLUTION not in (getattr(config, "layer_types", None) or []):
        return None
    return "speculation: llama.cpp cannot take back drafted tokens that layers without attention have read; leave it out"


def _heads_refusal(config: Any, known: Architecture) -> str | None:
    width, heads = head_width(config) or 0, config.num_attention_heads
    if (channels := rotated_channels(config) or 0) % 2:
        return f"llama.cpp rotates pairs of channels, and these heads have {channels}; {OTHERS}"
    together = width * heads
    if known.square and together != config.hidden_size:
        return f"llama.cpp's {known.name} wants heads that are {config.hidden_size} wide together, these are {together}; {OTHERS}"
    if known.multi_head and key_heads(config) != heads:
        return f"llama.cpp's {known.name} wants as many key heads as heads, {heads}, these are {key_heads(config)}; {OTHERS}"
    if not known.query_norm and attention_scale(config, known.deep) != 1.0:
        return f"llama.cpp's {known.name} scales attention by the width of its heads, this model otherwise; {OTHERS}"
    layers = config.num_hidden_layers
    if known.normed and bool(getattr(config, "use_qk_norm", False)) != (layers >= known.normed):
        with_norms = "norms" if layers >= known.normed else "no norms"
        return f"llama.cpp's {known.name} with {layers} layers has {with_norms} of queries and keys, this model otherwise; {OTHERS}"
    return None


def experts_refusal(model: Candidate) -> str | None:
    """Why experts are not rounded to a grid here; None where there are few of their weights, or none."""
    if model.facts.experts <= FEW:
        return None
    return (
        f"{model.facts.experts:.0%} of the weights are experts', which nothing moves to a grid here; take precision q4_k or float16"
    )


def block_refusal(config: Any) -> str | None:
    """Why a model's matrices cannot be in blocks: rows are no multiple of them; None where all are."""
    sizes = {"hidden_size": config.hidden_size, "intermediate_size": inner_width(config)}
    sizes["the heads together"] = config.num_attention_heads * (head_width(config) or 0)
    if experts(config):
        sizes["intermediate_size"] = expert_width(config)
    odd = next((name for name, size in sizes.items() if size % BLOCK), None)
    return odd and f"Q8_0 and Q4_0 hold whole blocks of {BLOCK} weights, and {odd} is {sizes[odd]}; take precision float16"
