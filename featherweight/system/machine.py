"""The machine: what shapes the speed, and sometimes the numbers, of a variant that runs on it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from featherweight.system.gpu import Gpu, driver

# Features that an inference engine dispatches on, by the names that Linux gives them.
RELEVANT = (
    "sse4_1", "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
# Any of these multiplies and adds int8 into int32 in one step, without the int16 in between that AVX2 saturates.
INT8_DOT = frozenset({"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"})


@dataclass(frozen=True)
class Machine:
    """A machine as engines see it. `cores` are the logical processors that this process may use."""

    system: str
    architecture: str
    cpu_model: str
    cpu_features: frozenset[str]
    cores: int
    physical_cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]

    @property
    def int8_dot_product(self) -> bool:
        """Whether the CPU sums int8 products exactly (VNNI, AMX or Arm's dot product)."""
        return bool(self.cpu_features & INT8_DOT)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that differ where measurements would: system, CPU, its features, cores in reach, GPUs."""
        fields = asdict(self) | {"cpu_features": sorted(self.cpu_features)}
        del fields["memory_bytes"]  # the kernel's share of it differs from boot to boot
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for reports and manifests."""
        fields = asdict(self) | {"cpu_features": sorted(self.cpu_features)}
        return fields | {"int8_dot_product": self.int8_dot_product, "fingerprint": self.fingerprint}


def describe() -> Machine:
    """This machine. Nothing is measured; see memory_bandwidth_bytes_s for that."""
    return Machine(
        system=platform.system(),
        architecture=platform.machine(),
        cpu_model=cpu_model(),
        cpu_features=cpu_features(),
        cores=available_cores(),
        physical_cores=physical_cores(),
        memory_bytes=memory_bytes(),
        gpus=gpus(),
    )


def hardware_fingerprint() -> str:
    """Identifies this machine's kind; the same on every call and in every process of one machine."""
    return describe().fingerprint


def boot_id() -> str:
    """Another one each time that the machine starts; empty where the system tells none."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else ""


@lru_cache(maxsize=1)
def cpu_features() -> frozenset[str]:
    """The relevant features of this CPU, by their Linux names; empty where the system does not tell."""
    readers = {"Linux": _linux_features, "Darwin": _mac_features}
    flags = readers.get(platform.system(), frozenset)()
    return frozenset(flags).intersection(RELEVANT)


def _cpuinfo(key: str) -> str:
    """The first value of a key of /proc/cpuinfo."""
    match = re.search(rf"^{key}\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return match.group(1).strip() if match else ""


def _linux_features() -> frozenset[str]:
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def _mac_features() -> frozenset[str]:
    """macOS' names translated; Intel Macs list theirs in upper case, Apple silicon one key per feature."""
    apple = {"FEAT_DotProd": "asimddp", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16", "AdvSIMD": "asimd"}
    arm = {ours for theirs, ours in apple.items() if _sysctl(f"hw.optional.arm.{theirs}") == "1"}
    intel = f"{_sysctl('machdep.cpu.features')} {_sysctl('machdep.cpu.leaf7_features')}".lower().replace(".", "_")
    return frozenset(arm | {{"avx1_0": "avx"}.get(flag, flag) for flag in intel.split()})


@lru_cache(maxsize=1)
def cpu_model() -> str:
    """The CPU's name as its maker writes it, or the architecture where there is none."""
    return _cpuinfo("model name") or _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def available_cores() -> int:
    """Logical processors that this process may use: its affinity mask, and the container's CPU quota where one is set."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return max(1, min(cores, int(quota) // int(period))) if quota.isdigit() else cores


def physical_cores() -> int:
    """Cores in the machine, hyper-threads not counted; the logical count where the system does not tell."""
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or the container's limit where that is lower."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total


def free_bytes(folder: Path) -> int:
    """Room on the disk that a folder lies on, or would."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def memory_bandwidth_bytes_s(threads: int | None = None, budget_s: float = 0.5) -> float:
    """Bytes per second that `threads` (default: all in reach) read from main memory; the best of several passes.

    Reads an array larger than the caches, as decoding reads every weight once per token: the roof of a roofline. The budget
    covers the passes, not the allocation.
    """
    import numpy as np

    threads = threads or available_cores()
    array = np.ones(_beyond_caches_bytes() // 4, dtype=np.float32)
    return max(_read_passes(np.array_split(array, threads), budget_s))


def last_cache_bytes() -> int:
    """Bytes of the processor's largest cache; 0 where the system does not tell."""
    sizes = (_read(str(path)).strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.removesuffix("K").isdigit()), default=0)


def _beyond_caches_bytes() -> int:
    """Twice the largest cache, so that little of it is read again from there; 256 MiB at least, 1 GiB at most."""
    return min(max(2 * last_cache_bytes(), 256 * 2**20), 2**30)


def _read_passes(parts: list[Any], budget_s: float) -> list[float]:
    """Bytes per second of each pass that fits the budget, at least three; numpy lets go of the lock while it sums."""
    from concurrent.futures import ThreadPoolExecutor

    speeds: list[float] = []
    size, started = sum(part.nbytes for part in parts), time.perf_counter()
    with ThreadPoolExecutor(len(parts)) as pool:
        while len(speeds) < 3 or time.perf_counter() - started < budget_s:
            begin = time.perf_counter()
            list(pool.map(lambda part: part.max(), parts))
            speeds.append(size / (time.perf_counter() - begin))
    return speeds


@lru_cache(maxsize=1)
def gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs in reach; torch is not imported for it. Empty where there are none."""
    return driver().gpus


def _sysctl(key: str) -> str:
    return _output("sysctl", "-n", key) if platform.system() == "Darwin" else ""


def _output(command: str, *arguments: str) -> str:
    """What a command prints; empty where it is not installed, fails or hangs."""
    path = shutil.which(command)
    if path is None:
        return ""
    try:
        result = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _read(path: str) -> str:
    """A system file's text; empty where this system has none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
