"""What a GGUF file says of a model, so that llama.cpp builds the graph that transformers computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from featherweight.model.positions import context_tokens, head_width, rotary_kinds, rotary_switch, rotated_channels, sliding_window
from featherweight.runtimes.llama_cpp.answers import pooling
from featherweight.runtimes.llama_cpp.architectures import ARCHITECTURES, Architecture
from featherweight.runtimes.llama_cpp.shapes import (
    CONVOLUTION,
    EPSILON,
    EPSILONS,
    expert_width,
    experts,
    has_windows,
    inner_width,
    key_heads,
    window_period,
)

if TYPE_CHECKING:
    from gguf import GGUFWriter

LONGEST = 2**30
"""The context of a model that names none."""
UNCAPPED = 2.0**20
"""A cap of logits that changes none by as much as float32 tells apart."""


def describe(writer: GGUFWriter, config: Any) -> None:
    """The keys by which llama.cpp builds a model."""
    from gguf import PoolingType

    known = ARCHITECTURES[config.model_type]
    _add_sizes(writer, config, known)
    _add_rotary(writer, config)
    _add_windows(writer, config, known)
    for name, method in known.keys.items():
        value = getattr(config, name, None)
        getattr(writer, method)(UNCAPPED if value is None else value)
    if attention := getattr(config, "attn_config", None):
        writer.add_max_alibi_bias(attention.alibi_bias_max)
        writer.add_clamp_kqv(attention.clip_qkv or 0.0)
    if pooled := pooling(config):
        writer.add_pooling_type(PoolingType[pooled])
    if hasattr(config, "use_parallel_residual"):
        writer.add_parallel_residual(config.use_parallel_residual)


def _add_sizes(writer: GGUFWriter, config: Any, known: Architecture) -> None:
    writer.add_context_length(_context(config, known))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner_width(config))
    writer.add_head_count(config.num_attention_heads)
    kinds = getattr(config, "layer_types", None) or []
    writer.add_head_count_kv(
        [key_heads(config) * (kind != CONVOLUTION) for kind in kinds] if CONVOLUTION in kinds else key_heads(config)
    )
    writer.add_vocab_size(config.vocab_size)
    for add in (writer.add_key_length, writer.add_value_length):
        add(head_width(config) or 0)
    if epsilon := getattr(config, "rms_norm_eps", None):
        writer.add_layer_norm_rms_eps(epsilon)
    else:
        writer.add_layer_norm_eps(next((getattr(config, name) for name in EPSILONS if hasattr(config, name)), EPSILON))
    if shared := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(shared)
    if count := experts(config):
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(expert_width(config))


def _add_rotary(writer: GGUFWriter, config: Any) -> None:
    from gguf import RopeScalingType
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    told = getattr(config, "rope_parameters", None)
    if not told:
        return
    everywhere = told.get("full_attention", told)
    writer.add_rope_dimension_count(rotated_channels(config) or 0)
    writer.add_rope_freq_base(everywhere["rope_theta"])
    if local := told.get("sliding_attention"):
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if "linear" in rotary_kinds(config):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(everywhere["factor"])
    if everywhere.get("rope_type") == "yarn":
        _add_yarn(writer, config, everywhere)
    if "longrope" in rotary_kinds(config):
        writer.add_rope_scaling_attn_factors(ROPE_INIT_FUNCTIONS["longrope"](config)[1])


def _add_yarn(writer: GGUFWriter, config: Any, told: Mapping[str, Any]) -> None:
    """llama.cpp scales attention by what YaRN's paper does; the file says what more or less the model wants."""
    from gguf import RopeScalingType
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    layers = {"layer_type": "full_attention"} if "full_attention" in config.rope_parameters else {}
    _, wanted = ROPE_INIT_FUNCTIONS["yarn"](config, **layers)
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(told["factor"])
    writer.add_rope_scaling_orig_ctx_len(told.get("original_max_position_embeddings") or config.max_position_embeddings)
    writer.add_rope_scaling_attn_factors(wanted / (0.1 * math.log(told["factor"]) + 1))


def _context(config: Any, known: Architecture) -> int:
    """So many tokens llama.cpp computes as the model does: up to where its rotary embeddings change, or a window that it lacks."""
    window = None if has_windows(config, known) else sliding_window(config)
    return min(rotary_switch(config) or context_tokens(config), window or LONGEST, LONGEST)


def _add_windows(writer: GGUFWriter, config: Any, known: Architecture) -> None:
    window, period = sliding_window(config), window_period(config)
    if window and period and has_windows(config, known):
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern(period)
