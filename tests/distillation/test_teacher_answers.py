"""What is read of a teacher: its answers, kept once, and its own text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.distillation import teacher_answers
from featherweight.distillation.losses import TopK, distillation_loss
from featherweight.distillation.spec import DistillSpec, GenerateSpec
from featherweight.errors import RecipeError
from featherweight.text.documents import read_documents
from featherweight.text.model_inputs import example_blocks, inputs_and_labels
from tasks.distill import training_blocks
from tasks.generate import generate
from tests.support.distillation import SPEC


@pytest.mark.slow
@pytest.mark.parametrize("place", ["memory", "disk", None])
def test_kept_answers_are_the_teachers(
    place: str | None, checkpoints: dict[str, Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_answers, "place_for", lambda size: place)
    teacher = opening.load_model(checkpoints["t5"])
    blocks = example_blocks(checkpoints["t5"], teacher.config, text, 12, limit=6)
    spec = SPEC.model_copy(update={"teacher_cache": "top_k", "top_k": 10_000})
    kept = teacher_answers.answers_of(teacher, blocks, spec)
    whole = teacher_answers.answers_of(teacher, blocks, spec.model_copy(update={"teacher_cache": "none"}))
    labels = inputs_and_labels(teacher.config, blocks[:4])[1].flatten()
    logits = torch.randn(len(labels), teacher.config.vocab_size, generator=torch.Generator().manual_seed(0))
    losses = [distillation_loss(logits, told(blocks[:4]), labels, 2.0, 1.0) for told in (whole, kept, kept)]
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(losses[2], losses[1])
    few = teacher_answers.answers_of(teacher, blocks, spec.model_copy(update={"top_k": 8}))
    told = few(blocks[1:3])
    assert isinstance(told, TopK) and told.log_p.shape == (24, 9)
    assert distillation_loss(logits, few(blocks[:4]), labels, 2.0, 1.0) < losses[0]


def test_a_cached_teacher_is_asked_once_a_block(checkpoints: dict[str, Path], text: Path) -> None:
    teacher = opening.load_model(checkpoints["llama"])
    blocks = example_blocks(checkpoints["llama"], teacher.config, text, 12, limit=6)
    asked: list[int] = []
    teacher.register_forward_hook(lambda module, _, output: asked.append(len(output.logits)))
    told = teacher_answers.answers_of(teacher, blocks, SPEC.model_copy(update={"steps": 4, "top_k": 8}))
    for rows in ([0, 1], [1, 2, 3], [3, 2], [4, 5, 0]):
        told(blocks[rows])
    assert asked == [2, 2, 2]
    assert not teacher_answers.cut_to_top_k(SPEC, SPEC.steps * SPEC.batch)
    assert not teacher_answers.cut_to_top_k(SPEC.model_copy(update={"hidden_weight": 1.0}), 2)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.8}, {"beams": 2}])
@pytest.mark.parametrize("name", ["llama", "t5", "marian"])
def test_the_teacher_writes_the_same_text_again(
    name: str, changes: dict[str, Any], checkpoints: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    spec = GenerateSpec(samples=6, sequence=24, **changes)
    found = []
    for run in ("one", "two"):
        metrics = generate(spec, checkpoint=checkpoints[name], text=text, out=tmp_path / run, seed=1)
        found.append(list(read_documents(tmp_path / run)))
    assert found[0] == found[1] and len(found[0]) == metrics["documents"] == 6
    assert all((document.target is not None) == (name != "llama") for document in found[0])
    if name == "llama":
        assert metrics["by_ctranslate2"] == 1
        assert found[0][0].text.startswith("once upon a time there was a little fox")


def test_generated_text_takes_its_share(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    generate(GenerateSpec(samples=8, sequence=24), checkpoint=checkpoints["t5"], text=text, out=tmp_path)
    config = opening.load_config(checkpoints["t5"])
    spec = SPEC.model_copy(update={"steps": 8})
    for share in (0.25, 0.5, 1.0):
        mixed = DistillSpec.model_validate({**spec.model_dump(exclude={"sequence_level"}), "sequence_level": {"share": share}})
        blocks = training_blocks(mixed, checkpoints["t5"], config, text, tmp_path, 0)
        written = {tuple(row) for row in example_blocks(checkpoints["t5"], config, tmp_path, 24).tolist()}
        assert sum(tuple(row) in written for row in blocks.tolist()) == round(share * len(blocks))


def test_an_encoder_writes_no_text(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="an encoder fills in masks"):
        generate(GenerateSpec(sequence=24), checkpoint=checkpoints["bert"], text=text, out=tmp_path)
