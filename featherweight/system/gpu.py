"""NVIDIA's GPUs as its driver tells of them, through NVML (nvidia-ml-py, a binding without compiled code); torch is not imported.

`nvml` is the module `pynvml` everywhere, given by tests alone. Nothing raises: without a driver, or with a broken one, there are no
GPUs, and a reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

Capability = tuple[int, int]
DEVICES = ("/dev/nvidia", "/dev/dxg")
"""What a process with GPU memory holds open, the second on Windows' Linux."""
UUIDS = ("GPU-", "MIG-")
NUMBER = re.compile(r"\+?([0-9]+)")
NO_DRIVER = "there is no NVIDIA driver"
LIBRARY_NOT_FOUND = 12
"""NVML_ERROR_LIBRARY_NOT_FOUND of nvml.h."""


@dataclass(frozen=True)
class Gpu:
    """An accelerator. memory_bytes: all of it. compute_capability: (major, minor) as CUDA counts, None where it is not told."""

    name: str
    memory_bytes: int
    compute_capability: Capability | None = None

    @property
    def sm(self) -> str:
        """The name of its architecture in CUDA's words, as 'sm_90'; empty where it is not known."""
        return "sm_{}{}".format(*self.compute_capability) if self.compute_capability else ""


@dataclass(frozen=True)
class Driver:
    """What the driver tells. cuda: the newest CUDA that it runs, (major, minor). reason: why there is nothing, or not all."""

    version: str = ""
    cuda: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()
    reason: str = ""


def driver(nvml: Any = None) -> Driver:
    """The driver of this machine and the GPUs that CUDA_VISIBLE_DEVICES leaves; empty, with a reason, where there is none."""
    try:
        with _session(nvml) as answers:
            cuda = answers.nvmlSystemGetCudaDriverVersion_v2()
            wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
            gpus = _visible(answers, wanted)
            version, reason = answers.nvmlSystemGetDriverVersion(), ""
            if not gpus and wanted is not None:
                reason = f"CUDA_VISIBLE_DEVICES is '{wanted}', which shows none of its GPUs"
            return Driver(version, (cuda // 1000, cuda % 1000 // 10), tuple(_gpu(answers, one) for one in gpus), reason)
    except _Silent as silent:
        return Driver(reason=str(silent))


def process_memory_bytes(pid: int, nvml: Any = None) -> int | None:
    """Bytes that a process and its children hold on all GPUs now; None where NVML cannot tell.

    It cannot where the driver keeps no count by process (Windows, some virtual GPUs), and where it lists the processes of a
    container under the numbers that they have outside.
    """
    family = _family(pid)
    try:
        with _session(nvml) as answers:
            handles = _handles(answers)
            listed = [one for handle in handles for one in answers.nvmlDeviceGetComputeRunningProcesses(handle)]
    except _Silent:
        return None
    held = [one.usedGpuMemory for one in listed if one.pid in family]
    if None in held or (not held and any(map(_may_hold_memory, family))):
        return None
    return sum(held)


def memory_in_use_bytes(nvml: Any = None) -> int | None:
    """Bytes that anybody holds now on the GPUs that CUDA_VISIBLE_DEVICES leaves; None where NVML does not answer."""
    try:
        with _session(nvml) as answers:
            handles = _visible(answers, os.environ.get("CUDA_VISIBLE_DEVICES"))
            return sum(int(answers.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles)
    except _Silent:
        return None


def energy_j(nvml: Any = None) -> float | None:
    """Joules that these GPUs have used since the driver was loaded; None where NVML does not tell (it does from Volta on)."""
    try:
        with _session(nvml) as answers:
            handles = _visible(answers, os.environ.get("CUDA_VISIBLE_DEVICES"))
            return sum(answers.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1000 if handles else None
    except _Silent:
        return None


class _Silent(Exception):
    """NVML does not answer; why."""


@contextmanager
def _session(nvml: Any) -> Iterator[Any]:
    """NVML between its start and its end; whatever goes wrong with it is _Silent."""
    try:
        nvml = nvml or _binding()
        nvml.nvmlInit()
    except ImportError as error:
        raise _Silent("nvidia-ml-py, which asks the driver, is not installed") from error
    except nvml.NVMLError as error:
        absent = getattr(error, "value", None) == LIBRARY_NOT_FOUND
        raise _Silent(NO_DRIVER if absent else f"NVIDIA's driver does not answer: {error}") from error
    try:
        yield nvml
    except nvml.NVMLError as error:
        raise _Silent(f"NVIDIA's driver answers in part only: {error}") from error
    finally:
        _end(nvml)


def _binding() -> Any:
    import pynvml

    return pynvml


def _end(nvml: Any) -> str:
    """Close NVML; the reason where a driver that broke in between does not even close."""
    try:
        nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        return str(error)
    return ""


def _handles(nvml: Any) -> list[Any]:
    return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]


def _visible(nvml: Any, wanted: str | None) -> list[Any]:
    """The GPUs that CUDA would show for a value of CUDA_VISIBLE_DEVICES: by number or UUID, none behind one that is not there.

    One that is named twice leaves none at all (so torch.cuda has it). NVML counts by PCI bus, as CUDA does under
    CUDA_DEVICE_ORDER=PCI_BUS_ID, and where all GPUs are alike.
    """
    handles = _handles(nvml)
    if wanted is None:
        return handles
    chosen: list[Any] = []
    for name in visible_names(wanted):
        found = _named(nvml, handles, name)
        if found is None:
            break
        if found in chosen:
            return []
        chosen.append(found)
    return chosen


def visible_names(wanted: str) -> list[str]:
    """What a value of CUDA_VISIBLE_DEVICES names: UUIDs, or numbers, of which CUDA reads the digits that they begin with."""
    names = [part.strip() for part in wanted.split(",")]
    if wanted.startswith(UUIDS):
        return list(takewhile(lambda name: name.startswith(UUIDS), names))
    numbers = (NUMBER.match(name) for name in names)
    return [number.group(1) for number in takewhile(bool, numbers) if number]


def _named(nvml: Any, handles: list[Any], name: str) -> Any:
    """A GPU by its number, by a beginning of its UUID alone, or a slice (MIG) by its whole UUID; None where there is none."""
    if name.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(name)
    if not name.startswith(UUIDS):
        return handles[int(name)] if name and int(name) < len(handles) else None
    found = [handle for handle in handles if nvml.nvmlDeviceGetUUID(handle).startswith(name)]
    return found[0] if len(found) == 1 else None


def _gpu(nvml: Any, handle: Any) -> Gpu:
    capability = tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle))
    return Gpu(nvml.nvmlDeviceGetName(handle), int(nvml.nvmlDeviceGetMemoryInfo(handle).total), capability)


def _family(pid: int) -> set[int]:
    """A process and all below it."""
    import psutil

    try:
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    except psutil.NoSuchProcess:
        return {pid}


def _may_hold_memory(pid: int) -> bool:
    """Whether a process has a GPU open; without that it holds no memory there, whatever it is called in NVML's list."""
    try:
        return any(str(one.readlink()).startswith(DEVICES) for one in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return not Path("/proc/self/fd").exists()
