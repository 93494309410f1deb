"""What the doctor says of GPUs, by a driver's and PyTorch's answers as an H100 gives them."""

from dataclasses import replace

import pytest

from featherweight.runtimes import gpu_findings
from featherweight.runtimes.ctranslate2 import cublas
from featherweight.runtimes.gpu_findings import GpuFindings, has_code
from featherweight.runtimes.torch import cuda_report
from featherweight.runtimes.torch.cuda_report import CudaReport, DeviceReport
from featherweight.system.gpu import Driver, driver
from tests.support.nvml import Card, FakeNvml

ATTENTION = {
    "float32": {"alone": "memory-efficient", "grouped": "math"},
    "bfloat16": {"alone": "cuDNN", "grouped": "cuDNN"},
}
DEVICE = DeviceReport("NVIDIA H100 80GB HBM3", (9, 0), 2.71e12, ATTENTION)
REPORT = CudaReport("2.11.0+cu130", "13.0", 91900, ("sm_75", "sm_80", "sm_90", "compute_120"), (DEVICE,))


def findings(report=REPORT, **driver_says):
    """The checks by name."""
    return {check.name: check for check in GpuFindings(driver(FakeNvml(Card(), **driver_says)), report, "/cublas").checks()}


@pytest.fixture(autouse=True)
def _cublas(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cublas, "refusal", lambda: None)


def test_a_gpu_machine_is_told_in_full():
    checks = findings()
    assert {check.state for check in checks.values()} == {"ok"}
    assert "580.95.05, runs CUDA up to 13.0" in checks["NVIDIA driver"].found
    assert checks["GPUs"].found == "NVIDIA H100 80GB HBM3 (80 GiB, sm_90)"
    assert checks["torch on CUDA"].found == "torch 2.11.0+cu130, built for CUDA 13.0, cuDNN 91900"
    assert "2710 GB/s" in checks["GPU memory bandwidth"].found
    assert checks["GPU attention"].found == "float32 memory-efficient, grouped queries math; bfloat16 cuDNN"
    assert checks["cuBLAS 12"].found.endswith("/cublas")


def test_two_gpus_have_lines_of_their_own():
    two = GpuFindings(driver(FakeNvml(Card(), Card())), replace(REPORT, devices=(DEVICE, DEVICE)))
    assert {"GPU 0 attention", "GPU 1 memory bandwidth"} <= {check.name for check in two.checks()}


@pytest.mark.parametrize(
    ("report", "remedy"),
    [
        (CudaReport("2.13.0+cpu", "", reason="built for CPUs only"), "make setup"),
        (CudaReport("2.13.0", "13.0", reason="torch reaches no GPU here"), "take a torch for CUDA 12"),
        (replace(REPORT, architectures=("sm_100",)), "take a torch that has it"),
    ],
)
def test_a_torch_that_does_not_reach_the_gpu_is_a_warning_with_its_remedy(report, remedy):
    check = findings(report, cuda=12080)["torch on CUDA"]
    assert check.state == "warn" and remedy in check.remedy


def test_the_wheel_that_ctranslate2_misses_is_named(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(cublas, "find", lambda: None)
    check = findings()["cuBLAS 12"]
    assert check.state == "missing" and "libcublas.so.12" in check.found and "nvidia-cublas-cu12" in check.remedy


def test_a_machine_without_gpus_has_two_lines_and_starts_nothing(monkeypatch):
    monkeypatch.setattr(gpu_findings, "driver", lambda: Driver(reason="NVIDIA's driver does not answer: Driver Not Loaded"))
    monkeypatch.setattr(gpu_findings, "ask", lambda: pytest.fail("torch was asked"))
    first, second = GpuFindings.here().checks()
    assert (first.state, second.state) == ("warn", "ok") and "reboot" in first.remedy
    none = GpuFindings(driver(FakeNvml(absent=True)), CudaReport())
    assert [check.state for check in none.checks()] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("architectures", "capability", "there"),
    [
        (("sm_80",), (8, 6), True), (("sm_90",), (8, 9), False), (("sm_80",), (9, 0), False), (("compute_80",), (9, 0), True),
        (("sm_90a",), (9, 0), True), (("sm_100a",), (10, 3), False), (("sm_120",), (12, 0), True), ((), (7, 5), False),
    ],
)  # fmt: skip
def test_what_a_build_has_code_for(architectures, capability, there):
    assert has_code(architectures, capability) is there


@pytest.mark.slow
def test_torch_is_asked_in_a_process_of_its_own():
    import torch

    told = cuda_report.ask()
    assert told.torch == torch.__version__
    assert bool(told.devices) == torch.cuda.is_available() and bool(told.devices) != bool(told.reason)
    for device in told.devices:
        assert device.memory_bandwidth_bytes_s > 5e10 and set(device.attention) == set(cuda_report.DTYPES)
    assert cuda_report._read({**REPORT.__dict__, "devices": [{**DEVICE.__dict__, "compute_capability": [9, 0]}]}) == REPORT
