"""NVML as a machine with NVIDIA's driver answers: what `pynvml` returns there, recorded, behind the functions that are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace


class NVMLError(Exception):
    """pynvml's. value: the number of the error."""

    value = 0


@dataclass(frozen=True)
class Card:
    """One GPU. processes: bytes by process id, None where the driver keeps no count."""

    name: str = "NVIDIA H100 80GB HBM3"
    uuid: str = "GPU-2f0c9e1a-64a9-5d0f-8d07-9a0f3a1b7c11"
    total: int = 85520809984
    capability: tuple[int, int] = (9, 0)
    processes: Mapping[int, int | None] = field(default_factory=dict)
    used: int = 0
    millijoules: int = 0


class FakeNvml:
    """The part of pynvml that featherweight.system.gpu asks. fails: the functions that raise, by name, and what they say.

    absent: there is no driver at all.
    """

    NVMLError = NVMLError

    def __init__(
        self,
        *cards: Card,
        driver: str = "580.95.05",
        cuda: int = 13000,
        fails: Mapping[str, str] = {},
        absent: bool = False,
    ) -> None:
        self.cards, self.driver, self.cuda, self.fails, self.absent, self.open = cards, driver, cuda, fails, absent, 0

    def _answer(self, name: str) -> None:
        if name in self.fails or self.absent:
            error = NVMLError(self.fails.get(name, "NVML Shared Library Not Found"))
            error.value = 12 if self.absent else 9
            raise error

    def nvmlInit(self) -> None:
        self._answer("nvmlInit")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self._answer("nvmlShutdown")
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return self.driver

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return self.cuda

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        return next(card for card in self.cards if card.uuid == uuid)

    def nvmlDeviceGetUUID(self, card: Card) -> str:
        return card.uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, card: Card) -> int:
        self._answer("nvmlDeviceGetTotalEnergyConsumption")
        return card.millijoules

    def nvmlDeviceGetName(self, card: Card) -> str:
        return card.name

    def nvmlDeviceGetMemoryInfo(self, card: Card) -> SimpleNamespace:
        self._answer("nvmlDeviceGetMemoryInfo")
        return SimpleNamespace(total=card.total, used=card.used)

    def nvmlDeviceGetCudaComputeCapability(self, card: Card) -> tuple[int, int]:
        return card.capability

    def nvmlDeviceGetComputeRunningProcesses(self, card: Card) -> Sequence[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in card.processes.items()]
