"""The students that distillation makes, of every family."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.checkpoint import opening, saving
from featherweight.distillation.spec import DistillSpec, StackLayers
from featherweight.errors import CheckpointError, RecipeError
from featherweight.model import surgery
from featherweight.model.architecture import stacks
from featherweight.pruning.block_influence import block_influence, most_influential
from featherweight.pruning.spec import PruneSpec
from featherweight.text.model_inputs import example_blocks, inputs_and_labels
from tasks.distill import distill
from tasks.prune import prune
from tests.support.distillation import SPEC
from tests.support.families import FAMILIES, family_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_students_of_every_family_begin_as_layers_of_the_teacher_and_load_again(
    name: str, checkpoints: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    teacher = opening.load_model(checkpoints[name])
    kept = {stack.role: (len(stack.blocks) - 1,) for stack in stacks(teacher)}
    student = surgery.copy_layers(teacher, kept)
    for whole, cut in zip(stacks(teacher), stacks(student), strict=True):
        assert len(cut.blocks) == 1
        theirs = dict(whole.blocks[-1].module.named_parameters())
        assert all(torch.equal(ours, theirs[path]) for path, ours in cut.blocks[0].module.named_parameters() if path in theirs)
    student.save_pretrained(tmp_path)
    again = opening.load_model(tmp_path)
    blocks = example_blocks(checkpoints[name], teacher.config, text, 12, limit=3)
    inputs, _ = inputs_and_labels(teacher.config, blocks)
    with torch.inference_mode():
        torch.testing.assert_close(again(**inputs).logits, student(**inputs).logits)
    assert set(surgery.stack_sizes(again.config).values()) == {1}


def test_a_t5_student_without_the_first_layer_keeps_its_position_bias(checkpoints: dict[str, Path]) -> None:
    teacher = opening.load_model(checkpoints["t5"])
    student: Any = surgery.copy_layers(teacher, {"encoder": (1, 2), "decoder": (2,)})
    bias = stacks(teacher)[0].blocks[0].attentions[0].module.relative_attention_bias.weight
    assert torch.equal(student.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, bias)
    assert student.encoder.config.num_layers == 2 and student.decoder.config.num_layers == 1
    made = student.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (1, 5)


def test_a_student_with_another_tokenizer_is_refused(
    checkpoints: dict[str, Path], tiny_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    spec = DistillSpec(student="other", steps=1, sequence=24)
    with pytest.raises(CheckpointError, match="vocab_size"):
        distill(spec, checkpoint=checkpoints["llama"], text=text, student=tiny_checkpoint, out=tmp_path)
    with pytest.raises(CheckpointError, match="encoder model and its teacher a causal one"):
        distill(spec, checkpoint=checkpoints["llama"], text=text, student=checkpoints["bert"], out=tmp_path)
    other = family_checkpoint("llama", tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["fox"], vocabulary["bear"] = vocabulary["bear"], vocabulary["fox"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"another tokenizer than its teacher: 2 of \d+ tokens, such as 'bear'"):
        distill(spec, checkpoint=checkpoints["llama"], text=text, student=other, out=tmp_path)


def test_block_influence_is_one_minus_the_mean_cosine(checkpoints: dict[str, Path], text: Path) -> None:
    model = opening.load_model(checkpoints["bert"])
    blocks = example_blocks(checkpoints["bert"], model.config, text, 12, limit=10)
    inputs, _ = inputs_and_labels(model.config, blocks)
    with torch.inference_mode():
        states = model(**inputs, output_hidden_states=True).hidden_states
    expected = [1 - torch.cosine_similarity(x, y, -1).mean().item() for x, y in pairwise(states)]
    assert block_influence(model, blocks)["encoder"] == pytest.approx(expected, abs=1e-5)
    assert most_influential([0.1, 0.5, 0.2, 0.4], 2) == (1, 3)


def test_a_layer_that_does_nothing_is_left_out(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    model: Any = opening.load_model(checkpoints["llama"])
    idle = model.model.layers[2]
    torch.nn.init.zeros_(idle.self_attn.o_proj.weight)
    torch.nn.init.zeros_(idle.mlp.down_proj.weight)
    saving.save_model(model, folder, checkpoints["llama"])
    spec = SPEC.model_copy(update={"layers": 2, "choose": "block_influence", "steps": 1, "learning_rate": 1e-9})
    distill(spec, checkpoint=folder, text=text, calibration=text, out=tmp_path / "out")
    student: Any = opening.load_model(tmp_path / "out")
    torch.testing.assert_close(student.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    with pytest.raises(RecipeError, match="block_influence"):
        distill(spec, checkpoint=folder, text=text, out=tmp_path / "none")


@pytest.mark.slow
def test_a_pruned_student_is_taught_by_the_whole_model(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    spec = DistillSpec(prune=PruneSpec.of(ratio=0.5, samples=4, sequence=16), steps=12, batch=4, sequence=24, learning_rate=3e-3)
    assert spec.prune is not None
    for name in ("student", "out"):
        (tmp_path / name).mkdir()
    prune(spec.prune, checkpoint=checkpoints["llama"], calibration=text, out=tmp_path / "student")
    metrics = distill(spec, checkpoint=checkpoints["llama"], text=text, student=tmp_path / "student", out=tmp_path / "out")
    assert metrics["loss_last"] < metrics["loss_first"]
    assert metrics["parameters"] < metrics["parameters_teacher"]


def test_layers_by_stack(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"layers": StackLayers(decoder=1), "steps": 1})
    distill(spec, checkpoint=checkpoints["t5"], text=text, out=tmp_path)
    assert surgery.stack_sizes(opening.load_config(tmp_path)) == {"encoder": 3, "decoder": 1}
