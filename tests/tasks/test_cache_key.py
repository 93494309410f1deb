"""Cache keys: what they know of an engine, and what they leave alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from featherweight.measure.spec import WorkloadSpec
from featherweight.recipe.plan import Node
from featherweight.runtimes.catalog import RUNTIMES
from tasks import cache_key
from tasks.code_slice import slice_of
from tasks.evaluate import evaluate
from tasks.export import export
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


def test_the_manifest_names_the_libraries_of_its_engines() -> None:
    assert "torchao" in cache_key.libraries_of(Node("x", "export", "x", serving_spec("torchao-int8")))
    assert {"ctranslate2", "transformers"} <= set(cache_key.libraries_of(measured("ctranslate2")))
