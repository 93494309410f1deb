"""Releases: one version, told in the list of changes, and a wheel that has all that the code reads."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import featherweight
from featherweight.system import shipped
from tests.support.paths import ROOT

CODE = ("featherweight", "tasks", "flows")
SCRIPTS = ("infra/bootstrap.py", "infra/build_llama_cpp.py")


def test_one_version_stands_in_the_package_and_in_the_list_of_changes() -> None:
    latest = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest and latest[1] == featherweight.__version__
    assert importlib.metadata.version("featherweight") == featherweight.__version__


def test_the_map_of_the_house_leads_somewhere() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = {name for name in re.findall(r"`([\w./]+)`", text) if "/" in name}
    places = [ROOT, ROOT / "featherweight", ROOT / "tests" / "support"]
    assert named and not [name for name in named if not any((place / name).exists() for place in places)]


@pytest.mark.slow
def test_the_wheel_holds_what_the_code_reads(tmp_path: Path) -> None:
    """Built from a copy, so that no build folder is left, nor an old one taken."""
    source = tmp_path / "source"
    for name in (*CODE, "recipes", "infra/toolchains"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*SCRIPTS, "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True, timeout=300)
    (wheel,) = tmp_path.glob(f"featherweight-{featherweight.__version__}-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    code_files = {path.relative_to(ROOT).as_posix() for name in CODE for path in (ROOT / name).rglob("*") if path.is_file()}
    assert not {name for name in code_files if "__pycache__" not in name} - held
    beside = {path.relative_to(ROOT).as_posix() for place in ("recipes", "infra/toolchains") for path in (ROOT / place).iterdir()}
    assert {f"featherweight/shipped/{name}" for name in (*beside, *SCRIPTS)} <= held
    assert not [name for name in held if name.startswith(("tests", "benchmarks", "conformance", "infra"))]


def test_an_installed_package_finds_what_was_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert shipped.shipped("recipes/demo.yaml") == ROOT / "recipes" / "demo.yaml" and shipped.in_checkout()
    monkeypatch.setattr(shipped, "PACKAGED", tmp_path)
    assert shipped.shipped("recipes/demo.yaml") == tmp_path / "recipes" / "demo.yaml"
    assert shipped.environments().is_relative_to(sys.prefix)
