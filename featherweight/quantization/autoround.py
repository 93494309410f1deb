"""AutoRound (Cheng et al. 2023): which way each weight rounds and how far each scale clips, learned block by block.

    W' = s * clamp(round(W / s + V)),  s = clip * the scale that plain rounding has

The offsets V (within half a step) and the clips take steps of signed gradient descent, `1 / steps` long at first and falling to
nothing, until a block that reads what the quantized ones before it put out gives what it gives in the float model. The embedding
and the head, whose answers no block is asked for, are rounded to nearest. Why not by auto-round itself: docs/decisions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from featherweight.checkpoint.streamed import held
from featherweight.grid import Grid, grid_named
from featherweight.model.blockwise import BATCH, Run, Visit, linears, visits
from featherweight.model.parent import Parent, walking_refusal
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.quantization.interface import (
    Choice,
    QuantizationInput,
    Quantizer,
    merged,
    round_to_nearest,
    start_scales,
)
from featherweight.quantization.spec import QuantizeSpec
from featherweight.spec import Positive
from featherweight.store.mapped import spilled
from featherweight.text.model_inputs import unpadded_inputs

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn
    from transformers import PreTrainedModel

HALF = 0.5
"""How far an offset goes either way, in steps, and a clip down from 1. So zero stays zero: half a step of it rounds to even."""

REACHES = 1.5
"""So much more of a matrix product's speed than training reaches: a block's matrices alone, a thousand tokens at a time (seen)."""


class AutoRoundSpec(QuantizeSpec):
    """Roundings and clips learned on `samples` blocks of calibration text, in `steps` steps for each block of the model."""

    method: Literal["autoround"] = "autoround"
    steps: Positive = 200

    @model_validator(mode="after")
    def _on_integers(self) -> Self:
        if any(grid_named(name).kind == "float" for name in self.grids):
            raise ValueError("autoround learns roundings to integers; for fp8 take gptq, awq or rtn")
        return self


def refusal(spec: QuantizeSpec, parent: Parent) -> str | None:
    """A model whose blocks are not known, of decoders too: nothing is traced here."""
    return walking_refusal("autoround", parent, traced=False)


def operations(spec: AutoRoundSpec, parameters: int) -> float:
    """Forward and backward through each block at every step, and five passes with all of the text."""
    return (6.0 * spec.steps * BATCH + 10.0 * spec.samples) * parameters * spec.sequence / REACHES


def choose(given: QuantizationInput[AutoRoundSpec]) -> Choice:
    """Learn the roundings of the matrices in the blocks; what stands outside them is rounded to nearest."""
    learned = _learned_blocks(given)
    rest = ((name, tensor) for name, tensor in given.tensors() if name not in learned.q)
    return Choice(merged(learned, round_to_nearest(given, rest)))


def _learned_blocks(given: QuantizationInput[AutoRoundSpec]) -> QuantizedWeights:
    import torch

    found = QuantizedWeights({}, {}, {}, given.spec.method)
    draws = torch.Generator().manual_seed(given.seed)
    batches = unpadded_inputs(given.model.config, given.calibration, BATCH)
    wanted = zip(visits(given.model, batches), _float_outputs(given.model, batches), strict=True)
    with ExitStack() as here:
        for visit, targets in wanted:
            here.close()  # by now the block before has put out what it will
            here.enter_context(held(visit.block.module))
            for name, rounding in _learned_block(given, visit, targets, draws).items():
                found.grids[name] = rounding.grid
                found.q[name], found.scales[name] = (spilled(one.cpu(), given.room) for one in rounding.chosen())
            given.progress.step(len(found.q), len(given.grids.keys() - given.heads))
    return found


def _learned_block(
    given: QuantizationInput[AutoRoundSpec], visit: Visit, targets: list[Tensor], draws: Generator
) -> dict[str, _Rounding]:
    """The roundings of a block's matrices, by name, to which its weights have been moved: plain ones, where few and so long steps
    have ended farther from the targets."""
    layers = {f"{name}.weight": linear for name, linear in linears(visit.block).items() if f"{name}.weight" in given.grids}
    plain = {name: _plain(given, name, linear.weight.detach().clone()) for name, linear in layers.items()}
    roundings = {name: _Rounding.of(one.weight, one.grid, one.start) for name, one in plain.items()}
    with _rounded(layers, roundings):
        before = _distance(visit.run, targets)
        learn(list(roundings.values()), visit.run, targets, given.spec.steps, draws)
        roundings = roundings if _distance(visit.run, targets) < before else plain
    for name, rounding in roundings.items():
        layers[name].weight.data.copy_(rounding.grid.dequantize(*rounding.chosen()))
    return roundings


def _plain(given: QuantizationInput[AutoRoundSpec], name: str, weight: Tensor) -> _Rounding:
    """What plain rounding does to a weight."""
    grid = given.grids[name]
    return _Rounding.of(weight, grid, start_scales(grid, weight, given.spec.scale, given.importance.get(name)))


def _float_outputs(model: PreTrainedModel, batches: list[dict[str, Any]]) -> Iterator[list[Tensor]]:
    """What each block of the float model puts out for each batch; the walk has left a block before that is changed."""
    walk = visits(model, batches)
    visit = next(walk, None)
    while visit is not None:
        outputs = [_hidden(one) for one in visit.run.outputs()]
        visit = next(walk, None)
        yield outputs


def _hidden(output: Any) -> Tensor:
    """What a block passes on, without what it tells beside."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _distance(run: Run, targets: list[Tensor]) -> float:
    """Squared, of what a block puts out from its targets."""
    outputs = (_hidden(one) for one in run.outputs())
    return sum((output - target).square().sum().item() for output, target in zip(outputs, targets, strict=True))


def learn(roundings: list[_Rounding], run: Run, targets: list[Tensor], steps: int, draws: Generator) -> None:
    """Take `steps` steps towards `targets`, on batches in an order that `draws` gives, each as often as any other."""
    import torch

    order: list[int] = []
    parameters = [one for rounding in roundings for one in (rounding.offset, rounding.clip)]
    for step in range(steps):
        order = order or torch.randperm(len(targets), generator=draws).tolist()
        number = order.pop()
        with torch.enable_grad():
            loss = (_hidden(run.forward(number)) - targets[number]).square().mean()
            gradients = torch.autograd.grad(loss, parameters)
        for one, gradient in zip(parameters, gradients, strict=True):
            one.data.sub_(gradient.sign_(), alpha=(1 - step / steps) / steps)
        for rounding in roundings:
            rounding.offset.data.clamp_(-HALF, HALF)
            rounding.clip.data.clamp_(HALF, 1.0)


@dataclass(frozen=True)
class _Rounding:
    """How a weight [rows, columns] is rounded: offsets [rows, columns] in steps, and clips [rows, groups] of the start's scales."""

    weight: Tensor
    grid: Grid
    start: Tensor
    offset: Tensor
    clip: Tensor

    @classmethod
    def of(cls, weight: Tensor, grid: Grid, start: Tensor) -> _Rounding:
        """To nearest, with the scales `start`."""
        import torch

        return cls(weight, grid, start, torch.zeros_like(weight).requires_grad_(), torch.ones_like(start).requires_grad_())

    def seen(self) -> Tensor:
        """The weight as it is rounded now, differentiable in offset and clip."""
        rounded: Tensor = _function().apply(self.offset, self.clip, self.weight, self.start, self.grid)
        return rounded

    def chosen(self) -> tuple[Tensor, Tensor]:
        """Integers [rows, columns] and scales [rows, groups]."""
        scales = self.grid._held(self.start * self.clip.detach())
        q = _integers(self.weight, self.offset.detach(), scales, self.grid)[0]
        return self.grid._flat(q, self.weight.shape[1]).to(self.grid.dtype), scales


def _integers(weight: Tensor, offset: Tensor, scales: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """[rows, groups, size]: the integers, and which of them the end of the grid did not cut."""
    steps = (grid._grouped(weight) / scales.unsqueeze(-1)).add_(grid._grouped(offset))
    inside = (steps >= grid.qmin - 0.5) & (steps <= grid.qmax + 0.5)
    return steps.round_().clamp_(grid.qmin, grid.qmax), inside


@cache
def _function() -> Any:
    """The autograd function of `_Rounding.seen`: rounding passes gradients straight through."""
    import torch

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, offset: Tensor, clip: Tensor, weight: Tensor, start: Tensor, grid: Grid) -> Tensor:
            scales = grid._held(start * clip)
            q, inside = _integers(weight, offset, scales, grid)
            ctx.save_for_backward(weight, start, scales, q.to(torch.int8), inside)
            ctx.grid = grid
            return grid._flat(q.mul_(scales.unsqueeze(-1)), weight.shape[1])

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
            weight, start, scales, q, inside = ctx.saved_tensors
            wanted = ctx.grid._grouped(upstream[0])
            passed = wanted * inside
            per_scale = (wanted * q - passed * ctx.grid._grouped(weight) / scales.unsqueeze(-1)).sum(-1)
            offset = ctx.grid._flat(passed * scales.unsqueeze(-1), weight.shape[1])
            return offset, per_scale * start, None, None, None

    return Seen


@contextmanager
def _rounded(layers: Mapping[str, nn.Linear], roundings: Mapping[str, _Rounding]) -> Iterator[None]:
    """The layers compute with their weights as they are rounded."""
    import torch

    def forward(linear: nn.Linear, rounding: _Rounding, inputs: Tensor) -> Tensor:
        return torch.nn.functional.linear(inputs, rounding.seen(), linear.bias)

    for name, linear in layers.items():
        linear.forward = partial(forward, linear, roundings[name])  # type: ignore[method-assign]
    try:
        yield
    finally:
        for linear in layers.values():
            del linear.forward


EXPECTED_LOSSES = {"int4": 0.0270, "int4-g32": 0.0131}

AUTOROUND = Quantizer(
    AutoRoundSpec, choose, refusal=refusal, operations=operations, in_blocks=True, streams=True, losses=EXPECTED_LOSSES
)
