"""Quantization-aware training: the weights are trained while every forward pass sees them on their grid.

Rounding has no useful gradient, so it is passed straight through (Bengio et al. 2013), and the scales are learned with the
weights (LSQ, Esser et al. 2020). The target is what the float checkpoint says (KL on its logits), or the text.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import TYPE_CHECKING, Any

from featherweight import training
from featherweight.grid import Grid
from featherweight.quantized import QuantizedWeights
from featherweight.text import load_tokenizer, token_blocks
from tasks.distill import distillation_loss
from tasks.quantizers.generate import generate_blocks
from tasks.quantizers.job import Choice, Job, start_scales

if TYPE_CHECKING:
    from torch import Tensor, nn


def choose(job: Job) -> Choice:
    """Train on the recipe's text, and on what the checkpoint itself writes where the spec asks for it."""
    blocks = training_blocks(job)
    student = copy.deepcopy(job.model)
    module = fake_quantized(student, job.grids, job.spec.scale)
    metrics = training.timed_loop(
        module,
        blocks,
        steps=job.spec.steps,
        batch=job.spec.batch,
        learning_rate=job.spec.learning_rate,
        loss_fn=_distillation(job.model, module) if job.spec.distill else None,
        weight_decay=0.0,  # decay pulls weights off the grid points that the loss has found
        seed=job.seed,
        progress=job.progress,
    )
    state = student.state_dict()
    changed = {name: state[name].float().cpu() for name, _ in job.tensors() if name in state and name not in job.grids}
    return Choice(module.quantized(job.spec.method), changed, metrics)


def training_blocks(job: Job) -> Tensor:
    """Token ids to train on, int64 [blocks, sequence]: of the text, then of the checkpoint's own writing."""
    import torch

    spec = job.spec
    limit = spec.steps * spec.batch
    blocks = token_blocks(job.text, load_tokenizer(job.checkpoint), spec.sequence, limit=limit, seed=job.seed)
    if spec.generated_tokens == 0:
        return blocks
    job.progress.note(f"the checkpoint writes {spec.generated_tokens} tokens to train on")
    count = -(-spec.generated_tokens // spec.sequence)
    return torch.cat([blocks, generate_blocks(job.model, blocks[:, 0], count, spec.sequence, job.seed)])


def fake_quantized(model: nn.Module, grids: dict[str, Grid], search: str) -> Any:
    """`model` as a module whose forward sees the parameters named in `grids` on their grids, with scales to be learned.

    A tied head follows the embedding. Each weight is rounded once per forward pass.
    """
    return _module_class()(model, grids, search)


def _distillation(teacher: nn.Module, student: nn.Module) -> training.LossFunction:
    """KL(teacher || student) per token at temperature 1."""
    import torch

    teacher.eval()

    def loss(ids: Tensor) -> Tensor:
        with torch.inference_mode():
            target = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        logits = student(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        return distillation_loss(logits, target, training.next_tokens(ids).flatten(), 1.0, 1.0)

    return loss


@cache
def _module_class() -> Any:
    """The module behind `fake_quantized`."""
    import torch

    class FakeQuantized(torch.nn.Module):
        def __init__(self, model: nn.Module, grids: dict[str, Grid], search: str) -> None:
            super().__init__()
            self.model, self.grids = model, grids
            parameters = dict(model.named_parameters())
            self.start = {name: start_scales(grid, parameters[name].data, search) for name, grid in grids.items()}
            # Scales as exp of what is learned: no sign flips, and a step of the optimizer is a share, as large for all.
            self.growth = torch.nn.ParameterList(torch.zeros_like(scales) for scales in self.start.values())

        def scales(self) -> dict[str, Tensor]:
            return {name: start * growth.exp() for (name, start), growth in zip(self.start.items(), self.growth, strict=True)}

        def forward(self, **inputs: Any) -> Any:
            parameters, scales = dict(self.model.named_parameters()), self.scales()
            weights = {name: fake_quantize(parameters[name], scales[name], grid) for name, grid in self.grids.items()}
            return torch.func.functional_call(self.model, weights, (), inputs)

        @torch.no_grad()
        def quantized(self, method: str) -> QuantizedWeights:
            parameters, scales = dict(self.model.named_parameters()), self.scales()
            pairs = {name: grid.quantize(parameters[name], scales[name]) for name, grid in self.grids.items()}
            q = {name: integers.cpu() for name, (integers, _) in pairs.items()}
            return QuantizedWeights(self.grids, q, {name: found.cpu() for name, (_, found) in pairs.items()}, method)

    return FakeQuantized


def fake_quantize(weight: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """`weight` [rows, columns] on its grid, differentiable in the weight and the scales [rows, groups].

    The weight's gradient passes straight through where the grid is not exceeded and is zero beyond; a scale's gradient is the
    rounding residual q - w/s, or the end of the range beyond it (LSQ, eq. 3).
    """
    return _rounding().apply(weight, scales, grid)


@cache
def _rounding() -> Any:
    """The autograd function of `fake_quantize`."""
    import torch

    class Rounding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor, scales: Tensor, grid: Grid) -> Tensor:
            ctx.grid = grid
            ctx.save_for_backward(weight, scales)
            return grid.dequantize(*grid.quantize(weight, scales))

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
            weight, scales = ctx.saved_tensors
            grid = ctx.grid
            gradient = grid._grouped(upstream[0])
            exact = grid._grouped(weight) / scales.unsqueeze(-1)
            q = exact.round().clamp_(grid.qmin, grid.qmax)
            inside = (exact - q).abs() <= 0.5
            of_scales = (gradient * (q - exact * inside)).sum(dim=-1)
            return grid._flat(gradient * inside, weight.shape[1]), of_scales, None

    return Rounding
