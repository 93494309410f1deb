"""Channels that can be scaled against each other without changing what a model computes, for AWQ and SmoothQuant.

What one module puts out is divided by what its readers' weights are multiplied with, so nothing else may read it. The norms of
a post-norm block feed the residual too, and so have no pair here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from featherweight.model.architecture import Block, blocks

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


Found = tuple["nn.Module | None", tuple["nn.Module", ...]]
"""A module, or None where there is none that can be scaled, and what reads it."""


@dataclass(frozen=True)
class Pair:
    """Names of a module and of the matrices that are all that reads it."""

    source: str
    readers: list[str]


def norm_pairs(model: PreTrainedModel) -> list[Pair]:
    """Norms and what reads them. Keys and values of a cross-attention read the encoder, not the norm before it."""
    found: list[Found] = []
    for block in blocks(model):
        for place, one in enumerate(block.attentions):
            found.append((one.norm, (one.q,) if place else (one.q, one.k, one.v)))
        found.append((block.feed_forward.norm, block.feed_forward.inputs))
    return _named(model, found)


def inner_pairs(model: PreTrainedModel) -> list[Pair]:
    """Values and the attention's output, where each value has one reader; what is proportional in an MLP, and its output."""
    return _named(model, [pair for block in blocks(model) for pair in _inside(block)])


def _inside(block: Block) -> list[Found]:
    attentions: list[Found] = [(one.v if one.heads == one.kv_heads else None, (one.o,)) for one in block.attentions]
    return [*attentions, (block.feed_forward.proportional, (block.feed_forward.output,))]


def _named(model: PreTrainedModel, found: list[Found]) -> list[Pair]:
    names = {module: name for name, module in model.named_modules()}
    return [Pair(names[source], [names[one] for one in readers]) for source, readers in found if source is not None]
