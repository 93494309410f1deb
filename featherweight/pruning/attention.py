"""Multi-head attention to grouped-query or multi-query attention: the key and value heads of each group become their mean.

Ainslie et al.: "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", EMNLP 2023. The uptraining
is the recovery training after this stage. Every query head stays; the KV cache shrinks with the heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from featherweight.checkpoint import opening
from featherweight.errors import RecipeError, StageError
from featherweight.model import surgery
from featherweight.model.architecture import Attention, blocks, dimensions
from featherweight.model.facts import CheckpointFacts
from featherweight.pruning.interface import Pruned, Pruner, PruningInput
from featherweight.pruning.spec import PruneSpec
from featherweight.spec import Positive

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig


class AttentionSpec(PruneSpec):
    """Key/value heads pooled to `kv_heads` (1: multi-query), all query heads stay."""

    method: Literal["attention"] = "attention"
    kv_heads: Positive | None = None

    @model_validator(mode="after")
    def _heads_are_said(self) -> Self:
        if self.kv_heads is None:
            raise ValueError("method attention wants kv_heads: how many key/value heads are to be left (1: multi-query)")
        return self


def prune(given: PruningInput[AttentionSpec]) -> Pruned:
    """Pool every layer's key/value heads to `spec.kv_heads`. A metric of its own: `kv_heads`.

    Raises StageError where the config cannot say how many heads share a key, RecipeError where the heads do not divide.
    """
    wanted = target_heads(given.spec.kv_heads, given.config)
    before, loss = opening.parameters(given.model), given.loss()
    for block in blocks(given.model):
        for attention in block.attentions:
            pool(attention, wanted)
    config = surgery.resized_config(given.config, {"num_key_value_heads": wanted})
    return Pruned(surgery.with_config(given.model, config), before, loss, {"kv_heads": wanted})


def target_heads(wanted: int | None, config: PreTrainedConfig) -> int:
    """The key/value heads to be left, checked by the config alone."""
    heads = getattr(config, "num_key_value_heads", None)
    if heads is None:
        raise StageError(
            f"prune.method attention: the config of a {config.model_type} has no num_key_value_heads, its query heads cannot "
            "share keys; leave the stage out for it"
        )
    if wanted is None or wanted >= heads or heads % wanted:
        fitting = ", ".join(str(count) for count in range(1, heads) if heads % count == 0)
        raise RecipeError(f"prune.kv_heads {wanted}: the model has {heads} key/value heads; give one of {fitting or 'none'}")
    return wanted


def pool(attention: Attention, wanted: int) -> None:
    """Replace the key and value heads of an attention by the means of `wanted` equal groups of neighbours, biases too."""
    for linear in (attention.k, attention.v):
        surgery.replace_weight(linear, pooled(linear.weight, wanted, attention.head_dim))
        if linear.bias is not None:
            surgery.replace_bias(linear, pooled(linear.bias, wanted, attention.head_dim))


def pooled(rows: Tensor, wanted: int, head_dim: int) -> Tensor:
    """[heads * head_dim, ...] -> [wanted * head_dim, ...]: the mean over each group of heads, channel by channel."""
    heads = len(rows) // head_dim
    return rows.view(wanted, heads // wanted, head_dim, *rows.shape[1:]).mean(1).flatten(0, 1)


def check(spec: AttentionSpec, facts: CheckpointFacts) -> None:
    """Raise RecipeError for heads that do not divide, StageError for a model whose heads cannot share keys."""
    dimensions(facts.config)
    target_heads(spec.kv_heads, facts.config)


ATTENTION = Pruner(AttentionSpec, prune, check=check)
