"""Weights pruned one by one: magnitude, Wanda and SparseGPT, a share of each matrix or N of every M neighbours.

The matrices keep their shape, so nothing gets smaller or faster by itself (see Runtime.zeros_note). Pruned is
every linear layer inside the blocks of decoders, encoders and encoder-decoders; embeddings, norms and the head stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from featherweight.checkpoint import opening
from featherweight.errors import RecipeError, StageError
from featherweight.model.architecture import blocks, dimensions
from featherweight.model.blockwise import BATCH, Visit, linears, matrices, visits
from featherweight.model.facts import CheckpointFacts
from featherweight.model.sparsity import UNSTRUCTURED, Sparsity, Zeros
from featherweight.progress import Progress
from featherweight.pruning.interface import Pruned, Pruner, PruningInput
from featherweight.pruning.spec import PruneSpec
from featherweight.spec import Positive, SequenceLength, Share
from featherweight.text.model_inputs import unpadded_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

BLOCK_SIZE = 128
"""Columns that SparseGPT chooses and updates together, as in the paper."""
DAMPENING = 0.01
"""Share of the mean diagonal of the Hessian that SparseGPT adds to it, as in the paper."""


class SparseSpec(PruneSpec):
    """Single weights become zero, in matrices of the same shape: the share `sparsity` of them, or all but N of every M.

    The share is 0.5 where neither it nor a `pattern` such as "2:4" (of neighbours in a row) is said. No engine here is faster for
    it.
    """

    method: Literal["sparse"] = "sparse"
    criterion: Literal["magnitude", "wanda", "sparsegpt"] = "wanda"
    sparsity: Share | None = None
    pattern: Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")] | None = None
    samples: Positive = 64
    sequence: SequenceLength = 128

    @model_validator(mode="before")
    @classmethod
    def _half(cls, value: Any) -> Any:
        return value if not isinstance(value, dict) or value.get("pattern") else {"sparsity": 0.5, **value}

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError("give either sparsity (a share) or pattern ('2:4'), not both")
        kept, _, of = (self.pattern or "1:2").partition(":")
        if int(kept) >= int(of):
            raise ValueError(f"pattern {self.pattern} removes nothing; N:M keeps N of every M weights, as 2:4 does")
        return self


@dataclass(frozen=True)
class Target:
    """What is to go: `share` of the weights, or all but `kept` of every `of` neighbours in a row where `of` is not 0."""

    share: float
    kept: int = 0
    of: int = 0

    @classmethod
    def of_spec(cls, spec: SparseSpec) -> Target:
        """The target of a recipe."""
        if spec.pattern is None:
            return cls(spec.sparsity or 0.5)
        kept, of = (int(part) for part in spec.pattern.split(":"))
        return cls(1 - kept / of, kept, of)

    @property
    def pattern(self) -> str:
        """As `sparsity.json` and reports name it."""
        return f"{self.kept}:{self.of}" if self.of else UNSTRUCTURED

    def require_fitting(self, criterion: str, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise RecipeError for a matrix [rows, columns] that would lose nothing, or whose rows are no whole number of groups."""
        for name, (rows, columns) in shapes.items():
            compared = columns if criterion == "wanda" else rows * columns
            if self.share * compared < 1:
                raise RecipeError(
                    f"prune.sparsity {self.share} removes none of {compared} weights that {criterion} compares in {name}; raise it"
                )
            if self.of and columns % self.of:
                raise RecipeError(
                    f"prune.pattern {self.pattern}: the rows of {name} have {columns} weights, no multiple of "
                    f"{self.of}; take another pattern, or a share with prune.sparsity"
                )


def prune(given: PruningInput[SparseSpec]) -> Pruned:
    """Make the checkpoint sparse, with `sparsity.json` beside it. A metric of its own: `zero_share`.

    Raises RecipeError for a pattern that the matrices do not hold, StageError for an architecture that is not known.
    """
    target = Target.of_spec(given.spec)
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in matrices(given.config).items()}
    target.require_fitting(given.spec.criterion, shapes)
    before = given.loss()
    sparsity = sparsify(given.model, given.spec.criterion, target, given.blocks, given.progress)
    sparsity.write(given.out)
    return Pruned(given.model, opening.parameters(given.model), before, Zeros.of(given.model, sparsity).metrics())


def sparsify(model: PreTrainedModel, criterion: str, target: Target, examples: Tensor, progress: Progress = Progress()) -> Sparsity:
    """Set weights inside the blocks of `model` to zero, in place, by 'magnitude', 'wanda' or 'sparsegpt'.

    examples: calibration blocks (see text.model_inputs), which magnitude does not read. Each block is pruned given what the
    pruned ones before it put out. Raises StageError where what a matrix reads is not finite.
    """
    found = blocks(model)
    if criterion == "magnitude":
        for block in found:
            for linear in linears(block).values():
                _set(linear, magnitude(linear.weight, target))
    else:
        prune_block = {"wanda": by_wanda, "sparsegpt": by_sparsegpt}[criterion]
        for place, visit in enumerate(visits(model, unpadded_inputs(model.config, examples, BATCH))):
            prune_block(visit, target)
            progress.step(place + 1, len(found))
    names = [f"{name}.weight" for block in found for name in linears(block)]
    parameters = dict(model.named_parameters())
    return Sparsity(criterion, target.pattern, {name: (parameters[name] == 0).float().mean().item() for name in names})


def magnitude(weight: Tensor, target: Target) -> Tensor:
    """`weight` [rows, columns] without its smallest entries: of the whole matrix, or of every group of neighbours in a row."""
    import torch
    from torch.nn.utils.prune import L1Unstructured

    weight = weight.detach()
    if not target.of:
        return weight * L1Unstructured(target.share).compute_mask(weight, torch.ones_like(weight))
    groups = weight.view(len(weight), -1, target.of)
    smallest = groups.abs().topk(target.of - target.kept, dim=2, largest=False).indices
    return groups.scatter(2, smallest, 0.0).view_as(weight)


def by_wanda(visit: Visit, target: Target) -> None:
    """|weight| times the norm of the channel that it reads, compared inside each row (Sun et al. 2023)."""
    from llmcompressor.modifiers.pruning.wanda import wanda_sparsify as wanda

    squares = Statistics(wanda.make_empty_row_scalars, wanda.accumulate_row_scalars)
    visit.watch(squares.add)
    for name, linear in linears(visit.block).items():
        sums: dict[nn.Module, Tensor] = {linear: squares.of(name, linear)}
        _set(linear, wanda.sparsify_weight(linear, sums, target.share, target.of - target.kept, target.of))


def by_sparsegpt(visit: Visit, target: Target) -> None:
    """The error of removing a weight when all columns after it make good for it (Frantar, Alistarh 2023)."""
    from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify as sparsegpt

    hessians = Statistics(sparsegpt.make_empty_hessian, sparsegpt.accumulate_hessian)
    visit.watch(hessians.add)
    block_size = BLOCK_SIZE // target.of * target.of if target.of else BLOCK_SIZE
    for name, linear in linears(visit.block).items():
        hessian: dict[nn.Module, Tensor] = {linear: hessians.of(name, linear)}
        removed = (target.share, target.of - target.kept, target.of)
        _set(linear, sparsegpt.sparsify_weight(linear, hessian, *removed, block_size, DAMPENING, False)[1])


class Statistics:
    """What is summed over all that each matrix of a block reads, by llm-compressor's own functions."""

    def __init__(self, empty: Callable[[nn.Module], Tensor], add: Callable[..., tuple[Tensor, int]]) -> None:
        self._empty, self._add = empty, add
        self._found: dict[nn.Module, tuple[Tensor, int]] = {}

    def add(self, linear: nn.Linear, inputs: Tensor) -> None:
        """Take in some inputs [tokens, channels] of `linear`; every token counts alike, whatever the batch."""
        total, seen = self._found.get(linear) or (self._empty(linear), 0)
        # Three dimensions: llm-compressor counts the first one, and here that has to be the tokens.
        self._found[linear] = self._add(inputs.unsqueeze(1), linear, total, seen)

    def of(self, name: str, linear: nn.Linear) -> Tensor:
        """The sum for `linear`, which is forgotten here. Raises StageError where it is not finite."""
        import torch

        total, _ = self._found.pop(linear)
        if not torch.isfinite(total).all():
            raise StageError(f"prune: what {name} reads on the calibration text is not finite; check the checkpoint's weights")
        return total


def _set(linear: nn.Linear, weight: Tensor) -> None:
    linear.weight.data.copy_(weight)


def check(spec: SparseSpec, facts: CheckpointFacts) -> None:
    """Raise RecipeError for a share or pattern that the matrices do not hold, StageError for a model whose blocks are not known."""
    dimensions(facts.config)
    Target.of_spec(spec).require_fitting(spec.criterion, facts.rows_and_columns)


SPARSE = Pruner(SparseSpec, prune, ("llmcompressor",), sparse=True, check=check)
