"""What the doctor finds of NVIDIA's GPUs: the driver's word, PyTorch's, and the libraries that an engine wants there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from featherweight.runtimes.ctranslate2 import cublas
from featherweight.runtimes.findings import GIB, Check
from featherweight.runtimes.torch.cuda_report import CudaReport, DeviceReport, ask
from featherweight.system import toolchains
from featherweight.system.gpu import NO_DRIVER, Capability, Driver, Gpu, driver

CPU_BUILD = "install torch's build for CUDA: `make setup` takes it where nvidia-smi lists a GPU"


@dataclass(frozen=True)
class GpuFindings:
    """driver: NVML's answers. report: PyTorch's, who is asked only where there is a GPU. cublas_12: where CTranslate2's is."""

    driver: Driver
    report: CudaReport
    cublas_12: str = ""

    @classmethod
    def here(cls) -> GpuFindings:
        """Of this machine."""
        told = driver()
        if not told.gpus:
            return cls(told, CudaReport(torch=_torch_version(), reason="no GPU to be asked"))
        return cls(told, ask(), str(cublas.find() or ""))

    def checks(self) -> Iterator[Check]:
        """One line a subject; those of a GPU only where there is one."""
        yield self._driver()
        yield Check("GPUs", "ok", "; ".join(map(_described, self.driver.gpus)) or "none; every engine runs on the CPU")
        if not self.driver.gpus:
            return
        yield self._torch()
        for number, device in enumerate(self.report.devices):
            place = f" {number}" if len(self.report.devices) > 1 else ""
            yield _bandwidth(f"GPU{place} memory bandwidth", device)
            yield Check(f"GPU{place} attention", "ok", _attention(device))
        yield self._cublas()

    def _driver(self) -> Check:
        told = self.driver
        if told.version and told.cuda:
            hidden = "" if told.gpus else "; no GPU is in reach (CUDA_VISIBLE_DEVICES)"
            return Check("NVIDIA driver", "ok", f"{told.version}, runs CUDA up to {told.cuda[0]}.{told.cuda[1]}{hidden}")
        if told.reason == NO_DRIVER:
            return Check("NVIDIA driver", "ok", "none")
        broken = "see what nvidia-smi says; a driver that was updated wants a reboot"
        return Check("NVIDIA driver", "warn", told.reason, toolchains.REMEDY if "not installed" in told.reason else broken)

    def _torch(self) -> Check:
        """Whether torch reaches the GPUs, with a CUDA that the driver runs and code for every one of them."""
        report = self.report
        if not report.devices:
            asking = "see what `python -c 'import torch; torch.zeros(1).cuda()'` says"
            remedy = (self._too_new() or asking) if report.cuda else CPU_BUILD
            return Check("torch on CUDA", "warn", f"torch {report.torch}: {report.reason}; its engines run on the CPU", remedy)
        found = f"torch {report.torch}, built for CUDA {report.cuda}, cuDNN {report.cudnn or 'none'}"
        bare = [device.name for device in report.devices if not has_code(report.architectures, device.compute_capability)]
        if bare:
            return Check("torch on CUDA", "warn", f"{found}, without code for {', '.join(bare)}", "take a torch that has it")
        return Check("torch on CUDA", "warn" if self._too_new() else "ok", found, self._too_new())

    def _too_new(self) -> str:
        """What to do where torch wants a major version of CUDA that the driver does not run; within one, all of them do."""
        wanted, newest = self.report.cuda.partition(".")[0], self.driver.cuda
        if not wanted or not newest or int(wanted) <= newest[0]:
            return ""
        return f"update the driver to one for CUDA {wanted}, or take a torch for CUDA {newest[0]}"

    def _cublas(self) -> Check:
        if reason := cublas.refusal():
            return Check(
                "cuBLAS 12", "missing", reason.partition(";")[0], f"uv pip install {cublas.WHEEL}, or pip install '.[cuda]'"
            )
        return Check("cuBLAS 12", "ok", f"for CTranslate2 on CUDA: {self.cublas_12 or 'as this system names it'}")


def has_code(architectures: tuple[str, ...], capability: Capability) -> bool:
    """Whether a build for `architectures`, as torch.cuda.get_arch_list names them, runs on a GPU of that compute capability.

    Machine code (sm_XY) runs within its major version on its minor one and later; PTX (compute_XY) on everything later; what has
    a letter behind it (sm_90a) on that very one (CUDA's programming guide, compute capabilities).
    """
    for name in architectures:
        kind, _, number = name.partition("_")
        built = int(re.sub(r"\D", "", number))
        major, minor = divmod(built, 10)
        if number.isdigit() and (built <= 10 * capability[0] + capability[1]) and (kind == "compute" or major == capability[0]):
            return True
        if (major, minor) == capability:
            return True
    return False


def _torch_version() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def _described(gpu: Gpu) -> str:
    return f"{gpu.name} ({gpu.memory_bytes / GIB:.0f} GiB, {gpu.sm or 'compute capability not told'})"


def _bandwidth(name: str, device: DeviceReport) -> Check:
    """The roof of decoding, as for the CPU."""
    gigabytes = device.memory_bandwidth_bytes_s / 1e9
    found = f"{gigabytes:.0f} GB/s read and written by copies: at most {gigabytes:.0f} tokens/s from 1 GB of weights"
    return Check(name, "ok", found)


def _attention(device: DeviceReport) -> str:
    """What scaled_dot_product_attention takes, by dtype, grouped queries apart where they differ."""
    parts = []
    for dtype, kernels in device.attention.items():
        alone, grouped = kernels["alone"], kernels["grouped"]
        parts.append(f"{dtype} {alone}" + ("" if grouped == alone else f", grouped queries {grouped}"))
    return "; ".join(parts)
