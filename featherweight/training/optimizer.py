"""The optimizer of a training run, and its learning rate over the steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from featherweight.training.data_parallel import DataParallelGroup
from featherweight.training.muon import Muon
from featherweight.training.plan import TrainingPlan
from featherweight.training.sharding import is_part, part, square_sum

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class ScheduledOptimizer:
    """The optimizer that a plan names, its learning rate set by the step. `weights`: what it trains."""

    def __init__(self, model: nn.Module, plan: TrainingPlan) -> None:
        make = Muon if plan.optimizer == "muon" else adamw
        self.inner, self._plan = make(model, plan.learning_rate, plan.weight_decay), plan
        self._peaks = [group["lr"] for group in self.inner.param_groups]
        self.weights = [weight for group in self.inner.param_groups for weight in group["params"]]

    def clip(self, group: DataParallelGroup) -> float:
        """Bound the norm of the whole gradient; the norm that it had. group: those who have it together, where it is divided."""
        import torch

        if not group.sharded:
            return torch.nn.utils.clip_grad_norm_(self.weights, self._plan.grad_clip).item()
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        (divided,) = group.add(square_sum(gradient for gradient in gradients if is_part(gradient)))
        norm = math.sqrt(divided + square_sum(gradient for gradient in gradients if not is_part(gradient)))
        for gradient in gradients:
            part(gradient).mul_(min(1.0, self._plan.grad_clip / (norm + 1e-6)))  # as torch does
        return norm

    def step(self, step: int) -> None:
        """Update the weights at the rate of `step` (from 0), and forget the gradients."""
        share = rate_share(step, self._plan.steps, self._plan.warmup, self._plan.final_share)
        for group, peak in zip(self.inner.param_groups, self._peaks, strict=True):
            group["lr"] = share * peak
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    """AdamW over the trainable weights, decaying matrices only."""
    import torch

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    # What is divided among processes and what is not are no weights for one kernel.
    groups = [
        {"params": [one for one in weights if (one.ndim >= 2) == matrices and is_part(one) == divided], "weight_decay": decay}
        for divided in (False, True)
        for matrices, decay in ((True, weight_decay), (False, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def rate_share(step: int, steps: int, warmup: float, final_share: float) -> float:
    """Share of the peak learning rate at `step` of `steps` (from 0): linear warm-up, then a cosine to `final_share`."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - 1 - rising)
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * done))
