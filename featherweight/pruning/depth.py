"""Depth pruning: whole layers go, those that change their input least.

Men et al.: "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024. A layer's block influence is
1 - the mean cosine of the hidden states before and behind it. All layers are judged at once, each stack by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from featherweight.checkpoint import opening
from featherweight.errors import RecipeError
from featherweight.model import surgery
from featherweight.model.architecture import Role, Stack, dimensions, stacks
from featherweight.model.facts import CheckpointFacts
from featherweight.pruning.block_influence import block_influence, most_influential
from featherweight.pruning.interface import Pruned, Pruner, PruningInput
from featherweight.pruning.spec import PruneSpec
from featherweight.spec import ModelSize, Positive, Share, share_of_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BATCH = 8
"""Calibration blocks per forward pass."""


class DepthSpec(PruneSpec):
    """Whole layers of least influence, down to `layers` (a number, or which to keep), or by `ratio`, in every `stack` or one."""

    method: Literal["depth"] = "depth"
    ratio: Share = 0.25
    layers: Positive | tuple[int, ...] | None = None
    stack: Literal["all", "encoder", "decoder"] = "all"

    @property
    def unread(self) -> dict[str, str]:
        return {} if self.layers is None else {"ratio": "beside layers"}

    def left(self, size: ModelSize) -> ModelSize:
        """Of an encoder-decoder, half where one stack alone is cut."""
        share = 1 - self.ratio if self.layers is None else share_of_layers(self.layers, size)
        return size.kept(depth=share if self.stack == "all" else (1 + share) / 2)


def prune(given: PruningInput[DepthSpec]) -> Pruned:
    """Drop layers. Metrics of its own: `layers` (of the last stack) and `influence_dropped` (the dropped layers' sum).

    Raises RecipeError for layers that the model does not have, or where none would go.
    """
    wanted = wanted_layers(given.spec, given.config)
    before, loss = opening.parameters(given.model), given.loss()
    influence = block_influence(given.model, given.blocks)
    kept = {role: most_influential(influence[role], one) if isinstance(one, int) else one for role, one in wanted.items()}
    given.progress.note("keeping " + "; ".join(f"{role} layers {', '.join(map(str, layers))}" for role, layers in kept.items()))
    for stack in stacks(given.model):
        keep_layers(stack, kept[stack.role])
    dropped = sum(value for role, values in influence.items() for place, value in enumerate(values) if place not in kept[role])
    model = surgery.with_config(given.model, shallower(given.config, kept))
    return Pruned(model, before, loss, {"layers": len(kept[dimensions(given.config)[-1].role]), "influence_dropped": dropped})


def wanted_layers(spec: DepthSpec, config: PreTrainedConfig) -> dict[Role, int | tuple[int, ...]]:
    """How many layers each stack keeps, or which; by the config alone."""
    sizes = dimensions(config)
    if spec.stack not in ("all", *(size.role for size in sizes)):
        raise RecipeError(f"prune.stack {spec.stack}: a {config.model_type} has no {spec.stack}; leave prune.stack out")
    whole: dict[Role, int | tuple[int, ...]] = {size.role: size.layers for size in sizes}
    every = {size.role: tuple(range(size.layers)) for size in sizes}
    wanted = {size.role: _wanted(spec, size.layers) for size in sizes if spec.stack in ("all", size.role)}
    if all(one in (whole[role], every[role]) for role, one in wanted.items()):
        raise RecipeError(
            f"prune.method depth drops none of the {sizes[-1].layers} layers; raise prune.ratio, or give prune.layers"
        )
    return whole | wanted


def _wanted(spec: DepthSpec, total: int) -> int | tuple[int, ...]:
    if spec.layers is None:
        return max(1, total - round(total * spec.ratio))
    if isinstance(spec.layers, int):
        if spec.layers > total:
            raise RecipeError(f"prune.layers: {spec.layers} layers to keep of {total}; give 1 to {total - 1}")
        return spec.layers
    return surgery.rising_layers("prune.layers", spec.layers, total)


def keep_layers(stack: Stack, kept: Sequence[int]) -> None:
    """Drop the other layers of a stack, in place. A position bias that T5 keeps in the first moves to the new first."""
    bias = surgery.position_bias(stack.blocks[0].attentions[0])
    if bias is not None:
        stack.blocks[kept[0]].attentions[0].module.relative_attention_bias = bias
    for place in reversed(range(len(stack.blocks))):
        if place not in kept:
            del stack.layers[place]


def shallower(config: PreTrainedConfig, kept: Mapping[Role, Sequence[int]]) -> PreTrainedConfig:
    """The config of the model whose stacks keep these layers."""
    values: dict[str, Any] = {size.layers_key: len(kept[size.role]) for size in dimensions(config)}
    kinds = getattr(config, "layer_types", None)
    if kinds:
        values["layer_types"] = [kinds[place] for place in kept["decoder"]]
    return surgery.resized_config(config, values)


def check(spec: DepthSpec, facts: CheckpointFacts) -> None:
    """Raise RecipeError for layers that the model lacks, StageError for a model whose layers are not known."""
    wanted_layers(spec, facts.config)


DEPTH = Pruner(DepthSpec, prune, check=check)
