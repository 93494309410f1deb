"""How a model is trained: the one thing that a caller of the training loop fills in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from featherweight.training.state import SAVE_EVERY_S

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HeldOut:
    """Text that training does not see, token ids [blocks, length], and when to measure the loss on it.

    every: steps between two measurements; one more is taken before the first step and one after the last.
    patience: stop after so many measurements in a row above the best one; None never stops.
    """

    blocks: Tensor
    every: int
    patience: int | None = None

    def due(self, step: int, steps: int) -> bool:
        """Whether to measure after `step` of `steps`."""
        return step % self.every == 0 or step == steps


@dataclass(frozen=True)
class TrainingPlan:
    """The steps of a training run, how each is computed, and when it is measured and saved.

    steps, batch: optimizer steps, and the blocks that each of them reads.
    optimizer: AdamW, or Muon for the decoder's matrices, which learns from nothing in far fewer steps (see training.muon).
    learning_rate: the peak. warmup: share of the steps over which the rate rises linearly; after it a cosine falls to
        `final_share` of the peak.
    weight_decay: for matrices only, never for norms and biases. grad_clip: the highest norm of the whole gradient.
    accumulate: parts that a batch is computed in, one after the other: less memory, the same step.
    held_out: text to measure on while training. The weights of the best measurement are kept, not the last ones.
    scratch: folder in which the run is saved every `save_every_s` seconds, and from which a killed one goes on with the
        same bits; the caller deletes it when the run's result is safe.
    sharded: of several processes each holds a part of weights, gradients and moments (training.sharding). Afterwards the first
        has the whole model, in main memory, and the others one without values.
    """

    steps: int
    batch: int
    learning_rate: float
    optimizer: Literal["adamw", "muon"] = "adamw"
    warmup: float = 0.05
    final_share: float = 0.1
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    accumulate: int = 1
    held_out: HeldOut | None = None
    scratch: Path | None = None
    save_every_s: float = SAVE_EVERY_S
    seed: int = 0
    sharded: bool = False

    @property
    def patience(self) -> int | None:
        """Measurements above the best one after which training stops; None where it never stops early."""
        return self.held_out.patience if self.held_out else None
