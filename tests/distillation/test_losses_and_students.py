"""What distillation minimises, against formulas in float64; what it reads of a teacher; the students it makes, of every family."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from featherweight.checkpoint import opening
from featherweight.distillation import teacher_answers
from featherweight.distillation.losses import TopK, distillation_loss, top_k
from featherweight.distillation.matching import MAP_LOSSES, Matcher, layer_pairs, state_error
from featherweight.distillation.spec import DistillSpec, GenerateSpec, StackLayers, StackMap
from featherweight.errors import CheckpointError, RecipeError
from featherweight.model import surgery
from featherweight.model.architecture import stacks
from featherweight.pruning.block_influence import block_influence, most_influential
from featherweight.pruning.spec import PruneSpec
from featherweight.recipe.plan import expand
from featherweight.recipe.recipe import Recipe
from featherweight.text.documents import Document, read_documents, write_documents
from featherweight.text.model_inputs import example_blocks, inputs_and_labels, real_positions
from featherweight.text.tokens import load_tokenizer
from tasks.distill import distill, training_blocks
from tasks.generate import generate
from tasks.prune import prune
from tests.support.families import FAMILIES, family_checkpoint, tiny_model

SPEC = DistillSpec(layers=1, steps=3, batch=4, sequence=24, learning_rate=1e-3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Little stories of words that the tiny tokenizers know."""
    folder = tmp_path_factory.mktemp("text")
    animals, verbs, places = ("fox", "bear", "wolf", "hare"), ("ran", "sang", "ate", "slept"), ("river", "hill", "house")
    lines = [
        f"once upon a time there was a little {a} and the {a} {v} by the {p} day and night ."
        for a in animals
        for v in verbs
        for p in places
    ]
    write_documents(folder, [Document(str(n), " ".join(lines[n : n + 3])) for n in range(len(lines) - 2)])
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    layers = {
        "llama": {"num_hidden_layers": 3},
        "t5": {"num_layers": 3, "num_decoder_layers": 3},
        "bert": {"num_hidden_layers": 3},
        "m2m_100": {"encoder_layerdrop": 1.0, "decoder_layerdrop": 1.0},
    }
    return {name: family_checkpoint(name, folder / name, **layers.get(name, {})) for name in (*FAMILIES, "m2m_100")}


def divergence_formula(kind: str, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The definitions, on probabilities."""
    if kind == "forward_kl":
        return (p * (p / q).log()).sum(-1)
    if kind == "reverse_kl":
        return (q * (q / p).log()).sum(-1)
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("shape", [(24, 50), (600, 3000)])
def test_a_divergence_and_its_gradient_are_the_formula(kind: str, temperature: float, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    t = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(shape[1], shape[:1], generator=generator)
    labels[::3] = -100
    loss = distillation_loss(s, t, labels, temperature, 0.7, kind)
    found = torch.autograd.grad(2 * loss, s)[0]
    d = divergence_formula(kind, (t / temperature).softmax(-1), (s / temperature).softmax(-1))
    expected = 0.7 * temperature**2 * d[labels >= 0].mean() + 0.3 * torch.nn.functional.cross_entropy(s, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, torch.autograd.grad(2 * expected, s)[0], rtol=1e-8, atol=1e-12)
    assert not found[::3].any()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_divergence_of_the_likeliest_tokens_is_a_lower_bound_and_exact_for_all(kind: str, k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    s = (2 * torch.randn(12, 40, generator=generator, dtype=torch.float64)).requires_grad_()
    t = 2 * torch.randn(12, 40, generator=generator, dtype=torch.float64)
    labels = torch.zeros(12, dtype=torch.long)
    kept = top_k(t, 2.0, k)
    assert kept.log_p.exp().sum(-1).allclose(torch.ones(12, dtype=torch.float64))
    loss = distillation_loss(s, kept, labels, 2.0, 1.0, kind)
    whole = distillation_loss(s, t, labels, 2.0, 1.0, kind)
    gradient = torch.autograd.grad(loss, s)[0]
    q = (s / 2).softmax(-1)
    buckets = q.gather(1, kept.ids)
    if k < 40:
        assert loss < whole
        buckets = torch.cat([buckets, 1 - buckets.sum(-1, keepdim=True)], 1)
    else:
        torch.testing.assert_close(loss, whole)
    expected = 4 * divergence_formula(kind, kept.log_p.exp(), buckets).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, s)[0], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_a_certain_teacher_leaves_the_gradient_finite(kind: str) -> None:
    t = torch.full((3, 100), -200.0)
    t[:, 7] = 200.0
    s = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for teacher in (t, top_k(t, 1.0, 8)):
        loss = distillation_loss(s, teacher, torch.zeros(3, dtype=torch.long), 1.0, 1.0, kind)
        assert torch.isfinite(torch.autograd.grad(loss, s)[0]).all()
        assert torch.isfinite(loss)


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


def test_a_narrower_student_learns_through_projections(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    narrow = family_checkpoint("llama", tmp_path / "narrow", hidden_size=16)
    spec = DistillSpec(
        student="narrow", hidden_weight=1.0, attention_weight=0.5, steps=12, batch=4, sequence=24, learning_rate=3e-3
    )
    metrics = distill(spec, checkpoint=checkpoints["llama"], text=text, student=narrow, out=tmp_path / "out")
    assert metrics["loss_last"] < metrics["loss_first"]
    student = opening.load_model(tmp_path / "out")
    assert student.config.hidden_size == 16 and metrics["parameters"] == opening.parameters(student)


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
    opening.save_model(model, folder, checkpoints["llama"])
    spec = SPEC.model_copy(update={"layers": 2, "choose": "block_influence", "steps": 1, "learning_rate": 1e-9})
    distill(spec, checkpoint=folder, text=text, calibration=text, out=tmp_path / "out")
    student: Any = opening.load_model(tmp_path / "out")
    torch.testing.assert_close(student.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    with pytest.raises(RecipeError, match="block_influence"):
        distill(spec, checkpoint=folder, text=text, out=tmp_path / "none")


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


def recipe_of(spec: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "t",
            "checkpoint": {"train": {}},
            "data": {"source": "x"},
            "promote": {"model": "t"},
            "stages": {"distill": {"small": spec}, "export": {"ct2": {"engine": "ctranslate2"}}},
        }
    )


def test_the_plan_brings_what_a_distillation_reads() -> None:
    nodes = expand(recipe_of({"student": "folder", "sequence_level": {"samples": 4}})).nodes
    assert nodes["small"].inputs["student"] == "small+student" and nodes["small+student"].stage == "load"
    assert nodes["small"].inputs["generated"] == "small+text" and nodes["small+text"].inputs["checkpoint"] == "checkpoint"
    nodes = expand(recipe_of({"layers": 2, "choose": "block_influence"})).nodes
    assert nodes["small"].inputs["calibration"] == "text/calibration"
    nodes = expand(recipe_of({"prune": {"ratio": 0.5}})).nodes
    assert nodes["small+student"].stage == "prune" and nodes["small+student"].spec.finetune is None  # type: ignore[attr-defined]
    assert nodes["small"].inputs["student"] == "small+student" and nodes["small"].inputs["checkpoint"] == "checkpoint"


def test_a_pruned_student_is_taught_by_the_whole_model(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    spec = DistillSpec(prune=PruneSpec.of(ratio=0.5, samples=4, sequence=16), steps=12, batch=4, sequence=24, learning_rate=3e-3)
    assert spec.prune is not None
    for name in ("student", "out"):
        (tmp_path / name).mkdir()
    prune(spec.prune, checkpoint=checkpoints["llama"], calibration=text, out=tmp_path / "student")
    metrics = distill(spec, checkpoint=checkpoints["llama"], text=text, student=tmp_path / "student", out=tmp_path / "out")
    assert metrics["loss_last"] < metrics["loss_first"]
    assert metrics["parameters"] < metrics["parameters_teacher"]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({}, "exactly one of"),
        ({"layers": 2, "student": "x"}, "exactly one of"),
        ({"prune": {"finetune": {"steps": 3}}}, "distillation is the recovery"),
        ({"layers": [0, 1], "choose": "block_influence"}, "wants a number"),
        ({"layers": {"encoder": [0]}, "choose": "block_influence"}, "wants a number"),
        ({"layers": 2, "teacher_cache": "top_k", "hidden_weight": 1.0}, "keeps no hidden states"),
        ({"layers": 2, "sequence_level": {"beams": 2, "temperature": 1.0}}, "not both"),
        ({"layers": 2, "sequence_level": {"prompt_tokens": 128}}, "nothing to write"),
    ],
)
def test_contradictions_are_refused(spec: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        DistillSpec.model_validate(spec)


def test_layers_by_stack(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"layers": StackLayers(decoder=1), "steps": 1})
    distill(spec, checkpoint=checkpoints["t5"], text=text, out=tmp_path)
    assert surgery.stack_sizes(opening.load_config(tmp_path)) == {"encoder": 3, "decoder": 1}


def test_dropout_does_not_reach_matched_maps() -> None:
    teacher = tiny_model("bert", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    student = surgery.copy_layers(teacher, (0, 1)).train()
    pairs = layer_pairs("uniform", {"encoder": 2}, {"encoder": 2})
    matcher = Matcher(teacher, student, pairs, SPEC.model_copy(update={"attention_weight": 1.0}), 0)
    inputs = {"input_ids": torch.arange(5, 15)[None]}
    real = {"encoder": torch.ones(1, 10, dtype=torch.bool)}
    both = matcher.run(student, inputs, teacher=False), matcher.run(teacher, inputs, teacher=True)
    assert matcher.loss(*both, real).item() == pytest.approx(0, abs=1e-6)
