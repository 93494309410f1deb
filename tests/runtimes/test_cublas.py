"""cuBLAS 12 for CTranslate2: found where NVIDIA's wheel puts it, asked for by name where it is not, loaded by its path."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.ctranslate2 import cublas, runtime
from featherweight.runtimes.spec import ExportSpec
from featherweight.system.device import CUDA
from featherweight.system.gpu import Gpu
from featherweight.system.machine import Machine

GPU_MACHINE = Machine("Linux", "x86_64", "some", frozenset(), 2, 2, 2**33, (Gpu("NVIDIA H100", 2**36, (9, 0)),))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems name CUDA's libraries otherwise")


@pytest.fixture
def _nowhere(monkeypatch):
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(cublas, "_of_the_system", lambda: ())
    monkeypatch.setattr(cublas, "TOOLKITS", "/none*")


@pytest.fixture
def wheel(tmp_path) -> Path:
    """Packages with the wheel among them; any library stands for cuBLAS."""
    libraries = tmp_path / "site-packages" / cublas.IN_WHEEL
    libraries.mkdir(parents=True)
    there = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libm.so" in line)
    shutil.copy(there, libraries / cublas.LIBRARY)
    return tmp_path / "site-packages"


@pytest.mark.usefixtures("_nowhere")
def test_the_wheel_is_found_before_the_loaders_path(wheel, tmp_path, monkeypatch):
    assert cublas.find([str(tmp_path)]) is None
    found = cublas.find([str(tmp_path), str(wheel)])
    assert found == wheel / cublas.IN_WHEEL / cublas.LIBRARY
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{found.parent}")
    assert cublas.find([str(tmp_path)]) == found


@pytest.mark.usefixtures("_nowhere")
def test_the_plan_asks_for_it_on_this_machine_alone(monkeypatch):
    spec = ExportSpec.of(engine="ctranslate2", compute_type="float16")
    monkeypatch.setattr(cublas, "find", lambda: None)
    assert RUNTIMES["ctranslate2"].device_refusal(spec, CUDA, GPU_MACHINE) is None
    monkeypatch.setattr(runtime, "describe", lambda: GPU_MACHINE)
    assert "pip install nvidia-cublas-cu12" in RUNTIMES["ctranslate2"].device_refusal(spec, CUDA, GPU_MACHINE)
    monkeypatch.setattr(cublas, "find", lambda: Path("/somewhere"))
    assert RUNTIMES["ctranslate2"].device_refusal(spec, CUDA, GPU_MACHINE) is None


def test_it_is_loaded_into_the_process_that_serves(wheel):
    script = (
        "from featherweight.runtimes.ctranslate2 import cublas; cublas.load();"
        "print(any(cublas.LIBRARY in line for line in open('/proc/self/maps')))"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(wheel)!r}); {script}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "True"
