"""What a recipe says of the checkpoint to start from."""

from __future__ import annotations

from pydantic import model_validator

from featherweight.spec import Spec, Task
from featherweight.training.spec import TrainSpec


class CheckpointSpec(Spec):
    """Either `source` (a checkpoint to load) or `train` (one to make)."""

    source: str | None = None
    train: TrainSpec | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_of(self) -> CheckpointSpec:
        if (self.source is None) == (self.train is None):
            raise ValueError("give exactly one of 'source' and 'train'")
        return self


class LoadSpec(CheckpointSpec):
    """A checkpoint, and what the recipe wants it to do, which its architecture must be made for."""

    task: Task = "text-generation"
