"""The finetune stage: recovery training of all weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from featherweight import surgery
from featherweight.errors import CheckpointError, DataError, RecipeError
from featherweight.recipe import FinetuneSpec
from featherweight.text import Document, write_documents
from tasks.finetune import finetune

SPEC = FinetuneSpec(steps=40, batch=4, sequence=32, learning_rate=5e-3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_documents(folder, [Document("json", Path(json.__file__).read_text())])
    return folder


def test_the_loss_falls_and_everything_else_is_carried_over(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    metrics = finetune(SPEC, checkpoint=tiny_checkpoint, text=text, out=tmp_path)
    assert metrics["loss_last"] < metrics["loss_first"] - 1
    assert metrics["tokens"] == 40 * 4 * 32
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in tiny_checkpoint.iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    before, after = surgery.load_model(tiny_checkpoint), surgery.load_model(tmp_path)
    assert after.lm_head.weight is after.model.embed_tokens.weight
    assert after.config.to_diff_dict() == before.config.to_diff_dict()
    changed = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(changed)


def test_the_same_seed_gives_the_same_bytes(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"steps": 5})
    digests = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        finetune(spec, checkpoint=tiny_checkpoint, text=text, out=tmp_path / name, seed=seed)
        digests.append(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]


def test_generation_settings_that_transformers_refuses_to_save_are_kept(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_checkpoint, source)
    out.mkdir()
    settings = json.dumps({"eos_token_id": 1, "temperature": 0.6, "do_sample": False})
    (source / "generation_config.json").write_text(settings)
    finetune(SPEC.model_copy(update={"steps": 1}), checkpoint=source, text=text, out=out)
    assert (out / "generation_config.json").read_text() == settings


def test_text_shorter_than_a_block_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_documents(tmp_path / "text", [Document("short", "tiny")])
    with pytest.raises(DataError, match="fewer than one block of 32"):
        finetune(SPEC, checkpoint=tiny_checkpoint, text=tmp_path / "text", out=tmp_path)


def test_sequences_longer_than_the_context_are_refused(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"sequence": 300})
    with pytest.raises(RecipeError, match=r"finetune\.sequence 300 is longer than the model's context of 256"):
        finetune(spec, checkpoint=tiny_checkpoint, text=text, out=tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        surgery.model_type(tmp_path)
