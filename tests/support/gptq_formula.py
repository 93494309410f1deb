"""GPTQ as the paper writes it, for what has to be the same."""

from __future__ import annotations

import torch

from featherweight.grid import grid_named


def reference_gptq(weight: torch.Tensor, inputs: torch.Tensor, name: str) -> torch.Tensor:
    """GPTQ column by column in float64, from the formula: columns in falling order of diag(H), 1 % damping."""
    grid = grid_named(name)
    hessian = inputs.double().T @ inputs.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    order = (inputs.double() ** 2).sum(0).argsort(descending=True, stable=True)
    left, scales = weight.double().clone(), grid.scales(weight).double()
    for place, column in enumerate(order.tolist()):
        rest = order[place + 1 :]
        inverse = torch.linalg.inv(hessian[order[place:]][:, order[place:]])
        scale = scales[:, column // grid.group_size if grid.group_size else 0]
        rounded = (left[:, column] / scale).round().clamp(grid.qmin, grid.qmax) * scale
        error = (left[:, column] - rounded) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0, 1:]
        left[:, column] = rounded
    return left
