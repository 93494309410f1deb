"""A quantization and a pruning method of another package, one file each: planned, refused, cached and right, like our own."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from featherweight.errors import RecipeError
from featherweight.grid import GRIDS
from featherweight.pruning.catalog import PRUNERS
from featherweight.pruning.spec import PruneSpec
from featherweight.quantization.catalog import QUANTIZERS
from featherweight.quantization.spec import QuantizeSpec
from featherweight.recipe.cost import estimate
from featherweight.recipe.plan import Node, Plan, expand
from featherweight.recipe.recipe import Recipe
from featherweight.text.documents import Document, write_documents
from tasks import cache_key, code_slice
from tasks.prune import prune
from tasks.quantize import quantize
from tests.conftest import STORY
from tests.support.paths import SUPPORT

RECIPE: dict[str, Any] = {
    "name": "outside-methods",
    "checkpoint": {"source": "checkpoint"},
    "data": {"source": "text.jsonl", "evaluation": 0.3, "calibration": 0.3},
    "stages": {
        "prune": {
            "short": {"method": "tail", "samples": 2, "sequence": 16, "finetune": None},
            "thin": {"method": "sparse", "samples": 2, "sequence": 16, "finetune": None},
        },
        "quantize": {"clip8": {"method": "clip", "clip": 0.8, "samples": 2, "sequence": 16}},
        "export": {"ct2": {"engine": "ctranslate2"}, "ct2-int8": {"engine": "ctranslate2", "compute_type": "int8"}},
    },
    "variants": [{"prune": "short", "serve": "ct2"}, {"prune": ["none", "thin"], "quantize": "clip8", "serve": "ct2-int8"}],
    "workload": {"prompt_tokens": 8, "new_tokens": 4, "batch_sizes": [1], "rounds": 2, "windows": 4, "window_tokens": 32},
    "constraints": {"max_quality_loss": 5.0},
    "promote": {"model": "outside-methods", "stage": "none"},
}
ENTRIES = {
    "outside_quantizer": ("featherweight.quantizers", "clip", "CLIP"),
    "outside_pruner": ("featherweight.pruners", "tail", "TAIL"),
}


def install(site: Path, version: str = "1.0") -> None:
    """Both distributions, each of one module with one entry point, as an installer would leave them."""
    site.mkdir(exist_ok=True)
    for module, (group, name, attribute) in ENTRIES.items():
        shutil.copy(SUPPORT / f"{module}.py", site)
        described = site / f"{module}-{version}.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: {version}\n")
        (described / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:{attribute}\n")


def forget() -> None:
    """Nothing known of what is installed, nor of its code."""
    for module in ENTRIES:
        sys.modules.pop(module, None)
    for catalog in (QUANTIZERS, PRUNERS):
        vars(catalog).pop("references", None)
    for cached in (code_slice.read_module, code_slice.file_of, code_slice.root_of, code_slice.definition, cache_key.code_digest):
        cached.cache_clear()
    importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the installed packages, which this process finds."""
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    forget()
    yield tmp_path / "site"
    forget()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write_documents(tmp_path / "text", [Document(str(place), f"{place} {STORY}") for place in range(8)])
    return tmp_path / "text"


def planned(**changes: Any) -> tuple[Recipe, Plan]:
    recipe = Recipe.model_validate(RECIPE | changes)
    return recipe, expand(recipe)


@pytest.mark.slow
def test_they_are_planned_with_their_cost_and_refused_where_they_say_so(site: Path) -> None:
    recipe, plan = planned()
    assert [variant.name for variant in plan.variants] == ["baseline", "short/ct2", "clip8/ct2-int8"]
    assert plan.ruled_out == {"thin/clip8/ct2-int8": "sparse + clip-int8: clips no zeros"}
    ours = Recipe.model_validate(RECIPE | {"stages": RECIPE["stages"] | {"quantize": {"clip8": {"method": "rtn"}}}})
    costs = [estimate(expand(one), {}, set())["clip8"].seconds for one in (recipe, ours)]
    assert costs[0] > costs[1] + 1
    masked = RECIPE["stages"] | {"export": {"torch": {"engine": "torch"}}}
    with pytest.raises(RecipeError, match=r"every combination is impossible; short/torch: fill-mask \+ tail: cuts no encoder"):
        planned(task="fill-mask", stages=masked, variants=[{"prune": "short", "serve": "torch"}])
    with pytest.raises(RecipeError, match=r"clip8/torch: fill-mask \+ clip: clips decoders only"):
        planned(task="fill-mask", stages=masked, variants=[{"quantize": "clip8", "serve": "torch"}])


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"method": "clip", "steps": 3}, "steps plays no role with method clip"),
        ({"method": "rtn", "clip": 0.5}, "clip plays no role with method rtn"),
        ({"method": "clip", "clip": 2}, "less than or equal to 1"),
        ({"method": "clib"}, "unknown quantization method 'clib'; did you mean 'clip'?"),
    ],
)
def test_their_keys_are_read_like_our_own(site: Path, spec: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told.replace("?", r"\?")):
        QuantizeSpec.of(**spec)


def test_their_results_are_right(site: Path, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    for name in ("clipped", "short"):
        (tmp_path / name).mkdir()
    rounding = QuantizeSpec.of(method="clip", clip=0.8, samples=2, sequence=16)
    metrics = quantize(rounding, checkpoint=tiny_checkpoint, text=text, calibration=text, out=tmp_path / "clipped")
    assert metrics["clip"] == 1.0
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_checkpoint, tmp_path / "clipped"))
    for name in (name for name in before if name.endswith("_proj.weight")):
        grid = GRIDS["int8"]
        assert torch.equal(after[name], grid.dequantize(*grid.quantize(before[name], grid.scales(before[name]) * 0.8)))
    cut = PruneSpec.of(method="tail", samples=2, sequence=16)
    assert prune(cut, checkpoint=tiny_checkpoint, calibration=text, out=tmp_path / "short")["layers"] == 1
    kept = load_file(tmp_path / "short" / "model.safetensors")
    assert kept and all(torch.equal(kept[name], before[name]) for name in kept)
    assert not any(".layers.1." in name for name in kept)
    with pytest.raises(RecipeError, match=r"prune\.layers 2: the model has no more"):
        prune(PruneSpec.of(method="tail", layers=2), checkpoint=tiny_checkpoint, calibration=text, out=tmp_path / "short")


@pytest.mark.slow
def test_their_code_and_versions_are_in_the_keys_of_their_nodes(site: Path) -> None:
    def keys() -> list[str]:
        forget()
        specs = {"clip": QuantizeSpec.of(method="clip"), "rtn": QuantizeSpec.of(), "tail": PruneSpec.of(method="tail")}
        functions = {"clip": quantize, "rtn": quantize, "tail": prune}
        return [functions[name].key(Node("n", functions[name].name, "n", spec), {}) for name, spec in specs.items()]

    before, path = keys(), site / "outside_quantizer.py"
    path.write_text(path.read_text().replace("given.spec.clip)", "given.spec.clip * 1.0)"))
    edited = keys()
    assert [one == other for one, other in zip(before, edited, strict=True)] == [False, True, True]
    path.write_text(path.read_text().replace("clips no zeros", "leaves zeros alone").replace("1e12", "1e13"))
    assert keys() == edited
    described = site / "outside_pruner-1.0.dist-info" / "METADATA"
    described.write_text(described.read_text().replace("1.0", "1.1"))
    assert [one == other for one, other in zip(edited, keys(), strict=True)] == [True, True, False]
