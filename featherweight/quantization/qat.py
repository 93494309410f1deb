"""Quantization-aware training: the weights are trained while every forward pass sees them on their grid.

Rounding has no useful gradient, so it is passed straight through (Bengio et al. 2013). The target is what the float
checkpoint says (KL on its logits), or the text itself. Training begins at GPTQ's integers, or at those of plain rounding.

The scales stay as that rounding chose them, or are learned with the weights by LSQ's gradient (Esser et al. 2020), as ParetoQ (Liu
et al. 2025) does at few bits. At 4 bits learned ones recovered no more than fixed ones in 40 steps on stories15M and cost a
seventh of the time; scales recomputed at every step recovered nothing there.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.distillation.losses import answered
from featherweight.grid import Grid, grid_named
from featherweight.model.architecture import task_of
from featherweight.model.heads import answers
from featherweight.model.parent import Parent
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.model.sparsity import Sparsity, Zeros
from featherweight.progress import Progress
from featherweight.quantization.catalog import QUANTIZERS, START
from featherweight.quantization.interface import FAR_TRAINED, Choice, QuantizationInput, Quantizer
from featherweight.quantization.self_generated_text import draw_passages, generate_blocks
from featherweight.quantization.spec import QuantizeSpec
from featherweight.spec import Positive
from featherweight.text.model_inputs import example_blocks, inputs_and_labels
from featherweight.text.tokens import Frame
from featherweight.training import loop
from featherweight.training.plan import TrainingPlan

if TYPE_CHECKING:
    from torch import Tensor, nn

PASSAGE = 4
"""Share of a generated block that is the recipe's text: one part in so many."""
EDGE = 0.49
"""How far from its integer, in steps, a weight may lie at the start. Below one half, so that it rounds to that integer."""
LEARNED_BITS = 3
"""Up to here scales are learned where the spec does not say: with few levels it counts most where they lie."""


class QatSpec(QuantizeSpec):
    """Weights trained on their grid for `steps` steps of `batch` blocks.

    distill: on what the float checkpoint says (KL on its logits), else on the text itself.
    start: the rounding that training begins from.
    generated_tokens: text that the checkpoint itself writes to train on, beside the recipe's.
    processes: how many compute each batch together, each with the whole model, one device each, or their share of the cores.
    scales: learned with the weights, or fixed as the start chose them; auto learns those of grids of 2 bits.
    """

    quiet = QuantizeSpec.quiet | {"processes", "scales"}

    method: Literal["qat"] = "qat"
    steps: Positive = 100
    batch: Positive = 8
    learning_rate: float = Field(default=1e-5, gt=0)
    distill: bool = True
    start: str = START
    generated_tokens: int = Field(default=0, ge=0)
    processes: Positive = 1
    scales: Literal["auto", "learned", "fixed"] = "auto"

    def learns(self, grid: Grid) -> bool:
        """Whether the scales of matrices on `grid` are trained too."""
        return grid.bits <= LEARNED_BITS if self.scales == "auto" else self.scales == "learned"

    @property
    def together(self) -> int:
        return self.processes

    @property
    def methods(self) -> tuple[str, ...]:
        return (*super().methods, self.start)

    @model_validator(mode="after")
    def _on_integers(self) -> Self:
        if any(grid_named(name).kind == "float" for name in self.grids):
            raise ValueError("qat trains on integer grids; for fp8 take gptq, awq or rtn")
        return self

    @model_validator(mode="after")
    def _parts_are_not_empty(self) -> Self:
        if self.batch < self.processes:
            raise ValueError(f"batch {self.batch} cannot be split over {self.processes} processes")
        return self

    @model_validator(mode="after")
    def _a_start(self) -> Self:
        starts = [name for name in QUANTIZERS if QUANTIZERS[name].starts_training]
        if self.start not in starts:
            raise ValueError(f"start {self.start}: training does not begin from it; known: {', '.join(starts)}")
        return self


def refusal(spec: QatSpec, parent: Parent) -> str | None:
    """Where there is no text of the checkpoint's own; training holds the zeros of a sparse one."""
    if parent.task != "text-generation" and spec.generated_tokens:
        return f"{parent.task}: only decoders write text of their own to train on; drop generated_tokens"
    return None


def operations(spec: QatSpec, parameters: int) -> float:
    """Forward and backward, and the float checkpoint's forward where it is the target."""
    return (8.0 if spec.distill else 6.0) * parameters * spec.steps * spec.batch * spec.sequence


def choose(given: QuantizationInput[QatSpec]) -> Choice:
    """Train on the recipe's text, and on what the checkpoint itself writes where the spec asks for it."""
    blocks = training_blocks(given)
    start = QUANTIZERS[given.spec.start].choose(dataclasses.replace(given, model=copy.deepcopy(given.model), progress=Progress()))
    student = copy.deepcopy(given.model)
    module = fake_quantized(student, start.quantized, given.spec.learns)
    with Zeros.of(student, Sparsity.read(given.checkpoint)).held(student):
        metrics = loop.timed_loop(
            module,
            blocks,
            _plan(given),
            loss_fn=_distillation(given.model, module) if given.spec.distill else None,
            progress=given.progress,
        )
    state = student.state_dict()
    changed = {name: state[name].float().cpu() for name, _ in given.tensors() if name in state and name not in given.grids}
    return Choice(module.quantized(), changed, {**start.metrics, **metrics})


def _plan(given: QuantizationInput[QatSpec]) -> TrainingPlan:
    return TrainingPlan(
        steps=given.spec.steps,
        batch=given.spec.batch,
        learning_rate=given.spec.learning_rate,
        weight_decay=0.0,  # decay pulls weights off the grid points that the loss has found
        scratch=given.scratch,
        seed=given.seed,
    )


def training_blocks(given: QuantizationInput[QatSpec]) -> Tensor:
    """Token ids to train on, int64 [blocks, sequence]: of the text, then what the checkpoint writes on from passages of it."""
    import torch

    spec = given.spec
    limit = spec.steps * spec.batch
    blocks = example_blocks(given.checkpoint, given.model.config, given.text, spec.sequence, limit=limit, seed=given.seed)
    if spec.generated_tokens == 0:
        return blocks
    given.progress.note(f"the checkpoint writes {spec.generated_tokens} tokens to train on")
    count = -(-spec.generated_tokens // spec.sequence)
    lead = Frame.of(load_tokenizer(given.checkpoint)).lead
    passages = draw_passages(lead, blocks, count, max(1, spec.sequence // PASSAGE), given.seed)
    return torch.cat([blocks, generate_blocks(given.model, passages, spec.sequence, given.seed)])


def fake_quantized(model: nn.Module, start: QuantizedWeights, learns: Callable[[Grid], bool]) -> Any:
    """`model` as a module whose forward sees the parameters of `start` on their grids, at first as exactly its integers.

    Each weight of `model` moves to the point nearest to it that rounds to its integer: where two integers were nearly as
    good, a small step of training changes the choice. A tied head follows the embedding. `.quantized()` gives the outcome.
    learns: whether the scales of a grid are parameters of the module.
    """
    return _module_class()(model, start, learns)


def into_cells(weight: Tensor, q: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """The weights nearest to `weight` [rows, columns] that round to `q`, given the scales [rows, groups]."""
    steps = grid._grouped(weight) / scales.unsqueeze(-1)
    integers = grid._grouped(q.to(weight))
    return grid._flat(steps.clamp(integers - EDGE, integers + EDGE) * scales.unsqueeze(-1), weight.shape[1])


def _distillation(teacher: nn.Module, student: nn.Module) -> loop.LossFunction:
    """KL(teacher || student) per token at temperature 1."""
    import torch

    teacher.eval()
    config: Any = student.config

    def loss(ids: Tensor) -> Tensor:
        inputs, labels = inputs_and_labels(config, ids)
        with torch.inference_mode():
            target = answers(teacher, inputs).flatten(0, 1)
        return answered(task_of(config), answers(student, inputs), target, labels, 1.0, 1.0, "forward_kl")

    return loss


@cache
def _module_class() -> Any:
    """The module behind `fake_quantized`."""
    import torch

    class FakeQuantized(torch.nn.Module):
        def __init__(self, model: nn.Module, start: QuantizedWeights, learns: Callable[[Grid], bool]) -> None:
            super().__init__()
            self.model, self.start, self.config = model, start, model.config
            device = next(model.parameters()).device
            self.scales = {name: scales.to(device) for name, scales in start.scales.items()}
            for name, weight in self._weights().items():
                cells = into_cells(weight.data, start.q[name].to(device), self.scales[name], start.grids[name])
                weight.data.copy_(cells)
            learned = {name: torch.nn.Parameter(self.scales[name].clone()) for name, grid in start.grids.items() if learns(grid)}
            self.scales |= learned
            self.learned = torch.nn.ParameterList(learned.values())

        def _weights(self) -> dict[str, nn.Parameter]:
            every = self.model.named_parameters(remove_duplicate=False)
            return {name: weight for name, weight in every if name in self.start.grids}

        def forward(self, **inputs: Any) -> Any:
            weights = self._weights().items()
            faked = {name: fake_quantize(weight, self.scales[name], self.start.grids[name]) for name, weight in weights}
            return torch.func.functional_call(self.model, faked, (), inputs)

        @torch.no_grad()
        def quantized(self) -> QuantizedWeights:
            grids = self.start.grids
            scales = {name: grids[name]._held(scales.detach()) for name, scales in self.scales.items()}
            q = {name: grids[name].quantize(weight, scales[name])[0].cpu() for name, weight in self._weights().items()}
            return dataclasses.replace(self.start, q=q, scales={name: one.cpu() for name, one in scales.items()})

    return FakeQuantized


def fake_quantize(weight: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """`weight` [rows, columns] on its grid with `scales` [rows, groups], differentiable in the weight and in the scales.

    The gradient passes straight through to the weights that round to within half a step of themselves; those further beyond
    the end of the grid get none. A scale's is that of LSQ: of each weight between the ends q - w / s, of one beyond them q, all
    over the square root of weights times largest integer.
    """
    return _rounding().apply(weight, scales, grid)


@cache
def _rounding() -> Any:
    """The autograd function of `fake_quantize`."""
    import torch

    class Rounding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor, scales: Tensor, grid: Grid) -> Tensor:
            learned = ctx.needs_input_grad[1]
            held = grid._held(scales) if learned else scales
            steps = grid._grouped(weight) / held.unsqueeze(-1)
            q = grid.round(steps)
            inside = (steps >= grid.qmin - 0.5) & (steps <= grid.qmax + 0.5)
            saved = [scale_gradients(steps, q, grid)] if learned else []
            ctx.save_for_backward(grid._flat(inside, weight.shape[1]), *saved)
            ctx.grid = grid
            return grid._flat(q.mul_(held.unsqueeze(-1)), weight.shape[1])

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
            inside, *saved = ctx.saved_tensors
            scales = (ctx.grid._grouped(upstream[0]) * saved[0]).sum(-1) if saved else None
            return upstream[0] * inside, scales, None

    return Rounding


def scale_gradients(steps: Tensor, q: Tensor, grid: Grid) -> Tensor:
    """What a scale gets of the gradient of each of its weights, [rows, groups, size]; steps: the weights in its units.

    LSQ's gradient scale counts the weights of a whole group, also for a short last one, which is filled up with zeros.
    """
    between = (steps > grid.qmin) & (steps < grid.qmax)
    return (q - steps * between) / math.sqrt(steps.shape[-1] * grid.qmax)


TOLERANCE = 0.02
"""Of RTN's loss: on 8 bits, where rounding costs next to nothing, the first steps of a training are half a per cent worse."""

HELD = 7.0
"""The weights that are trained, their gradients, moments and steps, the checkpoint's, the start's (benchmarks/memory.py)."""

QAT = Quantizer(
    QatSpec,
    choose,
    refusal=refusal,
    operations=operations,
    held=HELD,
    far=lambda spec: FAR_TRAINED if spec.distill else None,
    tolerance=TOLERANCE,
)
