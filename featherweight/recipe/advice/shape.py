"""How large a model is where it counts: what it holds, what a token makes it read and compute, what its cache takes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Any

from featherweight.model.architecture import Family, family_of
from featherweight.model.facts import CheckpointFacts
from featherweight.model.positions import sliding_window

_ENCODER = re.compile(r"(^|\.)encoder\.")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Shape:
    """Numbers of weights: body (of the blocks), head (of the output, or the table that it shares), table (rows that are looked up).

    encoder: the share of the body that reads the source once. experts: the share of the body that is experts', active: of whom a
    token asks so many. kv: numbers of keys and values of one position. window: how far back every layer looks at most.
    """

    family: Family
    body: float
    head: float
    table: float
    layers: int
    hidden: int
    vocabulary: int
    kv: int
    encoder: float = 0.0
    experts: float = 0.0
    active: float = 1.0
    window: int | None = None

    @classmethod
    def of(cls, facts: CheckpointFacts) -> Shape:
        """By the headers of the weights where they tell, else by the configuration."""
        config = facts.config.get_text_config()
        family = family_of(facts.config)
        hidden, vocabulary = _number(config, "hidden_size", "d_model", "dim"), _number(config, "vocab_size")
        matrix = hidden * vocabulary
        tied = bool(getattr(config, "tie_word_embeddings", True)) or family == "encoder"
        every = facts.size.parameters
        head, table = (0, matrix) if family == "encoder" else (matrix, 0 if tied else matrix)
        body = max(every - head - table, every // 10)  # headers that tell of no vocabulary, or of half a model
        return cls(
            family,
            body,
            head,
            table,
            _layers(config),
            hidden,
            vocabulary,
            _cache_numbers(config, hidden),
            _encoder_share(facts, body),
            facts.experts * every / body if body else 0.0,
            _active(config),
            sliding_window(facts.config) if _slides_everywhere(config) else None,
        )

    @property
    def weights(self) -> float:
        """All of them."""
        return self.body + self.head + self.table

    @property
    def decoder(self) -> float:
        """Of the body, what every generated token reads, all experts."""
        return self.body * (1 - self.encoder)

    def read(self, sequences: int) -> float:
        """The share of the body that one step of so many sequences reads: of the experts, those that any of them asks for."""
        asked = 1 - (1 - self.active) ** sequences
        return 1 - self.experts * (1 - asked)

    @property
    def computed(self) -> float:
        """The share of the body that a token is multiplied with."""
        return 1 - self.experts * (1 - self.active)

    def cached(self, tokens: int) -> int:
        """Positions of which keys and values are kept."""
        return min(tokens, self.window or tokens)


def _number(config: Any, *names: str) -> int:
    return int(next((value for name in names if (value := getattr(config, name, None))), 0))


def _layers(config: Any) -> int:
    """Of the stack that writes; of an encoder, its only one."""
    return _number(config, "num_decoder_layers", "decoder_layers", "num_hidden_layers", "num_layers", "n_layers")


def _cache_numbers(config: Any, hidden: int) -> int:
    """Keys and values of one position in all layers."""
    heads = _number(config, "decoder_attention_heads", "num_attention_heads", "num_heads", "n_heads")
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = _number(config, "head_dim", "d_kv") or (hidden // heads if heads else 0)
    return 2 * _layers(config) * kv_heads * head_dim


def _encoder_share(facts: CheckpointFacts, body: float) -> float:
    """Of an encoder-decoder's body; a half where the headers do not tell."""
    if family_of(facts.config) != "seq2seq":
        return 0.0
    if not facts.shapes or not body:
        return 0.5
    return min(1.0, sum(prod(shape) for name, shape in facts.shapes.items() if _ENCODER.search(name)) / body)


def _active(config: Any) -> float:
    experts, asked = _number(config, *_EXPERTS), _number(config, "num_experts_per_tok")
    return asked / experts if experts and asked else 1.0


def _slides_everywhere(config: Any) -> bool:
    """Whether no layer looks further back than its window."""
    kinds = getattr(config, "layer_types", None)
    return kinds is None or all(kind == "sliding_attention" for kind in kinds)
