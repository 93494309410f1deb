"""What NVML tells, by answers recorded where there is a driver; here there may be none, and then nothing breaks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from featherweight.system import gpu
from featherweight.system.gpu import Driver, Gpu, driver, process_memory_bytes
from tests.support.nvml import Card, FakeNvml

H100, L4 = Card(), Card("NVIDIA L4", "GPU-77aa", 24152899584, (8, 9))
HELD = Gpu("NVIDIA H100 80GB HBM3", 85520809984, (9, 0)), Gpu("NVIDIA L4", 24152899584, (8, 9))


@pytest.fixture(autouse=True)
def _every_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_driver_tells_versions_and_every_card():
    nvml = FakeNvml(H100, L4)
    assert driver(nvml) == Driver("580.95.05", (13, 0), HELD)
    assert driver(FakeNvml(cuda=12080)).cuda == (12, 8)
    assert [one.sm for one in HELD] == ["sm_90", "sm_89"] and Gpu("some", 1).sm == ""
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("wanted", "seen"),
    [
        ("1", HELD[1:]),
        ("1,0", HELD[::-1]),
        ("GPU-77", HELD[1:]),
        ("", ()),
        ("-1", ()),
        ("0,7,1", HELD[:1]),
        ("MIG-5", HELD[:1]),
        ("0,0", ()),
        ("1gpu,0x", HELD[::-1]),
        ("+1", HELD[1:]),
        ("0,GPU-77", HELD[:1]),
        ("GPU-77,1", HELD[1:]),
        ("²", ()),
        (" 1 , 0 ", HELD[::-1]),
        ("NoDevFiles", ()),
        ("GPU-", ()),
        ("1,,0", HELD[1:]),
    ],
)
def test_only_what_cuda_would_show(monkeypatch, wanted, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", wanted)
    cards = [Card(uuid="MIG-5"), L4] if wanted == "MIG-5" else [H100, L4]
    assert driver(FakeNvml(*cards)).gpus == seen


@pytest.mark.parametrize(
    ("failing", "reason"),
    [("nvmlInit", "does not answer: Driver Not Loaded"), ("nvmlDeviceGetMemoryInfo", "in part only: Driver Not Loaded")],
)
def test_a_broken_driver_means_no_gpu_and_a_reason(failing, reason):
    nvml = FakeNvml(H100, fails={failing: "Driver Not Loaded"})
    found = driver(nvml)
    assert found.gpus == () and reason in found.reason
    assert nvml.open == 0
    assert driver(FakeNvml(H100, fails={"nvmlShutdown": "GPU is lost"})).gpus == HELD[:1]


def test_without_the_binding_there_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in driver().reason
    assert process_memory_bytes(os.getpid()) is None


def test_this_machine_is_asked_and_does_not_break():
    found = driver()
    assert bool(found.version) != bool(found.reason)


def test_a_process_is_counted_with_its_children_on_every_card():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        held = {os.getpid(): 3 * 2**20, child.pid: 5 * 2**20, 1: 7 * 2**20}
        nvml = FakeNvml(Card(processes=held), Card(processes={child.pid: 2**20}))
        assert process_memory_bytes(os.getpid(), nvml) == 9 * 2**20
        assert process_memory_bytes(child.pid, nvml) == 6 * 2**20
    finally:
        child.communicate(b"\n")


def test_what_is_not_listed_is_nothing_or_not_known(monkeypatch):
    alone = FakeNvml(Card(processes={1: 2**20}))
    monkeypatch.setattr(gpu, "_may_hold_memory", lambda pid: False)
    assert process_memory_bytes(os.getpid(), alone) == 0
    monkeypatch.setattr(gpu, "_may_hold_memory", lambda pid: True)  # a GPU is open, and the list has other numbers for us
    assert process_memory_bytes(os.getpid(), alone) is None
    assert process_memory_bytes(os.getpid(), FakeNvml(Card(processes={os.getpid(): None}))) is None
    assert process_memory_bytes(os.getpid(), FakeNvml(fails={"nvmlInit": "Driver Not Loaded"})) is None


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc on this system")
def test_only_a_process_that_opened_a_gpu_may_hold_memory(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICES", ("/dev/full",))
    assert not gpu._may_hold_memory(os.getpid())
    with Path("/dev/full").open("w"):
        assert gpu._may_hold_memory(os.getpid())


def test_a_value_that_hides_every_gpu_is_the_reason(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,0")
    found = driver(FakeNvml(H100, L4))
    assert found.gpus == () and found.reason == "CUDA_VISIBLE_DEVICES is '0,0', which shows none of its GPUs"
