"""LLM-Pruner's structural pruning of whole key/value groups of attention heads and of MLP channels.

Ma, Fang, Wang: "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023. Weights that depend on one
another (a group's rows of q, k and v and its columns of o; a channel's rows of gate and up and its column of down) are scored
and cut together. Every layer of a stack gets the same shape, which is what transformers, vLLM and CTranslate2 load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from featherweight.checkpoint import opening
from featherweight.errors import RecipeError
from featherweight.model import surgery
from featherweight.model.architecture import Attention, FeedForward, Role, Stack, dimensions, stacks
from featherweight.model.facts import CheckpointFacts
from featherweight.pruning.counts import kept_channels, kept_groups, nearest
from featherweight.pruning.importance import Group, Member, importance, keep_best
from featherweight.pruning.interface import Pruned, Pruner, PruningInput
from featherweight.pruning.spec import Criterion, PruneSpec
from featherweight.spec import ModelSize, Share

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """What every layer of a stack keeps."""

    role: Role
    kv_heads: int
    channels: int


@dataclass(frozen=True)
class Part:
    """A dependency group of a stack, and where it is cut: one or more attentions, or one feed-forward network."""

    role: Role
    group: Group
    attentions: tuple[Attention, ...] = ()
    feed_forward: FeedForward | None = None


class StructuredSpec(PruneSpec):
    """LLM-Pruner's cut of attention groups and MLP channels by `ratio`.

    attention: heads too; auto: where a config can have a number of heads that its hidden size does not follow from.
    scope: global ranks the MLP channels of all layers together, which CTranslate2 alone serves at a gain.
    """

    method: Literal["structured"] = "structured"
    criterion: Criterion = "param_first"
    ratio: Share = 0.25
    scope: Literal["uniform", "global"] = "uniform"
    attention: bool | Literal["auto"] = "auto"
    mlp: bool = True

    @property
    def uneven(self) -> bool:
        return self.scope == "global"

    def left(self, size: ModelSize) -> ModelSize:
        """Heads that only the configuration tells of (auto) count as kept."""
        share = 1 - self.ratio
        return size.kept(channels=share if self.mlp else 1.0, heads=share if self.attention is True else 1.0)

    @model_validator(mode="after")
    def _channels_to_rank(self) -> Self:
        if self.scope == "global" and not self.mlp:
            raise ValueError("scope global ranks MLP channels: it wants mlp")
        return self


def prune(given: PruningInput[StructuredSpec]) -> Pruned:
    """Cut every layer by `spec.ratio`. Metrics of its own: `kv_heads`, `intermediate_size` (the decoder's, where there are two).

    Where channels are ranked across layers, a layer that keeps fewer than the widest has zeros in their place (see
    featherweight.padding), and the metrics `channels_least`, `channels_mean` and `padding` (such zeros) say so.
    Raises RecipeError for a ratio, heads or layers that no engine could load, StageError for an architecture it cannot cut.
    """
    shapes = target_shapes(given.spec, given.config)
    pruned_config(given.config, shapes)
    if given.spec.attention == "auto" and not _free_heads(given.config):
        given.progress.note(f"all heads stay: the config of a {given.config.model_type} cannot say that there are fewer")
    before = opening.parameters(given.model)
    found = parts(given.model)
    scores, loss = importance(
        given.model, [part.group for part in found], given.spec.criterion, given.blocks, given.seed, given.progress
    )
    metrics: dict[str, float] = {}
    if given.spec.scope == "global":
        shapes, metrics = level(found, scores, shapes, given.config)
    cut(found, scores, shapes)
    model = surgery.with_config(given.model, pruned_config(given.config, shapes))
    return Pruned(model, before, loss, metrics | {"kv_heads": shapes[-1].kv_heads, "intermediate_size": shapes[-1].channels})


def target_shapes(spec: StructuredSpec, config: PreTrainedConfig) -> tuple[Shape, ...]:
    """What the layers of each stack keep at `spec.ratio`; RecipeError where nothing would go, or nothing could load it."""
    sizes = dimensions(config)
    heads = cuts_heads(spec, config)
    shapes = tuple(
        Shape(
            size.role,
            kept_groups(size.kv_heads, size.head_dim, spec.ratio) if heads else size.kv_heads,
            kept_channels(size.channels, spec.ratio) if spec.mlp else size.channels,
        )
        for size in sizes
    )
    if shapes == tuple(Shape(size.role, size.kv_heads, size.channels) for size in sizes):
        raise RecipeError(
            f"prune.ratio {spec.ratio} removes nothing from {sizes[0].kv_heads} key/value groups (attention: {heads}) and "
            f"{sizes[0].channels} MLP channels (mlp: {spec.mlp}); raise the ratio"
        )
    return shapes


def cuts_heads(spec: StructuredSpec, config: PreTrainedConfig) -> bool:
    """Whether heads are to go. RecipeError where the recipe wants it and transformers could not load the result."""
    if spec.attention is True and not _free_heads(config):
        raise RecipeError(
            f"prune.attention: in a {config.model_type} the heads times their width are the hidden size, and its config cannot "
            "say otherwise; set prune.attention to false, or to auto"
        )
    return _free_heads(config) and bool(spec.attention)


def _free_heads(config: PreTrainedConfig) -> bool:
    return all(size.free_heads for size in dimensions(config))


def pruned_config(config: PreTrainedConfig, shapes: Sequence[Shape]) -> PreTrainedConfig:
    """The config of `config`'s model cut to `shapes`."""
    return surgery.resized_config(config, pruned_sizes(config, shapes))


def pruned_sizes(config: PreTrainedConfig, shapes: Sequence[Shape]) -> dict[str, int]:
    """The keys of the config that change where its model is cut to `shapes`."""
    values: dict[str, int] = {}
    for size, shape in zip(dimensions(config), shapes, strict=True):
        values[size.channels_key] = shape.channels
        if size.free_heads:
            values[size.heads_key] = shape.kv_heads * (size.heads // size.kv_heads)
        if hasattr(config, "num_key_value_heads"):
            values |= {"num_key_value_heads": shape.kv_heads, "head_dim": size.head_dim}
    return values


def parts(model: PreTrainedModel) -> list[Part]:
    """Every dependency group of a model, by stacks and blocks: a block's attentions, then its feed-forward network.

    Self-attentions that share one relative position bias (T5's) are one group for their whole stack, and come first.
    """
    return [part for stack in stacks(model) for part in _stack_parts(stack)]


def _stack_parts(stack: Stack) -> Iterator[Part]:
    shared = tuple(block.attentions[0] for block in stack.blocks if surgery.position_bias(stack.blocks[0].attentions[0]))
    if shared:
        yield Part(stack.role, attention_group(shared), shared)
    for block in stack.blocks:
        for attention in block.attentions[1 if shared else 0 :]:
            yield Part(stack.role, attention_group((attention,)), (attention,))
        yield Part(stack.role, mlp_group(block.feed_forward), feed_forward=block.feed_forward)


def attention_group(attentions: tuple[Attention, ...]) -> Group:
    """The weights that belong to the key/value groups of attentions that must keep the same ones, query heads included."""
    members = [
        Member(linear, dim)
        for attention in attentions
        for linear, dim in ((attention.q, 0), (attention.k, 0), (attention.v, 0), (attention.o, 1))
    ]
    return Group(tuple(members), attentions[0].kv_heads)


def mlp_group(feed_forward: FeedForward) -> Group:
    """The weights that share the hidden channels of a feed-forward network."""
    rows = tuple(Member(linear, 0) for linear in feed_forward.inputs)
    return Group((*rows, Member(feed_forward.output, 1)), feed_forward.output.in_features)


def cut(found: Sequence[Part], scores: Sequence[Tensor], shapes: Sequence[Shape]) -> None:
    """Cut the layers in place down to `shapes`, keeping the best. The model's config stays as it was."""
    by_role = {shape.role: shape for shape in shapes}
    for part, score in zip(found, scores, strict=True):
        shape = by_role[part.role]
        for attention in part.attentions:
            surgery.keep_attention_groups(attention, keep_best(score, shape.kv_heads))
        if part.feed_forward is not None:
            surgery.keep_channels(part.feed_forward, keep_best(score, shape.channels))


def level(
    found: Sequence[Part], scores: Sequence[Tensor], shapes: Sequence[Shape], config: PreTrainedConfig
) -> tuple[tuple[Shape, ...], dict[str, float]]:
    """Rank the MLP channels of all layers together, set the losers to zero, and give the stacks their widest layer's width.

    As many channels are to stay as under `shapes`. Returns the new shapes and metrics.
    """
    networks = [
        (part.role, part.feed_forward, score) for part, score in zip(found, scores, strict=True) if part.feed_forward is not None
    ]
    kept = kept_across([score for *_, score in networks], sum(_channels(shapes)[role] for role, *_ in networks))
    for (_, feed_forward, score), count in zip(networks, kept, strict=True):
        surgery.silence_channels(feed_forward, keep_best(score, count))
    keys = {size.role: size.channels_key for size in dimensions(config)}  # T5 has one width for both of its stacks
    widest = dict[str, int]()
    for (role, *_), count in zip(networks, kept, strict=True):
        widest[keys[role]] = max(count, widest.get(keys[role], 0))
    padding = sum(widest[keys[role]] - count for (role, *_), count in zip(networks, kept, strict=True))
    metrics = {"channels_least": min(kept), "channels_mean": sum(kept) / len(kept), "padding": padding}
    return tuple(replace(shape, channels=widest[keys[shape.role]]) for shape in shapes), metrics


def _channels(shapes: Sequence[Shape]) -> dict[Role, int]:
    return {shape.role: shape.channels for shape in shapes}


def kept_across(scores: Sequence[Tensor], wanted: int) -> list[int]:
    """How many of each layer's units are among the best `wanted` of all, moved to the nearest multiple that kernels like."""
    import torch

    threshold = torch.cat(list(scores)).sort(descending=True).values[wanted - 1]
    return [nearest(int((score >= threshold).sum()), len(score)) for score in scores]


def check(spec: StructuredSpec, facts: CheckpointFacts) -> None:
    """Raise RecipeError where nothing would go or nothing could load the result, StageError for a model that it cannot cut."""
    surgery.require_resizable(facts.config, pruned_sizes(facts.config, target_shapes(spec, facts.config)))


STRUCTURED = Pruner(StructuredSpec, prune, ("torch-pruning",), check=check)
