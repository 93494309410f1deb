"""New checkpoints: each complete one is optimized once, from a folder and from a real S3 server."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from featherweight.checkpoint.new_checkpoints import arrivals
from featherweight.errors import DataError
from featherweight.store.workspace import Workspace


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


def look(source: str, recipe: Path, root: Path) -> list[dict]:
    """One look of the watch flow."""
    from flows.watch import watch_flow

    return watch_flow(source, str(recipe), None, str(root))


def test_arrivals_in_a_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        arrivals(str(tmp_path / "nowhere"))
    shutil.copytree(tiny_checkpoint, tmp_path / "a" / "b")
    shutil.copytree(tiny_checkpoint, tmp_path / "unfinished")
    weights = tmp_path / "unfinished" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    first = arrivals(str(tmp_path))
    assert [arrival.source for arrival in first] == [str(tmp_path / "a" / "b")]
    assert arrivals(str(tmp_path)) == first
    weights.write_bytes(whole)
    assert len(arrivals(str(tmp_path))) == 2


@pytest.mark.engine
def test_a_checkpoint_on_s3_is_optimized_once(
    harness: None, tiny_checkpoint: Path, s3_server, recipe: Path, tmp_path: Path
) -> None:
    source, root, place = f"s3://{s3_server.bucket}/checkpoints", tmp_path / "workspace", s3_server.folder / "checkpoints" / "one"
    place.mkdir(parents=True)
    for path in tiny_checkpoint.iterdir():
        if path.name != "model.safetensors":
            shutil.copy(path, place)
    assert look(source, recipe, root) == []
    shutil.copy(tiny_checkpoint / "model.safetensors", place)
    (started,) = look(source, recipe, root)
    assert started["state"] == "Completed", started
    assert started["winner"] in ("ct2", "baseline")
    assert look(source, recipe, root) == []
    (version,) = Workspace.at(root).client().search_model_versions("name='arrived'")
    assert version.tags["featherweight.stage"] == "staging"


@pytest.mark.engine
def test_a_bad_checkpoint_is_tried_once_and_does_not_stop_the_others(
    harness: None, tiny_checkpoint: Path, recipe: Path, tmp_path: Path
) -> None:
    place = tmp_path / "incoming"
    shutil.copytree(tiny_checkpoint, place / "bad")
    config = place / "bad" / "config.json"
    config.write_text(config.read_text().replace('"LlamaForCausalLM"', '"NoSuchModel"'))
    shutil.copytree(tiny_checkpoint, place / "good")
    bad, good = look(str(place), recipe, tmp_path / "workspace")
    assert bad["state"] == "Failed"
    assert bad["error"]
    assert good["state"] == "Completed"
    assert look(str(place), recipe, tmp_path / "workspace") == []
