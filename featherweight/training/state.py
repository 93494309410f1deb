"""What a training run remembers: the losses so far, and all that it needs to go on after a kill as if nothing had happened."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.training.data_parallel import DataParallelGroup
from featherweight.training.sharding import as_part, part

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from featherweight.training.muon import Muon

FILE = "training.safetensors"
SAVE_EVERY_S = 60.0
"""Wall time between two saves. A kill then costs a minute whatever the model's size; a number of steps would mean seconds for
one model and hours for another. Saving reads nothing but memory and does not change the result."""


@dataclass
class Record:
    """The course of a run. `held_out`: held-out losses by the number of steps done before they were measured."""

    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    resumed_at: int = 0

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def best_step(self) -> int | None:
        """Steps done when the held-out loss was lowest (the first such); None where it was never measured."""
        return min(self.held_out, key=lambda step: (self.held_out[step], step)) if self.held_out else None

    def stalled(self, patience: int | None) -> bool:
        """Whether the last `patience` measurements all stayed above the best one."""
        if patience is None or self.best_step is None:
            return False
        return sum(step > self.best_step for step in self.held_out) >= patience


class TrainingState:
    """A model, its optimizer and the record of their run, written whole to one safetensors file and read back bit by bit.

    identity: tells this run from any other; a file of another one is never taken up.
    group: the processes that train together. The first writes for all; where the model is sharded, each writes its part.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | Muon, record: Record, identity: str, group: DataParallelGroup
    ) -> None:
        self.group = group
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.buffers = dict(model.named_buffers())
        self.optimizer, self.record, self.identity = optimizer, record, identity
        self.best: dict[str, Tensor] = {}

    def keep_best(self) -> None:
        """Remember the present weights as the best ones."""
        self.best = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def restore_best(self) -> None:
        """Put the best weights back, where any were remembered."""
        _copy(self.best, self.weights)

    def save(self, folder: Path, noise: Tensor) -> None:
        """Write everything to `folder`, replacing what was there at once: a kill leaves what was there, or the new, whole.

        noise: the states of the random number generators, uint8 [processes, bytes].
        """
        if self.group.sharded:
            self._write(folder, self._part_of(self.record.step), noise)
            self.group.add(0)  # by now every part is there
            for old in folder.glob(self._part_of("*")):
                if old.name != self._part_of(self.record.step):
                    old.unlink()
        elif self.group.rank == 0:
            self._write(folder, FILE, noise)

    def _part_of(self, step: int | str) -> str:
        """Name of the file of this process's part after so many steps."""
        return f"{step}-{self.group.rank}-{FILE}"

    def _write(self, folder: Path, name: str, noise: Tensor) -> None:
        from safetensors.torch import save_file

        tensors = {
            **{f"weight.{name}": weight.detach() for name, weight in self.weights.items()},
            **{f"buffer.{name}": buffer.clone() for name, buffer in self.buffers.items()},  # some share their memory
            **{f"best.{name}": weight for name, weight in self.best.items()},
            **{f"optimizer.{index}.{key}": value for index, key, value in _moments(self.optimizer)},
            "noise": noise,
        }
        record = {"losses": self.record.losses, "held_out": list(self.record.held_out.items())}
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{name}.{os.getpid()}"
        save_file(
            {name: part(tensor).contiguous() for name, tensor in tensors.items()},
            unfinished,
            {"identity": self.identity, "record": json.dumps(record)},
        )
        unfinished.replace(folder / name)

    def load(self, folder: Path) -> Tensor | None:
        """Take up the run that was saved in `folder` and return its noise; None where there is none, or only that of another."""
        from safetensors import SafetensorError, safe_open

        name = self._newest(folder) if self.group.sharded else FILE
        try:
            with safe_open(folder / name, "pt") as file:
                if file.metadata()["identity"] != self.identity:
                    return None
                # Cloned: what safetensors maps is not aligned as torch's own memory is, and kernels may round by alignment.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
                record = json.loads(file.metadata()["record"])
        except (OSError, SafetensorError):
            return None
        self._take(tensors)
        self.record.losses[:] = record["losses"]
        self.record.held_out.update((int(step), loss) for step, loss in record["held_out"])
        self.record.resumed_at = self.record.step
        return tensors["noise"]

    def _newest(self, folder: Path) -> str:
        """The newest part of this process whose others are there too: a kill may have come between two."""
        steps = [{int(path.name.partition("-")[0]) for path in folder.glob(f"*-{rank}-{FILE}")} for rank in range(self.group.size)]
        return self._part_of(max(set.intersection(*steps), default=0))

    def _take(self, tensors: dict[str, Tensor]) -> None:
        groups: dict[str, dict[str, Tensor]] = {"weight": {}, "buffer": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            groups.setdefault(kind, {})[rest] = tensor
        _copy(groups["weight"], self.weights)
        _copy(groups["buffer"], self.buffers)
        self.best = {
            name: as_part(tensor.to(self.weights[name].device), self.weights[name]) for name, tensor in groups["best"].items()
        }
        moments: dict[int, dict[str, Tensor]] = {}
        trained = dict(enumerate(weight for group in self.optimizer.param_groups for weight in group["params"]))
        for name, tensor in groups["optimizer"].items():
            index, _, key = name.partition(".")
            of_a_weight = tensor.ndim > 0 and key != "average"  # of those Muon has one for several
            moments.setdefault(int(index), {})[key] = as_part(tensor, trained[int(index)]) if of_a_weight else tensor
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})


class Saver:
    """Decides when a run is saved: every `every_s` seconds of wall time."""

    def __init__(self, every_s: float) -> None:
        self._every_s, self._saved = every_s, time.monotonic()

    def due(self) -> bool:
        """Whether the last save lies far enough back."""
        return time.monotonic() - self._saved >= self._every_s

    def done(self) -> None:
        """A save was finished now."""
        self._saved = time.monotonic()


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    import torch

    with torch.no_grad():
        for name, tensor in source.items():
            part(target[name]).copy_(part(tensor))


def _moments(optimizer: Optimizer | Muon) -> list[tuple[int, str, Tensor]]:
    """The optimizer's tensors: (index of the weight, name, tensor)."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return [(index, key, value) for index, values in state.items() for key, value in values.items()]
