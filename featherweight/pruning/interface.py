"""What a pruning method is: what it is given, and what it gives back.

To add one: a file with its spec, its `prune` and a `Pruner` that names them, and a line in catalog.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from featherweight.checkpoint import opening
from featherweight.model.facts import CheckpointFacts
from featherweight.model.parent import Parent
from featherweight.progress import Progress
from featherweight.pruning.spec import PruneSpec
from featherweight.text.model_inputs import example_blocks
from featherweight.training.losses import mean_loss

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel


SpecT = TypeVar("SpecT", bound=PruneSpec)
SpecT_co = TypeVar("SpecT_co", bound=PruneSpec, covariant=True)


@dataclass(frozen=True)
class PruningInput(Generic[SpecT_co]):
    """One pruning. The weights and the text are read when first asked for: a method refuses what it can from `config` before.

    out: the folder of the result, for what a method keeps beside the checkpoint.
    text: what the recipe trains on, for a method that says that it `reads_text`.
    """

    spec: SpecT_co
    checkpoint: Path
    calibration: Path
    out: Path
    seed: int
    progress: Progress
    text: Path | None = None

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The checkpoint's config."""
        return opening.load_config(self.checkpoint)

    @cached_property
    def blocks(self) -> Tensor:
        """`spec.samples` blocks of calibration text (see featherweight.text.model_inputs), spread over many documents."""
        return sample_blocks(self.spec, self.checkpoint, self.calibration, self.seed)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The checkpoint's model, float32, which a method may change."""
        return opening.load_model(self.checkpoint)

    def loss(self) -> float:
        """Mean loss of `model`, as it is now, on the calibration blocks (nats per token)."""
        return mean_loss(self.model, self.blocks)


@dataclass(frozen=True)
class Pruned:
    """What a method made: the model to save; size and loss of the checkpoint before; the method's own metrics.

    tokenizer: where the result has another one, what writes it and the other companions to the result's folder. blocks: the
    calibration blocks in its tokens, on which `loss_before` was taken.
    """

    model: PreTrainedModel
    parameters_before: int
    loss_before: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    tokenizer: Callable[[Path], None] | None = None
    blocks: Tensor | None = None


def nothing_refused(spec: PruneSpec, parent: Parent) -> str | None:
    """What a method says that handles every checkpoint, or judges by its facts alone."""
    return None


def nothing_checked(spec: PruneSpec, facts: CheckpointFacts) -> None:
    """What a method does that takes a checkpoint of any size."""


def gradient_operations(spec: PruneSpec, parameters: int) -> float:
    """What it costs to see the calibration text once, forward and backward."""
    return 6.0 * parameters * spec.samples * spec.sequence


@dataclass(frozen=True)
class Pruner(Generic[SpecT]):
    """All that is known of a method.

    spec: the recipe's keys that it reads. prune: makes the smaller or sparser model; it refuses what the config tells it.
    libraries: distributions whose versions shape its result, beside torch and transformers.
    refusal: why it cannot handle a checkpoint, in one line that names both; asked by the plan, and again once the model type is
        known.
    check: raises FeatherweightError where the sizes of the checkpoint do not allow what the spec asks for: `prune` does so too,
        and the plan asks before anything runs.
    operations: floating-point operations that it takes for a model of so many parameters.
    sparse: the result has zeros that are to stay.
    reads_text: it reads what the recipe trains on, beside the calibration text.
    other_tokens: the result has another tokenizer, so that it is no student of the checkpoint.
    """

    spec: type[SpecT]
    prune: Callable[[PruningInput[SpecT]], Pruned]
    libraries: tuple[str, ...] = ()
    refusal: Callable[[SpecT, Parent], str | None] = nothing_refused
    operations: Callable[[SpecT, int], float] = gradient_operations
    sparse: bool = False
    check: Callable[[SpecT, CheckpointFacts], object] = nothing_checked
    reads_text: bool = False
    other_tokens: bool = False


def sample_blocks(spec: PruneSpec, checkpoint: Path, calibration: Path, seed: int) -> Tensor:
    """`spec.samples` blocks of calibration text, spread over many documents."""
    import torch

    blocks = example_blocks(
        checkpoint, opening.load_config(checkpoint), calibration, spec.sequence, limit=32 * spec.samples, seed=seed
    )
    spread = torch.linspace(0, len(blocks) - 1, min(spec.samples, len(blocks))).round().long()
    return blocks[spread]
