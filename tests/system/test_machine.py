"""The machine: its features and its fingerprint are the same for whoever asks, its bandwidth is a measurement."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from featherweight.system import machine
from featherweight.system.machine import Gpu, Machine

AVX2_ONLY = Machine("Linux", "x86_64", "Some CPU", frozenset({"avx2", "fma"}), 2, 2, 24 * 2**30, ())


def test_describes_this_machine():
    here = machine.describe()
    assert here.cores >= 1 and here.physical_cores >= 1
    assert here.memory_bytes > 2**28
    assert here.cpu_model
    assert here.cpu_features <= set(machine.RELEVANT)
    assert json.loads(json.dumps(here.to_json()))["fingerprint"] == here.fingerprint


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo on this system")
def test_features_are_the_kernels():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert machine.cpu_features() == flags & set(machine.RELEVANT)


def test_fingerprint_is_stable_across_processes():
    script = "from featherweight.system.machine import hardware_fingerprint; print(hardware_fingerprint())"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == machine.hardware_fingerprint()


@pytest.mark.parametrize(
    "change",
    [{"cpu_model": "Other"}, {"cpu_features": frozenset({"avx2"})}, {"cores": 1}, {"gpus": (Gpu("NVIDIA H200", 2**37, (9, 0)),)}],
)
def test_fingerprint_changes_with_what_a_measurement_depends_on(change):
    assert replace(AVX2_ONLY, **change).fingerprint != AVX2_ONLY.fingerprint


def test_fingerprint_ignores_what_the_kernel_keeps_for_itself():
    assert replace(AVX2_ONLY, memory_bytes=AVX2_ONLY.memory_bytes - 4096).fingerprint == AVX2_ONLY.fingerprint


@pytest.mark.parametrize(("features", "exact"), [({"avx2"}, False), ({"avx2", "avx_vnni"}, True), ({"asimddp"}, True)])
def test_int8_dot_product(features, exact):
    assert replace(AVX2_ONLY, cpu_features=frozenset(features)).int8_dot_product is exact


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no processor affinity on this system")
def test_cores_follow_the_affinity_mask():
    mask = os.sched_getaffinity(0)
    script = "import os; os.sched_setaffinity(0, {%d}); from featherweight.system.machine import available_cores as a; print(a())"
    one = subprocess.run([sys.executable, "-c", script % min(mask)], capture_output=True, text=True, check=True)
    assert one.stdout.strip() == "1"


@pytest.mark.slow
def test_memory_bandwidth_is_of_the_right_order():
    # A DDR3 stick reads 5 GB/s, a part of it where others share the core; the fastest server of today well under 3 TB/s.
    assert 1e7 < machine.memory_bandwidth_bytes_s(threads=1, budget_s=0.1) < 3e12
