"""Where a model lives, computes and is served: the one place that decides it. Nothing else speaks of CUDA on its own.

A node of a plan computes on one device, which the plan has chosen by the recipe's `device` (`resolve`); while it runs, `using`
tells all that it calls, and the processes that it starts read the same from FEATHERWEIGHT_DEVICE. Whoever is not told takes the
GPU where there is one. No library is imported for the choice.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from featherweight.errors import RecipeError, ToolchainError
from featherweight.system.gpu import driver, visible_names
from featherweight.system.machine import Machine, describe, gpus

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Device = Literal["cpu", "cuda"]
Wanted = Literal["auto", "cpu", "cuda"]
CPU: Device = "cpu"
CUDA: Device = "cuda"
VARIABLE = "FEATHERWEIGHT_DEVICE"
"""What `auto` means in this process and its children, where it is set: cpu, cuda or auto."""

GPU_PEAK = "stage_peak_gpu_memory_bytes"
"""The metric of what a stage's tensors took of its GPU at most, in bytes; of several processes, the first."""

SIDE_BY_SIDE = "FEATHERWEIGHT_SIDE_BY_SIDE"
"""How many stages may run at once: a number, or auto for one on each GPU. One by default."""
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Place:
    """Where one of `of` stages that run side by side computes: on a GPU by its number, or with its share of the cores."""

    gpu: str | None
    of: int


Model = TypeVar("Model", bound="nn.Module")
_in_use: ContextVar[Device | None] = ContextVar("device", default=None)
_place: ContextVar[Place | None] = ContextVar("place", default=None)


def resolve(wanted: Wanted = "auto", machine: Machine | None = None) -> Device:
    """The device that `wanted` stands for on `machine`, this one by default: `auto` is the GPU where there is one.

    Raises ToolchainError, in one line, for `cuda` where it cannot be had.
    """
    asked = _by_environment() if wanted == "auto" else wanted
    if asked == CPU:
        return CPU
    reason = cuda_refusal(machine)
    if reason is None:
        return CUDA
    if asked == CUDA:
        raise ToolchainError(f"device: cuda cannot be had: {reason}; say device: cpu or auto")
    return CPU


def seen_from(device: Device, machine: Machine) -> Machine:
    """`machine` as it is for what lives on `device`: on the CPU its GPUs decide nothing."""
    return replace(machine, gpus=()) if device == CPU else machine


def cuda_refusal(machine: Machine | None = None) -> str | None:
    """Why nothing can run on a GPU of `machine`, this one by default; None where it can."""
    here = machine is None or machine == describe()
    if not (gpus() if machine is None else machine.gpus):
        return _no_gpu() if here else "that machine has no CUDA GPU"
    return None if not here or _torch_has_cuda() else "the torch that is installed is built for CPUs only"


def _no_gpu() -> str:
    """What is said of this machine, with what its driver tells."""
    reason = driver().reason
    return f"this machine has no CUDA GPU in reach: {reason}" if reason else "this machine has no CUDA GPU"


def current() -> Device:
    """The device that this process is to use now: the node's that it runs, else what `auto` is here."""
    return _in_use.get() or resolve()


@contextmanager
def using(device: Device | None) -> Iterator[None]:
    """All that is called inside uses `device`; None leaves what was."""
    token = _in_use.set(device or _in_use.get())
    try:
        yield
    finally:
        _in_use.reset(token)


def told() -> dict[str, str]:
    """What the environment of a child process has to say, so that it uses this process's device."""
    return {VARIABLE: current()} | visible()


def visible() -> dict[str, str]:
    """What the environment of a child process has to say, so that it sees the one GPU of this stage's place."""
    here = place_in_use()
    return {VISIBLE: here.gpu} if here and here.gpu is not None else {}


def places() -> tuple[Place, ...]:
    """Where stages run side by side here; a single one where they run one after the other."""
    cuda = resolve() == CUDA
    seen, count = os.environ.get(VISIBLE), len(gpus()) if cuda else 0
    there = (visible_names(seen) if seen else [str(number) for number in range(count)])[:count]
    count = stages_side_by_side(auto=max(1, len(there)))
    if cuda and count > len(there):
        raise RecipeError(f"{SIDE_BY_SIDE} is {count}, and {len(there)} GPUs are in reach; one stage runs on each")
    return tuple(Place(there[number] if cuda and count > 1 else None, count) for number in range(count))


def stages_side_by_side(auto: int | None = None) -> int:
    """How many stages share a machine: FEATHERWEIGHT_SIDE_BY_SIDE, or 1; `auto` is the count that this word stands for, if for any.

    Raises:
        RecipeError: it is neither a number above zero nor that word.
    """
    told = os.environ.get(SIDE_BY_SIDE, "").strip() or "1"
    if told == "auto" and auto is not None:
        return auto
    if not (told.isdecimal() and int(told)):
        also = "" if auto is None else ", or auto for the number of GPUs"
        raise RecipeError(f"{SIDE_BY_SIDE} is '{told}'; it takes how many stages share a machine, from 1 on{also}")
    return int(told)


def place_in_use() -> Place | None:
    """Where this stage runs beside others; None where it runs alone."""
    return _place.get()


@contextmanager
def at(place: Place | None) -> Iterator[None]:
    """What is called inside computes at `place`, in processes of its own."""
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


def torch_device(device: Device | None = None) -> torch.device:
    """`device`, by default the one in use, in torch's terms. Raises ToolchainError where torch cannot reach the GPU."""
    import torch

    device = device or current()
    if device == CUDA and not torch.cuda.is_available():
        raise ToolchainError(f"torch {torch.__version__} cannot use this machine's GPU; update its driver, or say device: cpu")
    return torch.device(device)


def place(model: Model, device: Device | None = None) -> Model:
    """`model`, moved to `device`, by default the one in use."""
    import torch

    torch.nn.Module.to(model, torch_device(device))
    return model


def on_cpu(model: Model) -> Model:
    """`model`, moved to main memory, where every converter expects tensors: given a GPU's address, a native one crashes."""
    return place(model, CPU)


def count() -> int:
    """GPUs in reach; 0 where the device in use is the CPU."""
    import torch

    return torch.cuda.device_count() if current() == CUDA else 0


def synchronize(where: torch.device) -> None:
    """Wait until all that was asked of `where` is done: a GPU's kernels run behind the calls that start them."""
    import torch

    if where.type == CUDA:
        torch.cuda.synchronize(where)


def random_state(where: torch.device) -> Tensor:
    """The states of torch's random number generators that a model on `where` draws from, uint8, in one row."""
    import torch

    return torch.cat([torch.get_rng_state(), *([torch.cuda.get_rng_state(where)] if where.type == CUDA else [])])


def set_random_state(state: Tensor, where: torch.device) -> None:
    """Put back what `random_state` gave."""
    import torch

    size = len(torch.get_rng_state())
    # torch reads a generator's state from the start of the memory that the tensor lies in.
    torch.set_rng_state(state[:size].clone())
    if where.type == CUDA:
        torch.cuda.set_rng_state(state[size:].clone(), where)


class GpuPeak:
    """The most that the tensors of this process take of its GPU from here on."""

    def __init__(self) -> None:
        if torch := _torch_on_gpu():
            torch.cuda.reset_peak_memory_stats()

    def metrics(self) -> dict[str, float]:
        """`stage_peak_gpu_memory_bytes`, where this process has computed on a GPU."""
        torch = _torch_on_gpu()
        return {GPU_PEAK: float(torch.cuda.max_memory_allocated())} if torch else {}


def _torch_on_gpu() -> Any:
    """torch where it computes on a GPU in this process; asking starts nothing there."""
    torch = sys.modules.get("torch")
    return torch if torch and torch.cuda.is_initialized() else None


def peak_bytes(where: torch.device) -> int | None:
    """The most that torch's tensors of this process have taken of a GPU's memory, in bytes; None on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated(where) if where.type == CUDA else None


def _by_environment() -> Wanted:
    said = os.environ.get(VARIABLE, "").strip().lower() or "auto"
    for known in get_args(Wanted):
        if said == known:
            return known
    raise RecipeError(f"{VARIABLE} is '{said}'; it takes {', '.join(get_args(Wanted))}")


@cache
def _torch_has_cuda() -> bool:
    """Whether the torch that is installed was built with CUDA: by its version.py, since importing it takes a second."""
    found = find_spec("torch")
    file = Path(found.origin).with_name("version.py") if found and found.origin else None
    if file is None or not file.is_file():
        return False
    values: dict[str, object] = {}
    for line in file.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals:
            values[name.partition(":")[0].strip()] = value.strip()
    return values.get("cuda", "None") != "None"
