"""The processes and devices that train one model together: one by default, several through `accelerate`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from featherweight.errors import StageError
from featherweight.system import device
from featherweight.training.sharding import Shards, is_part

if TYPE_CHECKING:
    from torch import Tensor, nn

LAUNCHED = "WORLD_SIZE"
"""The variable by which torch's and accelerate's launchers tell a process how many there are."""


class DataParallelGroup:
    """This process among those that train together: `rank` of `size`.

    Each holds a whole copy of the model, whose gradients are summed here, by hand, and not by DDP's hooks on the model's forward:
    a loss function closes over the bare model, and may run a teacher beside it. Where the model is `sharded`, each holds its part.
    """

    def __init__(self, sharded: bool = False) -> None:
        self._accelerator = _accelerator()
        self.sharded = sharded and self._accelerator is not None
        self._shards: Shards | None = None
        self.rank = self._accelerator.process_index if self._accelerator else 0
        self.size = self._accelerator.num_processes if self._accelerator else 1

    def place(self, model: nn.Module) -> None:
        """Move the model to this process's own device; one that trains alone leaves it where it lives."""
        if self._accelerator and self.sharded:
            self._shards = Shards(model, self._accelerator.device, self.size)
        elif self._accelerator:
            model.to(self._accelerator.device)
            self._require_alike(model)

    def gather(self) -> None:
        """Put a sharded model together, in the memory of the first process; the weights of the others have no values then."""
        if self._shards:
            self._shards.gather(keep=self.rank == 0)

    def _require_alike(self, model: nn.Module) -> None:
        """Raise StageError where the processes begin with different weights: what each trains would be none of them."""
        import torch

        own = torch.stack([weight.detach().double().sum() for weight in model.parameters()])
        if self.size > 1 and not torch.equal(*self.rows(own).aminmax(dim=0)):
            raise StageError("the processes that train together begin with different weights; train in one process")

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of `rows`; the parts differ by one row at most."""
        return rows.tensor_split(self.size)[self.rank]

    def even(self, part: Tensor, rows: Tensor) -> Tensor:
        """`part` of `rows`, filled up to the longest part where the model is sharded: no process can compute without the others."""
        import torch

        missing = -(-len(rows) // self.size) - len(part) if self.sharded else 0
        return torch.cat([part, rows[:missing]]) if missing else part

    def add_gradients(self, weights: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over the processes; those of a sharded model are summed already."""
        if self.size > 1:
            for weight in weights:
                if weight.grad is not None and not is_part(weight):
                    weight.grad.copy_(self._sum(weight.grad))

    def add(self, *values: float) -> list[float]:
        """Sums of the values over the processes, the same in each."""
        import torch

        if self.size == 1:
            return list(values)
        assert self._accelerator
        return self._sum(torch.tensor(values, dtype=torch.float64, device=self._accelerator.device)).tolist()

    def rows(self, row: Tensor) -> Tensor:
        """One row of every process: [size, ...], the same in each."""
        if self.size == 1:
            return row[None]
        assert self._accelerator
        return self._accelerator.gather(row[None].to(self._accelerator.device)).cpu()

    def end(self) -> None:
        """Part once all have come here: a process whose fellow has gone is aborted by gloo, whatever it has done."""
        if self._accelerator and self.size > 1:
            self._accelerator.wait_for_everyone()
            self._accelerator.end_training()

    def _sum(self, tensor: Tensor) -> Tensor:
        assert self._accelerator
        return self._accelerator.reduce(tensor, reduction="sum")


def launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return int(os.environ.get(LAUNCHED, "1")) > 1


def leads() -> bool:
    """Whether this process is the one that writes what all have made: the only one, or the first."""
    return int(os.environ.get("RANK", "0")) == 0


def _accelerator() -> Any:
    """accelerate's view of this process, None for a single one, which needs nothing of it."""
    if not launched():
        return None
    from accelerate import Accelerator

    return Accelerator(cpu=device.current() == device.CPU)
