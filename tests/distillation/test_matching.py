"""Hidden states and attention maps of matched layers, against formulas in float64, and what is learned from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.distillation.matching import MAP_LOSSES, Matcher, layer_pairs, state_error
from featherweight.distillation.spec import DistillSpec, StackMap
from featherweight.errors import RecipeError
from featherweight.model import surgery
from featherweight.text.model_inputs import example_blocks, inputs_and_labels, real_positions
from tasks.distill import distill
from tests.support.distillation import SPEC
from tests.support.families import family_checkpoint, tiny_model


def test_hidden_states_are_compared_as_the_formula_says() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    theirs = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    projection = torch.nn.Linear(4, 6).double()
    moved = ours @ projection.weight.T + projection.bias
    rows = [(moved[b, i] - theirs[b, i]) ** 2 for b, i in real.nonzero().tolist()]
    torch.testing.assert_close(state_error(ours, theirs, real, projection), torch.stack(rows).mean())
    assert state_error(theirs, theirs, real).item() == 0


def kl_formula(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    return sum((p * (p / q).log()).item() for p, q in zip(theirs, ours, strict=True) if p > 0)


def mse_formula(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    return sum((p - q).item() ** 2 for p, q in zip(theirs, ours, strict=True)) / len(theirs)


@pytest.mark.parametrize(("kind", "formula"), [("kl", kl_formula), ("mse", mse_formula)])
@pytest.mark.parametrize("heads", [3, 2])
def test_attention_maps_are_compared_as_the_formula_says(heads: int, kind: str, formula: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.ones(4, 4).triu(1).bool()

    def maps(count: int) -> torch.Tensor:
        scores = torch.randn(2, count, 4, 4, generator=generator, dtype=torch.float64)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1)

    ours, theirs = maps(heads).requires_grad_(), maps(3)
    real = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    a, b = (theirs, ours) if heads == 3 else (theirs.mean(1, keepdim=True), ours.mean(1, keepdim=True))
    terms = [formula(a[n, h, i], b[n, h, i]) for n, i in real.nonzero().tolist() for h in range(a.shape[1])]
    found = MAP_LOSSES[kind](ours, theirs, real)
    assert found.item() == pytest.approx(sum(terms) / len(terms))
    assert MAP_LOSSES[kind](theirs, theirs, real).item() == 0
    assert torch.isfinite(torch.autograd.grad(found, ours)[0]).all()


def test_layers_are_mapped() -> None:
    def places(wanted: Any, student: dict, teacher: dict) -> list[tuple[int, int]]:
        return [(pair.student, pair.teacher) for pair in layer_pairs(wanted, student, teacher)]

    assert places("uniform", {"decoder": 4}, {"decoder": 12}) == [(0, 2), (1, 5), (2, 8), (3, 11)]
    assert places("uniform", {"decoder": 3}, {"decoder": 3}) == [(0, 0), (1, 1), (2, 2)]
    assert places("last", {"encoder": 2, "decoder": 1}, {"encoder": 6, "decoder": 6}) == [(1, 5), (0, 5)]
    assert places((1, 3), {"decoder": 2}, {"decoder": 4}) == [(0, 1), (1, 3)]
    assert places(StackMap(decoder=(0,)), {"encoder": 1, "decoder": 1}, {"encoder": 2, "decoder": 2}) == [(0, 1), (0, 0)]
    for wanted in ((1,), (1, 4), (-1, 2)):
        with pytest.raises(RecipeError, match=r"distill\.layer_map"):
            layer_pairs(wanted, {"decoder": 2}, {"decoder": 4})
    with pytest.raises(RecipeError, match=r"distill\.layer_map\.encoder: the model has no encoder; leave it out"):
        layer_pairs(StackMap(encoder=(0,)), {"decoder": 2}, {"decoder": 4})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_the_matched_loss_is_the_sum_of_its_parts(kind: str, checkpoints: dict[str, Path], text: Path) -> None:
    spec = SPEC.model_copy(update={"hidden_weight": 0.5, "attention_weight": 2.0, "attention_loss": kind})
    teacher = opening.load_model(checkpoints["t5"])
    student = surgery.copy_layers(teacher, (0, 2))
    pairs = layer_pairs("uniform", {"encoder": 2, "decoder": 2}, {"encoder": 3, "decoder": 3})
    matcher = Matcher(teacher, student, pairs, spec, 0)
    blocks = example_blocks(checkpoints["t5"], teacher.config, text, 12, limit=3)
    inputs, labels = inputs_and_labels(teacher.config, blocks)
    real = real_positions(inputs, labels)
    of_teacher, of_student = matcher.run(teacher, inputs, teacher=True), matcher.run(student, inputs, teacher=False)
    parts = [state_error(a, b, real[p.role]) for a, b, p in zip(of_student[1], of_teacher[1], pairs, strict=True)]
    names = {"encoder": ("encoder_attentions",), "decoder": ("decoder_attentions", "cross_attentions")}
    maps = [
        MAP_LOSSES[kind](of_student[0][name][p.student], of_teacher[0][name][p.teacher], real[p.role])
        for p in pairs
        for name in names[p.role]
    ]
    expected = 0.5 * sum(parts) / len(parts) + 2.0 * sum(maps) / len(maps)
    torch.testing.assert_close(matcher.loss(of_student, of_teacher, real), expected)
    assert len(maps) == 6 and expected > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "t5", "marian", "m2m_100", "bert", "distilbert"])
def test_answers_hidden_states_and_maps_are_learned_together(
    name: str, checkpoints: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    weights = {"hidden_weight": 0.3, "attention_weight": 0.3, "divergence": "jensen_shannon"}
    spec = SPEC.model_copy(update=weights | {"steps": 12, "learning_rate": 3e-3})
    metrics = distill(spec, checkpoint=checkpoints[name], text=text, out=tmp_path)
    assert metrics["loss_last"] < metrics["loss_first"]
    student = opening.load_model(tmp_path)
    assert set(surgery.stack_sizes(student.config).values()) == {1}
    assert "eager" not in (tmp_path / "config.json").read_text()
    assert load_tokenizer(tmp_path).get_vocab() == load_tokenizer(checkpoints[name]).get_vocab()


@pytest.mark.slow
def test_a_narrower_student_learns_through_projections(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    narrow = family_checkpoint("llama", tmp_path / "narrow", hidden_size=16)
    spec = DistillSpec(
        student="narrow", hidden_weight=1.0, attention_weight=0.5, steps=12, batch=4, sequence=24, learning_rate=3e-3
    )
    metrics = distill(spec, checkpoint=checkpoints["llama"], text=text, student=narrow, out=tmp_path / "out")
    assert metrics["loss_last"] < metrics["loss_first"]
    student = opening.load_model(tmp_path / "out")
    assert student.config.hidden_size == 16 and metrics["parameters"] == opening.parameters(student)


def test_dropout_does_not_reach_matched_maps() -> None:
    teacher = tiny_model("bert", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    student = surgery.copy_layers(teacher, (0, 1)).train()
    pairs = layer_pairs("uniform", {"encoder": 2}, {"encoder": 2})
    matcher = Matcher(teacher, student, pairs, SPEC.model_copy(update={"attention_weight": 1.0}), 0)
    inputs = {"input_ids": torch.arange(5, 15)[None]}
    real = {"encoder": torch.ones(1, 10, dtype=torch.bool)}
    both = matcher.run(student, inputs, teacher=False), matcher.run(teacher, inputs, teacher=True)
    assert matcher.loss(*both, real).item() == pytest.approx(0, abs=1e-6)
