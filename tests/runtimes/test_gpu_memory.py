"""GPU memory of a serving process, by a driver that counts processes and by one that does not know them."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from featherweight.runtimes import gpu_memory
from featherweight.runtimes.gpu_memory import GpuMemory
from featherweight.system import gpu
from tests.support.nvml import Card, FakeNvml


class Driver:
    """A GPU whose memory works change; as NVML tells of it, by process or of all together."""

    def __init__(self, by_process: bool, silent: bool = False) -> None:
        self.ours, self.others, self.by_process, self.silent = 0, 5000, by_process, silent

    def work(self, taken: int, by_others: int = 0) -> Callable[[], int]:
        def run() -> int:
            self.ours += taken
            self.others += by_others
            return taken

        return run

    def memory_in_use_bytes(self) -> int | None:
        return None if self.silent else self.ours + self.others

    def process_memory_bytes(self, pid: int) -> int | None:
        return self.ours if self.by_process and not self.silent else None


@pytest.mark.parametrize("by_process", [True, False], ids=["counted", "in-a-container"])
def test_the_peak_of_a_process_is_what_it_held_after_a_work(by_process, monkeypatch):
    driver = Driver(by_process)
    monkeypatch.setattr(gpu_memory, "gpu", driver)
    memory = GpuMemory(os.getpid())
    assert memory.around(driver.work(800)) == 800
    memory.around(driver.work(200))
    driver.work(0, by_others=4000)()  # another engine, between two works of this one
    memory.around(driver.work(-500))
    assert memory.peak_bytes == 1000


def test_what_the_driver_does_not_tell_is_not_known(monkeypatch):
    driver = Driver(by_process=False, silent=True)
    monkeypatch.setattr(gpu_memory, "gpu", driver)
    memory = GpuMemory(os.getpid())
    memory.around(driver.work(800))
    assert memory.peak_bytes is None


def test_all_that_visible_gpus_hold(monkeypatch):
    nvml = FakeNvml(Card(used=3), Card(uuid="GPU-other", used=40))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu.memory_in_use_bytes(nvml) == 43
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpu.memory_in_use_bytes(nvml) == 40
    assert gpu.memory_in_use_bytes(FakeNvml(absent=True)) is None
