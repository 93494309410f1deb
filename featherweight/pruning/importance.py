"""How much a unit matters: LLM-Pruner's criteria over weights that are cut together.

Ma, Fang, Wang: "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from featherweight.errors import StageError
from featherweight.progress import Progress
from featherweight.training.losses import mean_loss, token_loss

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

BATCH = 16
"""Calibration blocks per forward and backward pass."""


@dataclass(frozen=True)
class Member:
    """One weight matrix of a dependency group; the group owns its rows (dim 0) or its columns (dim 1)."""

    linear: nn.Linear | nn.Embedding
    dim: int


@dataclass(frozen=True)
class Group:
    """Weights that must be cut together, in `units` equal parts (key/value groups, MLP channels, hidden channels)."""

    members: tuple[Member, ...]
    units: int


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
        return [torch.rand(group.units, generator=generator) for group in groups], mean_loss(model, blocks)
    linears = [member.linear for group in groups for member in group.members]
    if criterion in ("l1", "l2"):
        power = 1 if criterion == "l1" else 2
        salience = [linear.weight.detach().abs().pow(power) for linear in linears]
        loss = mean_loss(model, blocks)
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

    loss = token_loss(model, ids.to(weights[0].device))
    value = loss.item()
    if not math.isfinite(value):
        raise StageError(f"prune: the loss on the calibration text is {value}; check the checkpoint's weights")
    return value, torch.autograd.grad(loss, weights)
