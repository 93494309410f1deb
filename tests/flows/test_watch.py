"""New checkpoints: each complete one is optimized once, from a folder and from a real S3 server."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from featherweight.store.workspace import Workspace
from tasks.claim_runs import ClaimRuns
from tasks.claims import Patience


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The shortest recipe: one export, measured."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(30):
        (text / f"{number}.txt").write_text(" ".join(f"word{number * 40 + i} is followed by {i}." for i in range(40)))
    tree = {
        "name": "arrived",
        "checkpoint": {"source": "replaced-by-watch"},
        "data": {"source": str(text), "evaluation": 0.3, "calibration": 0.2},
        "stages": {"export": {"ct2": {"engine": "ctranslate2"}}},
        "workload": {
            "prompt_tokens": 4,
            "new_tokens": 8,
            "batch_sizes": [1],
            "rounds": 2,
            "windows": 4,
            "window_tokens": 32,
        },
        "promote": {"model": "arrived", "stage": "staging"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def look(source: object, recipe: Path, root: Path, **patience: float) -> list[dict]:
    """What `featherweight watch --once` does, without a server of its own."""
    from flows.watch import run_due, watch_flow
    from flows.watch_schedule import _deployment, parameters_of

    told = parameters_of(str(source), recipe, (), root, "every", 0.05, Patience(**patience))
    _deployment(root).apply()
    return run_due(watch_flow(**told), told["deployment"])


def statuses(seen: list[dict]) -> dict[str, str]:
    """How each arrival stands, by the last part of its name."""
    return {one["source"].rpartition("/")[2]: one["status"] for one in seen}


@pytest.mark.engine
def test_a_checkpoint_on_s3_is_optimized_once(
    harness: None, tiny_checkpoint: Path, s3_server, recipe: Path, tmp_path: Path
) -> None:
    source, root, place = f"s3://{s3_server.bucket}/checkpoints", tmp_path / "workspace", s3_server.folder / "checkpoints" / "one"
    place.mkdir(parents=True)
    for path in tiny_checkpoint.iterdir():
        if path.name != "model.safetensors":
            shutil.copy(path, place)
    assert statuses(look(source, recipe, root)) == {"one": "waiting"}
    shutil.copy(tiny_checkpoint / "model.safetensors", place)
    (started,) = look(source, recipe, root)
    assert started["status"] == "done", started
    assert started["winner"] in ("ct2", "baseline")
    (place / "optimizer.pt").write_bytes(b"moments")
    (place / "config.json").touch()
    assert statuses(look(source, recipe, root)) == {"one": "done"}
    (version,) = Workspace.at(root).client().search_model_versions("name='arrived'")
    assert version.tags["featherweight.stage"] == "staging"


@pytest.mark.engine
def test_one_that_fails_costs_itself_only_and_is_quarantined(
    harness: None, tiny_checkpoint: Path, recipe: Path, tmp_path: Path
) -> None:
    drop, root = tmp_path / "drop", tmp_path / "workspace"
    shutil.copytree(tiny_checkpoint, drop / "bad")
    config = drop / "bad" / "config.json"
    config.write_text(config.read_text().replace('"LlamaForCausalLM"', '"NoSuchModel"'))
    shutil.copytree(tiny_checkpoint, drop / "good")
    (drop / "nonsense").mkdir()
    (drop / "nonsense" / "config.json").write_text("[")
    impatient = {"tries": 2, "backoff_s": 0.0}
    first = look(drop, recipe, root, **impatient)
    assert statuses(first) == {"bad": "failed", "good": "done", "nonsense": "waiting"}
    assert "NoSuchModel" in next(one["error"] for one in first if "bad" in one["source"])
    assert statuses(look(drop, recipe, root, **impatient))["bad"] == "failed"
    assert statuses(look(drop, recipe, root, **impatient)) == {"bad": "quarantined", "good": "done", "nonsense": "waiting"}
    quarantined = [one for one in ClaimRuns("").claims(Patience(**impatient)).values() if one.count("FAILED") == 2]
    assert len(quarantined) == 1 and "NoSuchModel" in quarantined[0].tries[-1].reason
