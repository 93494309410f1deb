"""What another package adds through an entry point goes through a whole recipe like our own; nothing here knows its name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import STORY
from tests.support.command import featherweight
from tests.support.paths import SUPPORT

RECIPE: dict[str, Any] = {
    "name": "outside",
    "checkpoint": {"source": "checkpoint"},
    "data": {"source": "text.jsonl", "evaluation": 0.3, "calibration": 0.3},
    "stages": {
        "prune": {"short": {"method": "tail", "samples": 2, "sequence": 16, "finetune": None}},
        "quantize": {"clip8": {"method": "clip", "clip": 0.8, "samples": 2, "sequence": 16}},
        "export": {
            "plain": {"engine": "plain", "attention": "eager"},
            "ct2-int8": {"engine": "ctranslate2", "compute_type": "int8"},
        },
    },
    "variants": [{"prune": ["none", "short"], "serve": "plain"}, {"quantize": "clip8", "serve": ["plain", "ct2-int8"]}],
    "workload": {"prompt_tokens": 8, "new_tokens": 4, "batch_sizes": [1], "rounds": 2, "windows": 4, "window_tokens": 32},
    "constraints": {"max_quality_loss": 5.0},
    "objective": "quality",
    "promote": {"model": "outside", "stage": "none"},
}


def install(site: Path, module: str, group: str, name: str, attribute: str) -> None:
    """A distribution of one module with one entry point, as an installer would leave it."""
    site.mkdir(exist_ok=True)
    shutil.copy(SUPPORT / f"{module}.py", site)
    described = site / f"{module}-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:{attribute}\n")


@pytest.fixture
def work(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint, a text and a recipe, whose processes find the outside package."""
    install(tmp_path / "site", "outside_runtime", "featherweight.runtimes", "plain", "PLAIN")
    install(tmp_path / "site", "outside_quantizer", "featherweight.quantizers", "clip", "CLIP")
    install(tmp_path / "site", "outside_pruner", "featherweight.pruners", "tail", "TAIL")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    words = STORY.split()
    texts = [" ".join(words[index % 9 :: 1 + index % 5]) + f" {index}" for index in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


@pytest.mark.engine
@pytest.mark.server
@pytest.mark.slow
@pytest.mark.usefixtures("named_prefect")
def test_what_is_from_outside_is_planned_checked_measured_cached_reported_and_registered(work: Path) -> None:
    plan = json.loads(featherweight("plan", "recipe.yaml", "--json", cwd=work).stdout)
    seconds = {node["id"]: node["seconds"] for node in plan["nodes"]}
    assert seconds["clip8"] > seconds["short"]
    done = featherweight("optimize", "recipe.yaml", "--json", cwd=work)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    rows = {row["name"]: row for row in result["variants"]}
    assert {rows[name]["status"] for name in ("plain", "short/plain", "clip8/ct2-int8")} == {"winner", "loser"}
    row = rows["plain"]
    assert row["metrics"]["parity"] < 2e-5 and abs(row["metrics"]["quality_change"]) < 1e-2
    assert row["metrics"]["tokens_per_s_1"] > 0 and row["metrics"]["peak_memory_bytes"] > 1e8
    assert next(row["engine"] for row in rows.values() if row["status"] == "winner") == "plain"
    assert rows["clip8/plain"]["reason"] == "clip-int8 + plain: plain computes in float32 and has no kernel for int8"
    assert "clip8/ct2-int8" in (work / "report.html").read_text()
    written = [path.read_text().splitlines() for path in (work / ".featherweight").rglob("requirements.txt")]
    assert any("outside-runtime==1.0" in lines for lines in written)
    path = work / "site" / "outside_quantizer.py"
    path.write_text(path.read_text().replace("given.spec.clip)", "given.spec.clip * 0.98)"))
    edited = json.loads(featherweight("optimize", "recipe.yaml", "--json", cwd=work).stdout)
    made = {node["id"] for node in edited["nodes"] if node["status"] == "done"}
    assert {"clip8", "clip8/ct2-int8", "clip8/ct2-int8/evaluate"} <= made
    assert not made & {"checkpoint", "short", "short/plain", "short/plain/evaluate", "plain", "plain/evaluate", "baseline/evaluate"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            "stages.export.plain.compute_type=int8",
            "stages.export.plain: compute_type plays no role with engine plain; leave it out",
        ),
        ("stages.export.plain.attention=flash", "stages.export.plain.attention: Input should be 'eager' or 'sdpa'"),
        ("stages.export.plain.atention=sdpa", "unknown key 'stages.export.plain.atention'; did you mean 'attention'?"),
        ("task=fill-mask checkpoint.source=hf:nobody/nothing", "fill-mask + plain: plain knows decoders only"),
    ],
)
def test_its_keys_and_refusals_are_told_like_our_own(work: Path, change: str, told: str) -> None:
    refused = featherweight("plan", "recipe.yaml", *(part for one in change.split() for part in ("--set", one)), cwd=work)
    assert refused.returncode == 2 and told in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
