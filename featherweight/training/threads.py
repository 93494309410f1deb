"""How many threads a training computes with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from featherweight.system.machine import available_cores, physical_cores


def training_threads() -> int:
    """Threads that torch trains with: the cores in reach, and no more than OMP_NUM_THREADS allows.

    torch counts the machine's cores itself, but not a container's CPU quota: there it would start more threads than it may run.
    """
    told = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores(), int(told)) if told.isdigit() and int(told) else cores()


def cores() -> int:
    """Cores that this process may compute on; two hyper-threads of one share the arithmetic that training is made of."""
    return min(available_cores(), physical_cores())


@contextmanager
def all_cores() -> Iterator[None]:
    """torch computes with `training_threads` inside, and with as many as before afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(training_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)
