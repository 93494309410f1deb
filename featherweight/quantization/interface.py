"""What a quantization method is: what it is given, what it gives back, and the rounding that all of them share.

To add one: a file with its spec, its functions and a `Quantizer` that names them, and a line in catalog.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from featherweight.checkpoint.files import Listing, Weights, find_weights
from featherweight.checkpoint.tensors import stream_tensors
from featherweight.errors import StageError
from featherweight.grid import Grid, grid_named
from featherweight.model.matrices import heads, matrices, quantized_rows
from featherweight.model.names import reading
from featherweight.model.parent import Parent
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.progress import Progress
from featherweight.quantization.imatrix import importances
from featherweight.quantization.spec import IMATRIX, QuantizeSpec
from featherweight.store.mapped import give_back, spilled

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TOLERANCE = 0.005
"""The share of RTN's loss by which a method's may be the larger beyond the noise: perplexity moves by less than a hundredth."""

SpecT = TypeVar("SpecT", bound=QuantizeSpec)
SpecT_co = TypeVar("SpecT_co", bound=QuantizeSpec, covariant=True)


@dataclass(frozen=True)
class QuantizationInput(Generic[SpecT_co]):
    """One quantization. `model` is the float checkpoint, which a method may change; `calibration` is int64 [blocks, length].

    finer: grids of the matrices that mixed precision keeps on another than the spec's.
    scratch: where a method that trains resumes from after a kill.
    smoothed: tensors that stand in for the checkpoint's own, where the ranges of activations were moved into the weights.
    room: a folder on the disk for what a large model becomes, until it is written; None where it stands in memory.
    """

    spec: SpecT_co
    checkpoint: Path
    model: PreTrainedModel
    calibration: Tensor
    text: Path
    seed: int
    progress: Progress
    smoothed: Mapping[str, Tensor] = field(default_factory=dict)
    finer: Mapping[str, Grid] = field(default_factory=dict)
    scratch: Path | None = None
    room: Path | None = None

    @cached_property
    def weights(self) -> Weights:
        """The checkpoint's weight files."""
        return find_weights(Listing.of(self.checkpoint))

    @cached_property
    def grids(self) -> dict[str, Grid]:
        """The grid of each parameter to quantize: every Linear of a block, and the embedding and head where they have one."""
        body = grid_named(self.spec.grid)
        head = None if self.spec.head is None else grid_named(self.spec.head)
        wanted = {name: body if name in self.linear else head if name in self.heads else None for name, _ in self.tensors()}
        grids = {name: self.finer.get(name, grid) for name, grid in wanted.items() if grid is not None}
        if not self.linear & grids.keys():
            raise StageError(f"{self.checkpoint} holds no linear layer in blocks under the names that its architecture gives them")
        return grids

    @cached_property
    def linear(self) -> frozenset[str]:
        """Names of the weights of the blocks' linear layers."""
        return frozenset(name for name, _, _ in matrices(self.model)) - self.heads

    @cached_property
    def heads(self) -> frozenset[str]:
        """Names of the embedding and the output head."""
        return heads(self.model)

    @cached_property
    def transposed(self) -> frozenset[str]:
        """Names of the weights that hold a row of the grid in each column."""
        return frozenset(name for name, _, transposed in matrices(self.model) if transposed)

    @cached_property
    def copies(self) -> frozenset[str]:
        """Names of parameters that are another's second name. T5's config calls every model tied: so the model is asked."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        ties = self.model.all_tied_weights_keys
        return frozenset(name for name, source in ties.items() if name in named and named[name] is named.get(source))

    @cached_property
    def importance(self) -> Mapping[str, Tensor]:
        """What the errors of each column of a matrix weigh, by the parameter's name; nothing where no scale asks for it."""
        return importances(self.model, self.calibration) if self.spec.scale == IMATRIX else {}

    @cached_property
    def read_as(self) -> Callable[[str], str]:
        """The model's name of what the checkpoint stores under a name."""
        return reading(self.model)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(the model's name, tensor) of the checkpoint, memory-mapped, one by one; a tied head is left out, even if stored."""
        return ((self.read_as(name), tensor) for _, name, tensor in self.files())

    def files(self) -> Iterator[tuple[str, str, Tensor]]:
        """(file, stored name, tensor), likewise."""
        return ((file, name, self.smoothed.get(self.read_as(name), tensor)) for file, name, tensor in self.stored())

    def stored(self) -> Iterator[tuple[str, str, Tensor]]:
        """(file, stored name, tensor), as the checkpoint has them."""
        every = stream_tensors(self.checkpoint, self.weights, sealed=True)
        return ((file, name, tensor) for file, name, tensor in every if self.read_as(name) not in self.copies)

    def head(self) -> Iterator[tuple[str, Tensor]]:
        """The embedding and, where it is not tied, the output head."""
        return ((name, tensor) for name, tensor in self.tensors() if name in self.heads)


@dataclass(frozen=True)
class Choice:
    """What a method chose. `changed` holds what replaces float tensors of the checkpoint, such as norms; `metrics` its own."""

    quantized: QuantizedWeights
    changed: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def nothing_refused(spec: QuantizeSpec, parent: Parent) -> str | None:
    """What a method says that handles every checkpoint."""
    return None


FAR = 0.1
"""How far answers may be from the checkpoint's, as a share of their square, however near RTN's are; what has nothing in common
with them is 2 away."""
FAR_TRAINED = 0.5
"""The same of a method that trains to answer as the checkpoint does: its weights move, and few steps at a high rate leave 0.44."""


def far_untrained(spec: QuantizeSpec) -> float | None:
    """What a method says that trains on no text."""
    return FAR


def no_operations(spec: QuantizeSpec, parameters: int) -> float:
    """What a method costs that looks at each weight once."""
    return 0.0


def calibration_operations(spec: QuantizeSpec, parameters: int) -> float:
    """What it costs to see the calibration text block by block: forward, the statistics, forward again."""
    return 6.0 * parameters * spec.samples * spec.sequence


@dataclass(frozen=True)
class Quantizer(Generic[SpecT]):
    """All that is known of a method.

    spec: the recipe's keys that it reads. choose: chooses the integers and scales.
    libraries: distributions whose versions shape its result, beside torch and transformers.
    smooth: for a method that smooths: scales the channels of the model in place, before its own or another's `choose`.
    refusal: why it cannot handle a checkpoint, in one line that names both; asked by the plan, and again once the model type is
        known. Of a spec of another method, too, where that one smooths with it or starts from it: then it reads the shared keys.
    operations: floating-point operations that it takes for a model of so many parameters; in_blocks: for so many in its blocks,
        since embedding and head take none.
    column_s: seconds for each column of each matrix, where it goes through them one by one.
    starts_training: training may begin from its integers; it reads none but the shared keys.
    losses: share by which a grid raised bits per byte, by its name: what advice expects (benchmarks/README.md, ptq).
    streams: it reads `tensors`, or the model block by block, so that a large model's weights can stay in their files.
    held: how often it holds the weights in float32 at once, about, where they do not stay in their files.
    far: how far its answers may be from the checkpoint's; None where they are to be those of a text that it is trained on.
    tolerance: how much worse than RTN its loss on the calibration text may be beyond the noise, as a share (see judgement.py).
    """

    spec: type[SpecT]
    choose: Callable[[QuantizationInput[SpecT]], Choice]
    libraries: tuple[str, ...] = ()
    smooth: Callable[[QuantizationInput[SpecT]], None] | None = None
    refusal: Callable[[SpecT, Parent], str | None] = nothing_refused
    operations: Callable[[SpecT, int], float] = no_operations
    in_blocks: bool = False
    starts_training: bool = False
    column_s: float = 0.0
    streams: bool = False
    held: float = 3.5
    far: Callable[[SpecT], float | None] = far_untrained
    tolerance: float = TOLERANCE
    losses: Mapping[str, float] = field(default_factory=dict)


def start_scales(grid: Grid, weight: Tensor, search: str, importance: Tensor | None = None) -> Tensor:
    """The scales of `weight` before anything is learned or compensated: float32 [rows, groups].

    importance: what the errors of each column weigh, where the search asks for it and there is a matrix that reads numbers.
    """
    return grid.scales(weight) if search == "absmax" else grid.mse_scales(weight, importance)


def rounded(grid: Grid, weight: Tensor, search: str, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`weight` [rows, columns] rounded to nearest: q [rows, columns], and float32 scales [rows, groups]."""
    return quantized_rows(grid, weight, lambda rows: start_scales(grid, rows, search, importance))


def round_to_nearest(given: QuantizationInput, tensors: Iterable[tuple[str, Tensor]]) -> QuantizedWeights:
    """Those of `tensors` that have a grid, rounded to it one by one."""
    q, scales = {}, {}
    for name, tensor in tensors:
        if name in given.grids:
            grid, rows = given.grids[name], tensor.T if name in given.transposed else tensor
            made = rounded(grid, rows, given.spec.scale, given.importance.get(name))
            q[name], scales[name] = (spilled(one, given.room) for one in made)
            give_back(tensor)
    return QuantizedWeights({name: given.grids[name] for name in q}, q, scales, given.spec.method, given.heads & q.keys())


def merged(*parts: QuantizedWeights) -> QuantizedWeights:
    """Disjoint sets of quantized weights as one."""
    grids = {name: grid for part in parts for name, grid in part.grids.items()}
    q = {name: tensor for part in parts for name, tensor in part.q.items()}
    scales = {name: tensor for part in parts for name, tensor in part.scales.items()}
    return QuantizedWeights(grids, q, scales, parts[0].method, frozenset[str]().union(*(part.heads for part in parts)))
