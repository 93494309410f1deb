"""Bad input through the whole flow: one clear line, the right exit code, nothing registered, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from featherweight.errors import CheckpointError, DataError, FeatherweightError, ServiceError
from featherweight.recipe.plan import expand
from featherweight.recipe.recipe import Recipe
from featherweight.store.workspace import Workspace
from featherweight.system.progress_channel import ProgressChannel
from tests.support.stores import new_workspace

STORY = "The little model number {0} went for a walk of {0} steps and then it counted all of its {0} weights again, twice over. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Forty different documents."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text("".join(STORY.format(number * 100 + line) for line in range(8)))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A sound checkpoint to be broken."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def recipe_for(source: object, text: Path, **data: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "bad",
            "checkpoint": {"source": str(source)},
            "data": {"source": str(text), "evaluation": 0.3, "calibration": 0.3, **data},
            "stages": {"export": {"ct2": {"engine": "ctranslate2"}}},
            "promote": {"model": "bad"},
        }
    )


def refusal(recipe: Recipe, root: Path) -> FeatherweightError:
    """Run the flow; return what it raises, having checked that it left nothing behind."""
    workspace = new_workspace(root)
    with pytest.raises(FeatherweightError) as caught:
        _run(recipe, workspace)
    client = workspace.client()
    assert client.search_registered_models() == []
    assert list((workspace.root / "work").iterdir()) == []
    (run,) = client.search_runs(["1"], "tags.`featherweight.kind` = 'optimization'")
    assert run.info.status == "FAILED"
    assert "\n" not in str(caught.value).strip()
    return caught.value


def header_of(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def corrupt(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def lose_a_shard(folder: Path) -> None:
    names, _ = header_of(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = dict.fromkeys((name for name in names if name != "__metadata__"), "model-00001-of-00002.safetensors")
    shards[next(iter(shards))] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def poison(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def grow_tokenizer(folder: Path) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 9999, "content": "<far>"})
    (folder / "tokenizer.json").write_text(json.dumps(tree))


def pickle_it(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def want_code(folder: Path) -> None:
    tree = json.loads((folder / "config.json").read_text())
    tree["auto_map"] = {"AutoModelForCausalLM": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(tree))
    (folder / "evil.py").write_text("raise SystemExit('ran')")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (shutil.rmtree, "does not exist"),
        (truncate, "model.safetensors"),
        (corrupt, "model.safetensors"),
        (lose_a_shard, "model-00002-of-00002.safetensors"),
        (poison, "model.norm.weight"),
        (grow_tokenizer, "embedding has only 320 rows"),
        (pickle_it, "allow_pickle"),
        (want_code, "trust_remote_code"),
    ],
)
def test_a_bad_checkpoint(
    harness: Path, checkpoint: Path, text: Path, tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    harm(checkpoint)
    error = refusal(recipe_for(checkpoint, text), tmp_path / "workspace")
    assert isinstance(error, CheckpointError)
    assert words in str(error)


def test_empty_text(harness: Path, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    for path in text.iterdir():
        path.write_text("")
    assert isinstance(refusal(recipe_for(checkpoint, text), tmp_path / "workspace"), DataError)


def test_evaluation_text_in_the_calibration_text(harness: Path, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.mkdir()
    for number in range(5):
        (held / f"held-{number}.txt").write_text("".join(STORY.format(9000 + number * 100 + line) for line in range(8)))
    leak = tmp_path / "leak"
    shutil.copytree(held, leak)
    error = refusal(recipe_for(checkpoint, text, evaluation=str(held), calibration=str(leak)), tmp_path / "workspace")
    assert isinstance(error, DataError)
    assert "held-" in str(error)
    client = Workspace.at(tmp_path / "workspace").client()
    (gate,) = client.search_runs(["1"], "tags.`featherweight.stage` = 'gate'")
    assert [item.path for item in client.list_artifacts(gate.info.run_id, "failure")] == ["failure/validation.html"]


def test_s3_with_wrong_credentials_and_a_missing_bucket(
    harness: Path, s3_server, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refusal(recipe_for("s3://no-such-bucket/model", text), tmp_path / "one")
    assert isinstance(error, ServiceError)
    assert "no-such-bucket" in str(error)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-key")
    error = refusal(recipe_for(f"s3://{s3_server.bucket}/model", text), tmp_path / "two")
    assert isinstance(error, ServiceError)
    assert "credentials" in str(error)


def test_a_full_disk(harness: Path, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """A file system of three megabytes takes the stores, not the artifacts."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False).returncode:
        pytest.skip("no right to mount a small file system here")
    try:
        filler = disk / "filler"
        recipe, workspace = recipe_for(checkpoint, text), Workspace.at(disk)
        workspace.experiment(workspace.client(), recipe.name)
        free = shutil.disk_usage(disk).free
        filler.write_bytes(bytes(max(0, free - 300_000)))
        with pytest.raises(FeatherweightError, match=r"no space|disk"):
            _run(recipe, workspace)
        filler.unlink()
        assert workspace.client().search_registered_models() == []
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def _run(recipe: Recipe, workspace: Workspace) -> None:
    from prefect import Flow

    from flows.optimize import optimize

    Flow(lambda: optimize(recipe, expand(recipe), workspace, ProgressChannel()), name="bad")()
