"""Energy that the machine uses, where it can be read: the processors' counters (RAPL, through Linux' powercap) and NVIDIA's.

They count all that runs on the machine, not one process alone; of a run on a GPU, processors and GPUs together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from featherweight.system.device import CPU, Device
from featherweight.system.gpu import energy_j

POWERCAP = Path("/sys/class/powercap")
PACKAGES = "intel-rapl:?"
"""One processor each, AMD's too; what has a second number is a part of one."""
Reading = tuple[float, ...]


@dataclass(frozen=True)
class EnergyMeter:
    """What serving from `device` uses. `nvml` is given by tests alone."""

    device: Device = CPU
    root: Path = POWERCAP
    nvml: Any = None

    @cached_property
    def packages(self) -> list[tuple[Path, float]]:
        """The counter of each processor, and the joules after which it begins anew."""
        found = sorted(self.root.glob(PACKAGES))
        return [(one / "energy_uj", _joules(one / "max_energy_range_uj") or 0.0) for one in found if _name(one) != "psys"]

    @cached_property
    def reason(self) -> str:
        """Why nothing can be read; empty where it can."""
        if not self.packages:
            return f"no RAPL counter under {self.root}"
        if any(_joules(path) is None for path, _ in self.packages):
            return "RAPL counters may be read by root alone"
        return "" if self.device == CPU or energy_j(self.nvml) is not None else "NVIDIA's driver counts no energy of these GPUs"

    def read(self) -> Reading:
        """The counters now, in joules; empty where nothing can be read."""
        if self.reason:
            return ()
        counted = [_joules(path) or 0.0 for path, _ in self.packages]
        return (*counted, energy_j(self.nvml) or 0.0) if self.device != CPU else tuple(counted)

    def since(self, before: Reading) -> float | None:
        """Joules since a reading, of counters that may have begun anew once; None where nothing can be read."""
        if self.reason or not before:
            return None
        spans = [*(span for _, span in self.packages), 0.0]
        pairs = zip(self.read(), before, spans, strict=False)
        return sum(now - then + (span if now < then else 0.0) for now, then, span in pairs)


def _name(folder: Path) -> str:
    try:
        return (folder / "name").read_text().strip()
    except OSError:
        return ""


def _joules(path: Path) -> float | None:
    try:
        return int(path.read_text()) / 1e6
    except (OSError, ValueError):
        return None
