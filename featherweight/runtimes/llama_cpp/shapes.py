"""The sizes of a model by whatever name its configuration has them, and how its layers differ."""

from __future__ import annotations

from typing import Any

from featherweight.model.positions import head_width, sliding_window
from featherweight.runtimes.llama_cpp.architectures import Architecture

INNER = ("n_inner", "ffn_hidden_size", "intermediate_size")
"""What the width inside the feed-forward network is called; what a model type has no name for may stand in a file all the same."""
EPSILONS = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
CONVOLUTION = "conv"
"""What layers without attention are called."""
EPSILON = 1e-5
"""Of norms whose configuration names none (OLMo's)."""


def inner_width(config: Any) -> int:
    """Channels inside the feed-forward network; four times the model's width where the configuration names none."""
    named = (getattr(config, name) for name in INNER if hasattr(config, name))
    width = int(next(named, None) or 4 * config.hidden_size)
    return _adjusted(config, width) if getattr(config, "block_auto_adjust_ff_dim", False) else width


def _adjusted(config: Any, width: int) -> int:
    """What LFM2 makes of the width that it names: two thirds, times a factor, in whole multiples."""
    width, factor, unit = int(2 * width / 3), config.block_ffn_dim_multiplier, config.block_multiple_of
    return width if factor is None else -(-int(factor * width) // unit) * unit


def key_heads(config: Any) -> int:
    """How many heads keys and values have."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    named = (getattr(config, name, None) for name in ("num_key_value_heads", "num_kv_heads"))
    return next((int(one) for one in named if one), int(config.num_attention_heads))


def experts(config: Any) -> int:
    """How many experts a layer has; 0 where it is dense."""
    return int(getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0)


def expert_width(config: Any) -> int:
    """Channels inside each expert."""
    return int(getattr(config, "moe_intermediate_size", None) or inner_width(config))


def attention_scale(config: Any, deep: int) -> float:
    """How many times larger the model's scale of attention is than llama.cpp's, which with `deep` layers is another."""
    wanted = getattr(config, "query_pre_attn_scalar", None)
    if wanted is None:
        return 1.0
    own = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == deep else head_width(config) or 1
    return float((own / wanted) ** 0.5)


def has_windows(config: Any, known: Architecture) -> bool:
    """Whether llama.cpp computes a sliding window in some layers of a model, where the file tells it of one."""
    return known.windows in ("always", "told") or (known.windows == "deep" and config.num_hidden_layers == known.deep)


def window_period(config: Any) -> int | None:
    """Each layer of so many sees everything, the others have a window; None where they do not alternate so.

    Of more layers than there are, where all have one; 1 where none has.
    """
    count = int(config.num_hidden_layers)
    if sliding_window(config) is None:
        return 1
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * count
    limited = [kind == "sliding_attention" for kind in kinds]
    period = limited.index(False) + 1 if False in limited else count + 1
    return period if limited == [(layer + 1) % period != 0 for layer in range(count)] else None
