"""The finetune stage: recovery training of all weights or of adapters, in one process or several."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.errors import CheckpointError, DataError, RecipeError, StageError
from featherweight.system.processes import WORKERS_PEAK
from featherweight.text.documents import Document, write_documents
from featherweight.training.spec import FinetuneSpec
from featherweight.training.threads import cores
from tasks.finetune import finetune
from tests.support.families import family_checkpoint
from tests.support.notes import Told

pytestmark = pytest.mark.slow

OF_BART = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
WITHOUT_DROPOUT = {
    "t5": {"dropout_rate": 0.0},
    "mbart": OF_BART,
    "m2m_100": OF_BART | {"encoder_layerdrop": 1.0, "decoder_layerdrop": 1.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
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
    before, after = opening.load_model(tiny_checkpoint), opening.load_model(tmp_path)
    assert after.lm_head.weight is after.model.embed_tokens.weight
    assert after.config.to_diff_dict() == before.config.to_diff_dict()
    changed = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(changed)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"steps": 5}, {"steps": 3, "lora": {"dropout": 0.5}}], ids=["full", "lora"])
def test_the_same_seed_gives_the_same_bytes(options: dict[str, Any], tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    digests = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        finetune(changed(**options), checkpoint=tiny_checkpoint, text=text, out=tmp_path / name, seed=seed)
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
        opening.model_type(tmp_path)


def changed(**changes: object) -> FinetuneSpec:
    return FinetuneSpec.model_validate(SPEC.model_dump() | changes)


def test_lora_gives_a_plain_checkpoint_and_leaves_the_rest_alone(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    spec = changed(lora={"rank": 4, "alpha": 8, "dropout": 0.1, "targets": ["q_proj", "up_proj"]}, learning_rate=2e-2)
    metrics = finetune(spec, checkpoint=tiny_checkpoint, text=text, out=tmp_path)
    assert metrics["loss_last"] < metrics["loss_first"] - 0.3
    assert metrics["parameters_trained"] == 2 * 4 * ((64 + 64) + (64 + 128))
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in tiny_checkpoint.iterdir()}
    before, after = opening.load_model(tiny_checkpoint), opening.load_model(tmp_path)
    assert metrics["parameters"] == opening.parameters(before)
    assert after.config.to_diff_dict() == before.config.to_diff_dict()
    weights = dict(after.named_parameters())
    moved = {name for name, weight in before.named_parameters() if not torch.equal(weight, weights[name])}
    assert moved == {name for name in weights if name.endswith(("q_proj.weight", "up_proj.weight"))}


def test_it_stops_early_on_held_out_text(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    write_documents(tmp_path / "other", [Document("other", " ".join(f"{n * n:b}" for n in range(400)))])
    spec = changed(patience=2, evaluate_every=2)
    metrics = finetune(spec, checkpoint=tiny_checkpoint, text=text, calibration=tmp_path / "other", out=tmp_path)
    assert metrics["steps"] == metrics["best_step"] + 2 * 2 < 40
    assert metrics["held_out_loss"] <= metrics["held_out_first"]
    with pytest.raises(RecipeError, match="held-out text"):
        finetune(spec, checkpoint=tiny_checkpoint, text=text, out=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", WITHOUT_DROPOUT)
def test_every_family_is_finetuned_whole_and_by_adapters(model_type: str, tmp_path: Path) -> None:
    """Blocks of these families are padded or masked, so that equal parts of a batch predict different numbers of tokens."""
    write_documents(
        tmp_path / "text", [Document(str(n), f"the {n} little fox ran over the hill. " * (1 + n % 5)) for n in range(20)]
    )
    source = family_checkpoint(model_type, tmp_path / "source", **WITHOUT_DROPOUT[model_type])
    curves = []
    for name, changes in {"whole": {}, "parts": {"accumulate": 3}, "lora": {"lora": {"rank": 4}}}.items():
        (tmp_path / name).mkdir()
        told, text = Told(), tmp_path / "text"
        spec = changed(steps=12, sequence=16, evaluate_every=6, **changes)
        metrics = finetune(spec, checkpoint=source, text=text, calibration=text, out=tmp_path / name, progress=told)
        assert metrics["held_out_loss"] < metrics["held_out_first"] - 0.05
        tuned = opening.load_model(tmp_path / name)
        assert opening.parameters(tuned) == metrics["parameters"]
        assert tuned.config.to_diff_dict() == opening.load_config(source).to_diff_dict()
        curves.append(told.losses)
    assert curves[1][:4] == pytest.approx(curves[0][:4], rel=1e-4)  # rounding grows from step to step


@pytest.mark.slow
@pytest.mark.skipif(cores() < 2, reason="needs two cores")
def test_two_processes_train_as_one_even_when_interrupted(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """The same losses and weights as one process with the whole batch; the second launch goes on where the first was stopped."""

    def run(out: str, told: Told, **changes: object) -> dict[str, float]:
        (tmp_path / out).mkdir(exist_ok=True)
        spec = changed(steps=6, evaluate_every=3, save_every_s=0, **changes)
        folders = {"text": text, "calibration": text, "scratch": tmp_path / f"{out}-scratch"}
        return dict(finetune(spec, checkpoint=tiny_checkpoint, out=tmp_path / out, progress=told, **folders))

    one, stopped, two = Told(), Told(stop_at=4), Told()
    expected = run("one", one)
    with pytest.raises(KeyboardInterrupt):
        run("two", stopped, processes=2)
    metrics = run("two", two, processes=2)
    assert len(two.notes) == 1
    assert two.notes[0].startswith("resuming at step ")
    assert two.losses == pytest.approx(one.losses, abs=1e-4)
    assert two.losses[:4] == stopped.losses
    assert metrics["held_out_loss"] == pytest.approx(expected["held_out_loss"], abs=1e-4)
    assert metrics[WORKERS_PEAK] > 2 * 1e8, "each of them imports torch"
    assert WORKERS_PEAK not in expected
    alone, together = opening.load_model(tmp_path / "one"), opening.load_model(tmp_path / "two")
    for a, b in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_more_processes_than_cores_are_refused(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    spec = changed(batch=1000, processes=1000)
    with pytest.raises(StageError, match=r"processes 1000 is more than the \d+ (cores|GPUs) in reach"):
        finetune(spec, checkpoint=tiny_checkpoint, text=text, out=tmp_path)


def test_a_batch_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(ValueError, match="batch 4 cannot be split into accumulate 3 x processes 2"):
        changed(accumulate=3, processes=2)
