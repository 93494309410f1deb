"""The doctor: each finding with its remedy, and a non-zero exit only where nothing can run."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from importlib import metadata

import pytest
from rich.console import Console

from featherweight.runtimes import doctor
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.system import device
from featherweight.system.machine import Machine
from tests.support.paths import ROOT

QUIET = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL")
AVX2_ONLY = Machine("Linux", "x86_64", "Some CPU", frozenset({"avx2", "fma"}), 2, 2, 24 * 2**30, ())


@pytest.fixture(autouse=True)
def _no_servers(monkeypatch):
    for name in QUIET:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.slow
def test_this_machine_can_run(tmp_path):
    found = doctor.diagnose(tmp_path)
    assert found.exit_code == 0, [check for check in found.checks if check.essential and check.state == "missing"]
    assert json.loads(json.dumps(found.to_dict()))["machine"]["cores"] == found.machine.cores
    names = {check.name for check in found.checks}
    assert {"CPU features", "memory bandwidth", "GPUs", "disk", "libraries", "toolchain vllm", "S3 endpoint"} <= names


def test_without_vnni_reduce_range_is_advised():
    check = next(check for check in doctor._engines(AVX2_ONLY) if check.name == "engine ctranslate2")
    assert check.state == "warn" and "saturates" in check.found and "reduce_range" in check.remedy
    with_vnni = replace(AVX2_ONLY, cpu_features=AVX2_ONLY.cpu_features | {"avx_vnni"})
    assert {check.state for check in doctor._engines(with_vnni) if check.name == "engine ctranslate2"} == {"ok"}


def test_a_toolchain_that_an_engine_only_gains_by_is_not_missed(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATHERWEIGHT_TOOLCHAINS", str(tmp_path))
    found = {check.name: check for check in doctor._toolchains()}["toolchain llama.cpp-native"]
    assert (found.state, found.remedy) == ("ok", "run `featherweight doctor --install llama.cpp-native`")
    assert "served as its wheel has it" in found.found
    (tmp_path / "llama.cpp-native.json").write_text(json.dumps({"error": "no compiler"}))
    failed = {check.name: check for check in doctor._toolchains()}["toolchain llama.cpp-native"]
    assert failed.state == "warn" and "no compiler" in failed.found


@pytest.mark.slow
def test_every_engine_of_the_catalog_has_its_line(tmp_path):
    names = [check.name.removeprefix("engine ") for check in doctor.diagnose(tmp_path).checks if check.name.startswith("engine ")]
    assert names == list(RUNTIMES)


@pytest.mark.slow
def test_a_missing_toolchain_is_shown_and_not_fatal(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATHERWEIGHT_TOOLCHAINS", str(tmp_path))
    found = doctor.diagnose(tmp_path)
    check = next(check for check in found.checks if check.name == "toolchain vllm")
    assert (check.state, check.remedy) == ("missing", "run `make setup`")
    assert found.exit_code == 0
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    console.print(doctor.render(found))
    text = console.export_text()
    assert "its variants are skipped" in text and "→ run `make setup`" in text


@pytest.mark.slow
def test_a_server_that_is_named_and_down_is_fatal(tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
    found = doctor.diagnose(tmp_path)
    check = next(check for check in found.checks if check.name == "MLflow server")
    assert check.state == "missing" and "unset MLFLOW_TRACKING_URI" in check.remedy
    assert found.exit_code == 7
    assert "secret" not in json.dumps(found.to_dict())


def test_a_server_that_answers_is_fine(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.getsockname()[1]}")
        check = next(check for check in doctor._services() if check.name == "S3 endpoint")
    assert check.state == "ok" and check.found.endswith("answers")


def test_versions_other_than_the_lock_are_named(tmp_path):
    lock = tmp_path / "main.txt"
    lock.write_text("# lock\npydantic==0.1  # via featherweight\nPyYAML==0.2 ; python_version < '3'\n")
    check = doctor._libraries(lock)
    assert check.state == "warn"
    assert "pydantic" in check.found and "(locked: 0.1)" in check.found and "pyyaml" not in check.found.lower()


def test_a_full_disk_is_fatal(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "TIGHT_BYTES", 2**62)
    monkeypatch.setattr(doctor, "ROOMY_BYTES", 2**62)
    check = doctor._disk(tmp_path)
    assert (check.state, check.essential) == ("missing", True)


@pytest.mark.slow
def test_imports_nothing_heavy():
    script = (
        "import sys; from featherweight.runtimes.doctor import diagnose; diagnose();"
        "print([m for m in ('torch', 'transformers', 'mlflow', 'prefect') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_run_from_its_source_it_knows_its_dependencies(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor._dependencies()

    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert set(doctor._dependencies()) == set(installed)


def test_every_engine_has_the_device_that_it_serves_from(monkeypatch):
    monkeypatch.setattr(device, "resolve", lambda wanted, here: "cuda")
    found = {check.name: check for check in doctor._engines(with_vnni())}
    assert found["engine torch"].found.endswith("serves from cuda")
    dynamic = found["engine torch-dynamic"]
    assert dynamic.state == "warn" and "not on cuda: " in dynamic.found and dynamic.remedy.startswith("say device: cpu")
    monkeypatch.undo()
    monkeypatch.setenv(device.VARIABLE, "cuda")
    assert {check.found for check in doctor._engines(with_vnni()) if check.name == "engine torch"} == {
        "can be started, and serves from cpu"
    }


def with_vnni() -> Machine:
    """A machine without a GPU, of whose processor there is nothing to say."""
    return replace(AVX2_ONLY, cpu_features=AVX2_ONLY.cpu_features | {"avx_vnni", "avx512f"})
