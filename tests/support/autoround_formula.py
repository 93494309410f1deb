"""AutoRound as the paper writes it, for what has to be the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from featherweight.grid import grid_named

Weights = Mapping[str, torch.Tensor]


def reference_autoround(
    weights: Weights,
    name: str,
    block: Callable[[Weights, int], torch.Tensor],
    targets: Sequence[torch.Tensor],
    batches: Sequence[int],
) -> dict[str, torch.Tensor]:
    """Signed gradient descent in float64, a step for each of `batches`; block(weights, batch) is what the block puts out."""
    grid = grid_named(name)
    scales = {one: grid.scales(weight.float()).double() for one, weight in weights.items()}
    offsets = {one: torch.zeros_like(weight, requires_grad=True) for one, weight in weights.items()}
    clips = {one: torch.ones_like(scale, requires_grad=True) for one, scale in scales.items()}

    def rounded(one: str) -> torch.Tensor:
        weight = weights[one]
        spread = (scales[one] * clips[one]).repeat_interleave(grid.group_size or weight.shape[1], dim=1)[:, : weight.shape[1]]
        steps = weight / spread + offsets[one]
        kept = steps.clamp(grid.qmin - 0.5, grid.qmax + 0.5)  # what the end of the grid cuts gets no gradient
        return spread * ((steps.round().clamp(grid.qmin, grid.qmax) - kept).detach() + kept)

    parameters = [*offsets.values(), *clips.values()]
    for step, batch in enumerate(batches):
        loss = (block({one: rounded(one) for one in weights}, batch) - targets[batch]).square().mean()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for one, gradient in zip(parameters, gradients, strict=True):
                one -= (1 - step / len(batches)) / len(batches) * gradient.sign()
            for offset in offsets.values():
                offset.clamp_(-0.5, 0.5)
            for clip in clips.values():
                clip.clamp_(0.5, 1.0)
    return {one: rounded(one).detach() for one in weights}
