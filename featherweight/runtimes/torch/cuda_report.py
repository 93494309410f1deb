"""What PyTorch finds on the GPUs of this machine, asked in a process of its own: bandwidth, and which attention it takes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from featherweight.system.child_process import Channel, ChildProcess, failure

PATIENCE_S = 180.0
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DeviceReport:
    """One GPU as CUDA counts them. bandwidth: of copies within its memory, see featherweight/system/gpu_bandwidth.py.

    attention: the kernel that scaled_dot_product_attention takes, by dtype, 'alone' and 'grouped' (see attention_backend.py).
    """

    name: str
    compute_capability: tuple[int, int]
    memory_bandwidth_bytes_s: float
    attention: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class CudaReport:
    """torch's version, the CUDA that it was built for (empty for CPUs alone), cuDNN's version; reason: why there is no more."""

    torch: str = ""
    cuda: str = ""
    cudnn: int | None = None
    architectures: tuple[str, ...] = ()
    devices: tuple[DeviceReport, ...] = ()
    reason: str = ""


def ask() -> CudaReport:
    """Ask a child, which takes some seconds; whatever goes wrong there is the reason."""
    child = ChildProcess([sys.executable, "-m", "featherweight.runtimes.torch.cuda_report"], os.environ)
    try:
        answer = child.receive(PATIENCE_S)
    except TimeoutError as error:
        child.kill()
        return CudaReport(reason=str(error))
    finally:
        child.close()
    if answer is None:
        return CudaReport(reason=f"the process that asked ended ({child.ending()})")
    return _read(answer)


def _read(answer: Mapping[str, Any]) -> CudaReport:
    """The inverse of `asdict` and a trip through JSON."""
    devices = tuple(DeviceReport(**{**one, "compute_capability": tuple(one["compute_capability"])}) for one in answer["devices"])
    return CudaReport(**{**answer, "devices": devices, "architectures": tuple(answer["architectures"])})


def look() -> CudaReport:
    """The same in this process."""
    import torch

    told: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda or ""}
    if not torch.cuda.is_available():
        return CudaReport(**told, reason="built for CPUs only" if not told["cuda"] else "torch reaches no GPU here")
    devices = tuple(_device(index) for index in range(torch.cuda.device_count()))
    return CudaReport(
        **told, cudnn=torch.backends.cudnn.version(), architectures=tuple(torch.cuda.get_arch_list()), devices=devices
    )


def _device(index: int) -> DeviceReport:
    import torch

    from featherweight.runtimes.torch.attention_backend import kernels_of
    from featherweight.system.gpu_bandwidth import copy_bandwidth_bytes_s

    device = f"cuda:{index}"
    attention = {name: kernels_of(device, getattr(torch, name)) for name in DTYPES}
    capability = torch.cuda.get_device_capability(index)
    return DeviceReport(torch.cuda.get_device_name(index), capability, copy_bandwidth_bytes_s(device), attention)


def _report() -> dict[str, Any]:
    try:
        return asdict(look())
    except Exception as error:
        return asdict(CudaReport(reason=failure(error)["text"]))


if __name__ == "__main__":
    Channel.claim_stdout().send(_report())
