"""LLM-Pruner's structural pruning of whole key/value groups of attention heads and of MLP channels.

Ma, Fang, Wang: "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023. Weights that depend on one
another (a group's rows of q, k and v and its columns of o; a channel's rows of gate and up and its column of down) are scored
and cut together. Every layer gets the same shape, which is what vLLM and CTranslate2 load.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featherweight import surgery, training
from featherweight.errors import RecipeError, StageError
from featherweight.progress import Progress
from featherweight.recipe import PruneSpec
from tasks.pruners.job import Job, Pruned

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

BATCH = 16
"""Calibration blocks per forward and backward pass."""


@dataclass(frozen=True)
class Shape:
    """What every layer keeps."""

    kv_heads: int
    channels: int


@dataclass(frozen=True)
class Member:
    """One weight matrix of a dependency group; the group owns its rows (dim 0) or its columns (dim 1)."""

    linear: nn.Linear
    dim: int


@dataclass(frozen=True)
class Group:
    """Weights that must be cut together, in `units` equal parts (key/value groups, or MLP channels)."""

    members: tuple[Member, ...]
    units: int


def prune(job: Job) -> Pruned:
    """Cut every layer by `spec.ratio`. Metrics of its own: `kv_heads`, `intermediate_size`.

    Raises RecipeError for a ratio or layers that no engine could load, StageError for an architecture it cannot cut.
    """
    surgery.require_llama_like(job.checkpoint, "prune")
    shape = target_shape(job.spec, job.config)
    smaller = surgery.pruned_config(job.config, shape.kv_heads, shape.channels)
    before = surgery.parameters(job.model)
    loss = cut(job.model, shape, job.spec, job.blocks, job.seed, job.progress)
    metrics = {"kv_heads": shape.kv_heads, "intermediate_size": shape.channels}
    return Pruned(surgery.with_config(job.model, smaller), before, loss, metrics)


def target_shape(spec: PruneSpec, config: PreTrainedConfig) -> Shape:
    """What every layer keeps at `spec.ratio`; RecipeError where nothing would go, or layers would differ in shape."""
    if spec.layers is not None and set(spec.layers) != set(range(config.num_hidden_layers)):
        raise RecipeError(
            f"prune.layers {list(spec.layers)}: vLLM and CTranslate2 load models whose {config.num_hidden_layers} layers have "
            "one shape; leave prune.layers out"
        )
    kv_heads, channels = config.num_key_value_heads, config.intermediate_size
    head_dim = surgery.head_dim(config)
    shape = Shape(
        kept_groups(kv_heads, head_dim, spec.ratio) if spec.attention else kv_heads,
        kept_channels(channels, spec.ratio) if spec.mlp else channels,
    )
    if shape == Shape(kv_heads, channels):
        raise RecipeError(
            f"prune.ratio {spec.ratio} removes nothing from {kv_heads} key/value groups (attention: {spec.attention}) and "
            f"{channels} MLP channels (mlp: {spec.mlp}); raise the ratio"
        )
    return shape


def kept_groups(groups: int, head_dim: int, ratio: float) -> int:
    """Key/value groups that stay: LLM-Pruner counts channels to remove and rounds down to whole heads. At least one."""
    channels = groups * head_dim
    return max(1, groups - (channels - int(channels * (1 - ratio))) // head_dim)


def kept_channels(channels: int, ratio: float) -> int:
    """MLP channels that stay: LLM-Pruner's count, moved to the nearest multiple that kernels and 32-wide grids like.

    The multiple is 32, or less for narrow layers, where 32 would move the count by more than a thirty-second of the width.
    """
    multiple = 32
    while multiple > 1 and multiple > channels // 16:
        multiple //= 2
    kept = int(channels * (1 - ratio))
    return min(channels, max(multiple, multiple * ((2 * kept + multiple) // (2 * multiple))))


def cut(model: PreTrainedModel, shape: Shape, spec: PruneSpec, blocks: Tensor, seed: int, progress: Progress) -> float:
    """Cut the layers of `model` in place down to `shape`; returns the loss on `blocks` before. The config stays as it was."""
    layers = list(model.model.layers)
    config = model.config
    groups = [(attention_group(layer, config), mlp_group(layer, config)) for layer in layers]
    scores, loss = importance(model, [group for pair in groups for group in pair], spec.criterion, blocks, seed, progress)
    queries = config.num_attention_heads // config.num_key_value_heads
    for place, layer in enumerate(layers):
        heads, channels = keep_best(scores[2 * place], shape.kv_heads), keep_best(scores[2 * place + 1], shape.channels)
        surgery.keep_attention_groups(layer, heads, surgery.head_dim(config), queries)
        surgery.keep_mlp_channels(layer, channels, config.hidden_size)
    return loss


def attention_group(layer: Any, config: PreTrainedConfig) -> Group:
    """The attention weights of a decoder layer that belong to its key/value groups, query heads included."""
    attention = layer.self_attn
    rows = tuple(Member(linear, 0) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
    return Group((*rows, Member(attention.o_proj, 1)), config.num_key_value_heads)


def mlp_group(layer: Any, config: PreTrainedConfig) -> Group:
    """The weights that share the hidden channels of a decoder layer's MLP, as torch-pruning's dependency graph finds them."""
    return Group(
        tuple(Member(linear, dim) for linear, dim in surgery.mlp_members(layer.mlp, config.hidden_size)),
        config.intermediate_size,
    )


def keep_best(scores: Tensor, count: int) -> Tensor:
    """The indices of the `count` highest scores, rising."""
    return scores.argsort(stable=True)[len(scores) - count :].sort().values


def importance(
    model: PreTrainedModel, groups: list[Group], criterion: str, blocks: Tensor, seed: int, progress: Progress
) -> tuple[list[Tensor], float]:
    """Score of every unit of every group (float32 [units] each, on the CPU), and the model's mean loss on `blocks`.

    Per weight w: |w| (l1), w^2 (l2), w g (vectorize, param_first), w h w (param_second), w g - w h w / 2 (param_mix), where g
    is the gradient of the mean loss and h the mean of the squared per-sample gradients (the Fisher diagonal). Summed over
    a channel's weights (vectorize: the magnitude of the sum, else the sum of magnitudes), over the group's matrices, and
    over the channels of a unit. `random` draws the scores.
    """
    import torch

    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(group.units, generator=generator) for group in groups], training.mean_loss(model, blocks)
    linears = [member.linear for group in groups for member in group.members]
    if criterion in ("l1", "l2"):
        power = 1 if criterion == "l1" else 2
        salience = [linear.weight.detach().abs().pow(power) for linear in linears]
        loss = training.mean_loss(model, blocks)
    else:
        salience, loss = taylor(model, [linear.weight for linear in linears], criterion, blocks, progress)
    parts = iter(salience)
    return [_score(group, parts, vectorize=criterion == "vectorize") for group in groups], loss


def _score(group: Group, salience: Iterator[Tensor], vectorize: bool) -> Tensor:
    """Sum the saliences of a group's members, taken from the iterator in turn, over each unit."""
    import torch

    total = torch.zeros(group.units)
    for member in group.members:
        matrix = next(salience)
        channels = matrix.sum(1 - member.dim).abs() if vectorize else matrix.abs().sum(1 - member.dim)
        total += channels.view(group.units, -1).sum(1).cpu()
    return total


def taylor(
    model: PreTrainedModel, weights: list[Tensor], criterion: str, blocks: Tensor, progress: Progress
) -> tuple[list[Tensor], float]:
    """Taylor salience of every weight (signed), and the mean loss on `blocks` that its gradients come from."""
    import torch

    second = criterion in ("param_second", "param_mix")
    first = [torch.zeros_like(weight) for weight in weights] if criterion != "param_second" else []
    fisher = [torch.zeros_like(weight) for weight in weights] if second else []
    loss = 0.0
    parts = blocks.split(1 if second else BATCH)  # the Fisher diagonal wants the gradient of every sample by itself
    for done, part in enumerate(parts):
        value, gradients = _gradients(model, weights, part)
        share = len(part) / len(blocks)
        loss += value * share
        for total, gradient in zip(first, gradients, strict=False):
            total.add_(gradient, alpha=share)
        for total, gradient in zip(fisher, gradients, strict=False):
            total.addcmul_(gradient, gradient, value=share)
        progress.step(done + 1, len(parts), loss=value)
    with torch.no_grad():
        for weight, total in zip(weights, first, strict=False):
            total.mul_(weight)
        for weight, total in zip(weights, fisher, strict=False):
            total.mul_(weight).mul_(weight)
    return _combine(first, fisher), loss


def _combine(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """Whichever terms there are; both of them as LLM-Pruner mixes them: first - second / 2."""
    if first and second:
        return [slope.sub_(curvature, alpha=0.5) for slope, curvature in zip(first, second, strict=True)]
    return first or second


def _gradients(model: PreTrainedModel, weights: list[Tensor], ids: Tensor) -> tuple[float, tuple[Tensor, ...]]:
    """Mean loss on `ids` and its gradients for `weights`; StageError where they are not finite."""
    import torch

    loss = training.token_loss(model, ids.to(weights[0].device))
    value = loss.item()
    if not math.isfinite(value):
        raise StageError(f"prune: the loss on the calibration text is {value}; check the checkpoint's weights")
    return value, torch.autograd.grad(loss, weights)
