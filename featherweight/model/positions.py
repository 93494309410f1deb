"""How far a model reads: its context, and the lengths at which it begins to compute something else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")
"""Model types whose positions begin after their padding token's."""
UNBOUNDED = 2**31
"""The context of a model that names none, as T5 with its relative positions."""
EDGES = (
    "sliding_window",
    "window_size",
    "attention_window",
    "attention_window_size",
    "local_attention",
    "attention_chunk_size",
    "original_max_position_embeddings",
)
"""Where configurations say how far back a layer sees, or from where on rotary embeddings are scaled."""


def context_tokens(config: PreTrainedConfig) -> int:
    """Longest sequence that a model was made for. RoBERTa's positions begin after its padding token's.

    Of a model that makes embeddings, the longest text that its files say it reads.
    """
    config = config.get_text_config()
    longest = (getattr(config, "sentence_embedding", None) or {}).get("max_tokens") or UNBOUNDED
    return min(longest, _positions(config))


def _positions(config: PreTrainedConfig) -> int:
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or UNBOUNDED
    return positions - (config.pad_token_id or 0) - 1 if config.model_type in AFTER_PADDING else positions


def context_refusal(config: PreTrainedConfig, sequence: int, stage: str) -> str | None:
    """Why a stage does not take sequences that long: the model knows fewer positions; None where it does."""
    context = getattr(config, "max_position_embeddings", None)
    if context is None or sequence <= context:
        return None
    return f"{stage}.sequence {sequence} is longer than the model's context of {context}; lower it"


def edges(config: PreTrainedConfig) -> list[int]:
    """Lengths beyond which a layer no longer sees the beginning, or rotary embeddings are others; ascending.

    All that stand anywhere in the configuration, the nested rotary parameters of each kind of layer included.
    """
    return sorted(set(_edges(config.get_text_config().to_dict())))


def _edges(told: Mapping[str, Any]) -> Iterator[int]:
    for key, value in told.items():
        if isinstance(value, Mapping):
            yield from _edges(value)
        elif key in EDGES:
            yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int) and one > 1)


def head_width(config: PreTrainedConfig) -> int | None:
    """Channels of one attention head; None where the configuration does not say."""
    config = config.get_text_config()
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    return getattr(config, "head_dim", None) or (hidden // heads if heads and hidden else None)


def sliding_window(config: PreTrainedConfig) -> int | None:
    """How far back the layers see that see least; None where all see everything."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    everywhere = kinds is not None and "sliding_attention" not in kinds
    return None if everywhere else getattr(config, "sliding_window", None)


def rotary_kinds(config: PreTrainedConfig) -> set[str]:
    """The kinds of rotary embeddings, of every kind of layer: default, linear, dynamic, yarn, longrope, llama3 ..."""
    return {str(one["rope_type"]) for one in _rotary(config) if "rope_type" in one}


def rotates_by_layer(config: PreTrainedConfig) -> bool:
    """Whether layers of different kinds have rotary embeddings of their own."""
    return len(list(_rotary(config))) > 1


def rotated_channels(config: PreTrainedConfig) -> int | None:
    """How many channels of a head rotary embeddings turn, the first ones; None where the configuration does not say."""
    config, width = config.get_text_config(), head_width(config)
    shares = [one["partial_rotary_factor"] for one in _rotary(config) if one.get("partial_rotary_factor")]
    share = shares[0] if shares else getattr(config, "partial_rotary_factor", None)
    return int(width * share) if width and share else width


def rotary_switch(config: PreTrainedConfig) -> int | None:
    """The length beyond which the rotary embeddings of all positions are others (longrope, as in Phi-3); None for no such."""
    switches = (one["original_max_position_embeddings"] for one in _rotary(config) if one.get("rope_type") == "longrope")
    return next(map(int, switches), None)


def crosses_switch(config: PreTrainedConfig, prompt: int, new_tokens: int) -> bool:
    """Whether a text of `new_tokens` behind a prompt gets to where all its keys would have to be others.

    `generate` of transformers 5.17 forgets the prompt there, unless it keeps no keys.
    """
    switch = rotary_switch(config)
    return switch is not None and prompt <= switch < prompt + new_tokens


def _rotary(config: PreTrainedConfig) -> Iterator[Mapping[str, Any]]:
    """The rotary parameters of all layers, or of each kind of layer."""
    told = getattr(config.get_text_config(), "rope_parameters", None) or {}
    yield from (told, *(one for one in told.values() if isinstance(one, Mapping)))
