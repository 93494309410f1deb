"""What vLLM's modules leave out of a model type, or end with an error at: by the files of its release 0.32, and by running them."""

from __future__ import annotations

import math
from typing import Any

from featherweight.model.decoding import other_layers
from featherweight.model.positions import rotary_switch, sliding_window
from featherweight.runtimes.known_models import Otherwise, otherwise_refusal
from featherweight.runtimes.refusals import SILU, activation_refusal
from featherweight.runtimes.vllm.installed import modules_by_architecture
from featherweight.system.toolchains import text_of

ONE_ACTIVATION = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), SILU)
"""The activations of model types whose modules end with an error at any other."""
LEFT_OUT = {
    "gpt2": ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"),
    "stablelm": ("qk_layernorm", "use_parallel_residual"),
}
"""What a module knows nothing of, or asserts to be off."""


WANTED = {
    "afmoe": ("score_func",),
    "glm4_moe": ("head_dim",),
    "glm4_moe_lite": ("first_k_dense_replace",),
    "gpt_oss": ("beta_fast", "beta_slow", "original_max_position_embeddings"),
    "hy_v3": ("first_k_dense_replace",),
    "lfm2": ("block_dim",),
    "mimo_v2_flash": ("hybrid_layer_pattern",),
    "minimax_m2": ("rotary_dim",),
}
"""What a module ends with an error without, in config.json or in its rope_parameters; transformers does without."""


BACKENDS = ("_supports_attention_backend = True", "ALL_ATTENTION_FUNCTIONS.get_interface(")
"""What stands in transformers' module of a model that vLLM runs without one of its own: either will do."""
NOT_TAKEN_OVER = ("aria_text", "blt", "cohere_compass_text", "diffllama", "jetmoe", "minimax", "modernbert-decoder", "phimoe")
"""Model types that say so, and that vLLM cannot take over: whose attention is computed by the module itself in some layer, for
several modules of one layer, over keys that are repeated for each expert, or with rotary embeddings along three axes; whose head
has a name of its own, whose router says other things than the rest, or that name the count of experts otherwise (moe_topk)."""


def unknown_refusal(kind: str, config: Any) -> str | None:
    """Why no module serves a model of type `kind`, neither vLLM's own nor transformers'; None where one does.

    Of transformers' it takes over attention alone. Nothing is refused where vLLM's toolchain is not installed.
    """
    known, named = modules_by_architecture(), getattr(config, "architectures", None) or ()
    if not known or not named or any(name in known for name in named):
        return None
    module = _module(kind)
    source = text_of("vllm", f"transformers/models/{module}/modeling_{module}.py")
    taken_over = any(one in source for one in BACKENDS) and kind not in NOT_TAKEN_OVER and not other_layers(config)
    served = taken_over or not source
    return None if served else f"vLLM has no module for {kind} models; take another engine"


def _module(kind: str) -> str:
    """transformers' name for the module of a model type."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    return str(model_type_to_module_name(kind))


def _mixed_windows(config: Any) -> bool:
    return len(set(getattr(config, "layer_types", None) or ())) > 1


OTHERWISE = {
    "dbrx": Otherwise("vLLM's dbrx ends with an error while it loads its experts; take another engine"),
    "deepseek_v3": Otherwise(
        "vLLM finds a deepseek_v3's experts by topk_method: noaux_tc; say so in its config.json, or take another engine",
        lambda config: getattr(config, "topk_method", None) != "noaux_tc",
    ),
    "falcon": Otherwise(
        "vLLM's falcon takes no ffn_hidden_size but four times its width, not {config.ffn_hidden_size}; take another engine",
        lambda config: getattr(config, "ffn_hidden_size", None) not in (None, 4 * config.hidden_size),
    ),
    "hrm_text": Otherwise(
        "vLLM's hrm_text reads a prompt in both directions, and transformers from left to right; take another engine"
    ),
    "mamba2": Otherwise(
        "vLLM norms a mamba2's states in {config.n_groups} groups, and transformers as a whole; take another engine",
        lambda config: getattr(config, "n_groups", 1) > 1,
    ),
    **dict.fromkeys(
        ("qwen2", "qwen3"),
        Otherwise("vLLM's {kind} has a sliding window in all layers or in none; take another engine", _mixed_windows),
    ),
}
"""By model type what the module does otherwise; what it leaves out or wants stands above."""


def left_out_refusal(kind: str, config: Any, tokens: int) -> str | None:
    """Why a model of type `kind` is not served as transformers computes it, over texts of up to `tokens`; None where it is."""
    return (
        activation_refusal("vLLM", config, kind, ONE_ACTIVATION)
        or _keys_refusal(kind, config)
        or otherwise_refusal(OTHERWISE, kind, config)
        or _window_refusal(kind, config, tokens)
        or _longrope_refusal(kind, config, tokens)
    )


def _keys_refusal(kind: str, config: Any) -> str | None:
    """By LEFT_OUT and WANTED."""
    if other := next((key for key in LEFT_OUT.get(kind, ()) if getattr(config, key, False)), None):
        return f"vLLM's {kind} knows no {other}; take another engine"
    rotary = getattr(config, "rope_parameters", None) or {}
    if missing := [key for key in WANTED.get(kind, ()) if rotary.get(key, getattr(config, key, None)) is None]:
        return f"vLLM's {kind} wants {' and '.join(missing)} in config.json; say it there, or take another engine"
    return None


def float_refusal(kind: str, compute_type: str) -> str | None:
    """Why a model type is not served in float32, which some activation of its module does not keep."""
    if kind != "apertus" or compute_type != "float32":
        return None
    return "vLLM rounds the activation of an apertus (xIELU) to bfloat16; take compute_type: bfloat16, or another engine"


def _window_refusal(kind: str, config: Any, tokens: int) -> str | None:
    window = sliding_window(config)
    if kind not in ("cohere2", "cohere2_moe") or window is None or tokens <= window:
        return None
    return f"vLLM's {kind} sees one token beyond its window of {window}; serve at most {window}, or take another engine"


def _longrope_refusal(kind: str, config: Any, tokens: int) -> str | None:
    """Its longrope takes the factors of long texts for all, where it serves any, and scales attention by the context alone."""
    switch = rotary_switch(config)
    if switch is None:
        return None
    if tokens > switch:
        return (
            f"vLLM rotates all texts of a {kind} as those beyond {switch} tokens (longrope) where it serves up to {tokens}; "
            f"serve at most {switch}, or take another engine"
        )
    stretch = config.max_position_embeddings / switch
    told = {"factor": stretch} | {key: value for key, value in config.rope_parameters.items() if value is not None}
    if "short_mscale" in told:  # which it reads
        return None
    theirs, right = _attention_factor(stretch, switch), told.get("attention_factor", _attention_factor(told["factor"], switch))
    if math.isclose(theirs, right, rel_tol=1e-6):
        return None
    return f"vLLM scales this {kind}'s rotary embeddings (longrope) by {theirs:.4g}, not by {right:.4g}; take another engine"


def _attention_factor(stretch: float, original: int) -> float:
    """By how much longrope scales cosines and sines (LongRoPE, arXiv:2402.13753, section 3), where nothing else is told."""
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
