"""Sparse checkpoints through the stages, with the zeros where they were, and what the report says of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.checkpoint.spec import LoadSpec
from featherweight.distillation.spec import DistillSpec
from featherweight.errors import CheckpointError, RecipeError, StageError
from featherweight.model import surgery
from featherweight.model.architecture import task_of
from featherweight.model.parent import Parent
from featherweight.model.sparsity import FILE, Sparsity, Zeros
from featherweight.pruning.spec import PruneSpec
from featherweight.quantization.spec import QuantizeSpec
from featherweight.recipe.plan import expand
from featherweight.recipe.recipe import Recipe
from featherweight.report.page import render_report
from featherweight.report.result import OptimizationResult, VariantRow
from featherweight.report.tables import columns
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.text.documents import Document, write_documents
from featherweight.text.model_inputs import example_blocks
from featherweight.training.spec import FinetuneSpec, LoraSpec
from tasks.distill import distill
from tasks.export import export
from tasks.finetune import finetune
from tasks.load import load
from tasks.prune import prune
from tasks.quantize import quantize
from tasks.summary import served_zeros
from tests.support.families import FAMILIES, family_checkpoint
from tests.support.serving_models import serving_spec

NAME = "model.layers.0.self_attn.q_proj.weight"
SMALL: dict[str, Any] = {"samples": 8, "sequence": 16}
BRIEF: dict[str, Any] = {"steps": 4, "batch": 2, "sequence": 16, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    story = "once upon a time there was a little fox . the fox met the old bear in the wood and they ran over the hill . "
    write_documents(folder, [Document(f"{place}.txt", story * 4 + f"number {place}") for place in range(8)])
    return folder


def sparse_checkpoint(source: Path, text: Path, out: Path, **spec: Any) -> dict[str, float]:
    out.mkdir()
    return prune(PruneSpec.of(method="sparse", **SMALL | spec), checkpoint=source, calibration=text, out=out)


@pytest.fixture(scope="module")
def sparse(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama pruned to 2:4 by Wanda."""
    folder = tmp_path_factory.mktemp("sparse")
    sparse_checkpoint(family_checkpoint("llama", folder / "source"), text, folder / "sparse", pattern="2:4")
    return folder / "sparse"


def zeros_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(Zeros.of(opening.load_model(folder), Sparsity.read(folder)).masks)


def same_zeros(folder: Path, other: Path) -> bool:
    found, expected = zeros_of(folder), zeros_of(other)
    return found.keys() == expected.keys() and all(torch.equal(found[name], mask) for name, mask in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_sparse_checkpoint_says_what_it_is(model_type: str, criterion: str, text: Path, tmp_path: Path) -> None:
    source = family_checkpoint(model_type, tmp_path / "source")
    metrics = sparse_checkpoint(source, text, tmp_path / "out", criterion=criterion, sparsity=0.25)
    told = Sparsity.read(tmp_path / "out")
    model = opening.load_model(tmp_path / "out")
    assert told is not None
    assert (told.criterion, told.pattern) == (criterion, "unstructured")
    for name, share in told.shares.items():
        assert share == pytest.approx((model.get_parameter(name) == 0).double().mean().item(), abs=1e-6)
        assert share == pytest.approx(0.25, abs=0.02)
    assert metrics["zero_share"] == pytest.approx(0.25, abs=0.01)
    assert metrics["parameters"] == metrics["parameters_before"]
    blocks = example_blocks(source, model.config, text, 16, limit=4)
    assert torch.isfinite(blocks.float()).all()
    assert metrics["loss_after"] != metrics["loss_before"]


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [None, LoraSpec(rank=4, alpha=64)], ids=["full", "lora"])
@pytest.mark.parametrize("model_type", ["llama", "t5", "bert"])
def test_zeros_stay_in_finetuning(model_type: str, adapters: LoraSpec | None, text: Path, tmp_path: Path) -> None:
    sparse_checkpoint(family_checkpoint(model_type, tmp_path / "source"), text, tmp_path / "sparse")
    (tmp_path / "tuned").mkdir()
    spec = FinetuneSpec(steps=4, batch=2, sequence=16, learning_rate=1e-2, lora=adapters)
    metrics = finetune(spec, checkpoint=tmp_path / "sparse", text=text, out=tmp_path / "tuned")
    assert same_zeros(tmp_path / "tuned", tmp_path / "sparse")
    assert metrics["zero_share"] == pytest.approx(0.5, abs=0.01)
    before, after = opening.load_model(tmp_path / "sparse"), opening.load_model(tmp_path / "tuned")
    for name, mask in zeros_of(tmp_path / "sparse").items():
        moved = before.get_parameter(name) != after.get_parameter(name)
        assert moved[~mask].float().mean() > 0.5, name


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "t5", "bert"])
def test_zeros_of_a_student_stay_in_distillation(model_type: str, text: Path, tmp_path: Path) -> None:
    source = family_checkpoint(model_type, tmp_path / "source")
    sparse_checkpoint(source, text, tmp_path / "student", criterion="magnitude")
    spec = DistillSpec(prune=PruneSpec.of(method="sparse"), hidden_weight=0.5, attention_weight=0.5, **BRIEF)
    metrics = distill(spec, checkpoint=source, student=tmp_path / "student", text=text, out=tmp_path / "out")
    assert same_zeros(tmp_path / "out", tmp_path / "student")
    assert metrics["zero_share"] == loaded(tmp_path / "out", tmp_path / "loaded")["zero_share"] == pytest.approx(0.5, abs=0.01)
    before, after = opening.load_model(tmp_path / "student"), opening.load_model(tmp_path / "out")
    moved = [not torch.equal(weight, after.get_parameter(name)) for name, weight in before.named_parameters()]
    assert all(moved)
    assert told_of(tmp_path / "out", metrics) == ("unstructured", metrics["zero_share"])


def told_of(distilled: Path, metrics: Mapping[str, float]) -> tuple[str, float] | None:
    """What the report tells of a distilled checkpoint that is served."""
    stages = {"distill": {"ds": {"prune": {"method": "sparse"}}}, "export": {"ct2": {"engine": "ctranslate2"}}}
    tree = {"name": "t", "checkpoint": {"source": "x"}, "data": {"source": "x"}, "promote": {"model": "t"}, "stages": stages}
    plan = expand(Recipe.model_validate(tree))
    session: Any = SimpleNamespace(workspace=SimpleNamespace(materialize=lambda ref, check: distilled))
    outcomes: Any = {id: SimpleNamespace(artifact=SimpleNamespace(metrics=metrics if id == "ds" else {})) for id in plan.nodes}
    return served_zeros(plan, next(variant for variant in plan.variants if variant.name == "ds/ct2"), outcomes, session)


@pytest.mark.slow
def test_a_student_of_sparse_layers_keeps_their_zeros(text: Path, tmp_path: Path) -> None:
    sparse_checkpoint(
        family_checkpoint("llama", tmp_path / "source", num_hidden_layers=3), text, tmp_path / "sparse", pattern="2:4"
    )
    (tmp_path / "out").mkdir()
    spec = DistillSpec(layers=(0, 2), **BRIEF)
    metrics = distill(spec, checkpoint=tmp_path / "sparse", text=text, out=tmp_path / "out")
    found, whole = zeros_of(tmp_path / "out"), zeros_of(tmp_path / "sparse")
    assert found.keys() == {name for name in whole if "layers.2." not in name}
    assert all(torch.equal(mask, whole[name.replace("layers.1.", "layers.2.")]) for name, mask in found.items())
    assert metrics["zero_share"] == 0.5
    assert told_of(tmp_path / "out", metrics) == ("2:4", 0.5)


def test_dense_layers_of_a_partly_sparse_teacher_stay_dense(text: Path, tmp_path: Path) -> None:
    source = opening.load_model(family_checkpoint("llama", tmp_path / "source"))
    name = "model.layers.1.mlp.up_proj.weight"
    source.get_parameter(name).data[:, ::2] = 0
    partly = Sparsity("magnitude", "2:4", {name: 0.5})
    assert partly.of_layers(surgery.copy_layers(source, (0,))) is None
    assert partly.of_layers(surgery.copy_layers(source, (1,))) == replace(partly, shares={name.replace("1", "0"): 0.5})


@pytest.mark.slow
def test_held_zeros_get_no_step_at_all(sparse: Path) -> None:
    """Not put back afterwards: the optimizer never moves them, so that they stay zero in every forward pass."""
    model = opening.load_model(sparse)
    zeros = Zeros.of(model, Sparsity.read(sparse))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    ids = torch.randint(5, 40, (2, 16), generator=torch.Generator().manual_seed(0))
    with zeros.held(model):
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            zeros.require_kept(model, "a step")
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with pytest.raises(StageError, match=r"a step filled \d+ of the 512 zeros of model\.layers\.0\.self_attn\.q_proj\.weight"):
        zeros.require_kept(model, "a step")
    zeros.restore(model)
    zeros.require_kept(model, "restoring")


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        {"method": "rtn", "grid": "int4-g32"},
        {"method": "smoothquant"},
        {"method": "qat", "start": "rtn", "grid": "int4-g32", "steps": 2, "batch": 2, "learning_rate": 1e-2},
    ],
    ids=lambda spec: spec["method"],
)
def test_zeros_stay_in_quantization(spec: dict[str, Any], sparse: Path, text: Path, tmp_path: Path) -> None:
    metrics = quantize(QuantizeSpec.of(**SMALL | spec), checkpoint=sparse, text=text, calibration=text, out=tmp_path)
    found = zeros_of(tmp_path)
    assert all(found[name][mask].all() for name, mask in zeros_of(sparse).items())
    assert metrics["zero_share"] == 0.5


@pytest.mark.parametrize("spec", [{"method": "gptq"}, {"method": "qat"}])
def test_gptq_would_fill_zeros_and_is_refused(spec: dict[str, Any], sparse: Path, text: Path, tmp_path: Path) -> None:
    chosen = QuantizeSpec.of(**SMALL | spec)
    with pytest.raises(RecipeError, match=r"^quantize: sparse \+ (gptq|qat)-int8: GPTQ .* fills the zeros; take rtn"):
        quantize(chosen, checkpoint=sparse, text=text, calibration=text, out=tmp_path)
    assert not list(tmp_path.iterdir())
    assert "fills the zeros" in (chosen.refusal(Parent("text-generation", sparse=True)) or "")
    assert chosen.refusal(Parent("text-generation")) is None
    assert QuantizeSpec.of().refusal(Parent("text-generation", sparse=True)) is None
    assert (PruneSpec.of(method="sparse").sparse, PruneSpec.of().sparse) == (True, False)


def loaded(source: Path, out: Path) -> dict[str, float]:
    out.mkdir()
    task = task_of(opening.load_config(source))
    return dict(load(LoadSpec(source=str(source), task=task), out=out))


@pytest.mark.slow
def test_a_sparse_source_stays_sparse(sparse: Path, text: Path, tmp_path: Path) -> None:
    assert loaded(sparse, tmp_path / "loaded")["zero_share"] == 0.5
    assert Sparsity.read(tmp_path / "loaded") == Sparsity.read(sparse)
    for folder in ("tuned", "refused", "served"):
        (tmp_path / folder).mkdir()
    spec = FinetuneSpec(steps=2, batch=2, sequence=16, learning_rate=1e-2)
    finetune(spec, checkpoint=tmp_path / "loaded", text=text, out=tmp_path / "tuned")
    assert same_zeros(tmp_path / "tuned", sparse)
    gptq = QuantizeSpec.of(method="gptq", **SMALL)
    with pytest.raises(RecipeError, match=r"^quantize: sparse \+ gptq-int8: GPTQ .* take rtn") as refused:
        quantize(gptq, checkpoint=tmp_path / "loaded", text=text, calibration=text, out=tmp_path / "refused")
    assert "\n" not in str(refused.value)
    export(serving_spec(engine="torch"), checkpoint=tmp_path / "tuned", calibration=text, out=tmp_path / "served")
    assert loaded(tmp_path / "served", tmp_path / "again")["zero_share"] == 0.5  # what is registered, taken up again


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "t5", "bert"])
@pytest.mark.parametrize(
    ("spec", "pattern"), [({"pattern": "2:4"}, "2:4"), ({"sparsity": 0.6}, "unstructured"), ({"sparsity": 0.3}, None)]
)
def test_zeros_that_nobody_told_of_are_found(
    model_type: str, spec: dict[str, Any], pattern: str | None, text: Path, tmp_path: Path
) -> None:
    sparse_checkpoint(family_checkpoint(model_type, tmp_path / "source"), text, tmp_path / "sparse", criterion="magnitude", **spec)
    told = Sparsity.read(tmp_path / "sparse")
    assert told is not None
    (tmp_path / "sparse" / FILE).unlink()
    metrics = loaded(tmp_path / "sparse", tmp_path / "loaded")
    found = Sparsity.read(tmp_path / "loaded")
    assert (found and found.pattern) == pattern
    assert ("zero_share" in metrics) == (pattern is not None)
    assert found is None or found.shares == pytest.approx(told.shares)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shares": {"other.weight": 0.5}}, "names other.weight, which the checkpoint does not have"),
        ({"shares": {NAME: 0.75}}, f"says that 75.0 % of {NAME} are zero, and 50.0 % are"),
        ({"pattern": "1:4"}, f"says that {NAME} is 1:4, and it is not"),
    ],
)
def test_a_description_of_other_weights_is_refused(change: dict[str, Any], reason: str, sparse: Path, tmp_path: Path) -> None:
    shutil.copytree(sparse, tmp_path / "source")
    told = json.loads((sparse / FILE).read_text())
    (tmp_path / "source" / FILE).write_text(json.dumps(told | change))
    with pytest.raises(
        CheckpointError, match=f"^{tmp_path / 'source'}: sparsity.json {reason}; .* remove sparsity.json"
    ) as refused:
        loaded(tmp_path / "source", tmp_path / "loaded")
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "loaded").iterdir())


def test_every_variant_of_a_sparse_source_says_so_unless_it_was_made_dense(sparse: Path) -> None:
    stages = {"prune": {"thin": {"finetune": None}}, "export": {"ct2": {"engine": "ctranslate2"}}}
    tree = {"name": "t", "checkpoint": {"source": "x"}, "data": {"source": "x"}, "promote": {"model": "t"}, "stages": stages}
    plan = expand(Recipe.model_validate(tree))
    session: Any = SimpleNamespace(workspace=SimpleNamespace(materialize=lambda ref, check: sparse))
    metrics = {"checkpoint": {"zero_share": 0.5}}
    outcomes: Any = {id: SimpleNamespace(artifact=SimpleNamespace(metrics=metrics.get(id, {}))) for id in plan.nodes}
    zeros = {variant.name: served_zeros(plan, variant, outcomes, session) for variant in plan.variants}
    assert zeros == {"baseline": ("2:4", 0.5), "ct2": ("2:4", 0.5), "thin/ct2": None}


def test_what_does_not_fit_the_matrices_is_refused_before_any_weight_is_read(text: Path, tmp_path: Path) -> None:
    source = family_checkpoint("llama", tmp_path / "source")
    (source / "model.safetensors").unlink()
    for criterion, count in (("wanda", 32), ("magnitude", 1024)):
        told = rf"0\.0001 removes none of {count} weights that {criterion} compares in model\.layers\.0\.self_attn\.q_proj"
        with pytest.raises(RecipeError, match=told):
            sparse_checkpoint(source, text, tmp_path / criterion, criterion=criterion, sparsity=0.0001)
    with pytest.raises(RecipeError, match=r"pattern 3:5: the rows of model\.layers\.0\.self_attn\.q_proj have 32 weights"):
        sparse_checkpoint(source, text, tmp_path / "out", pattern="3:5")


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"method": "sparse", "criterion": "l2"}, "criterion\n.*magnitude"),
        ({"criterion": "wanda"}, "criterion\n.*vectorize"),
        ({"method": "sparse", "pattern": "4:4"}, "4:4 removes nothing"),
        ({"method": "sparse", "pattern": "2:4", "sparsity": 0.5}, "either sparsity"),
    ],
)
def test_what_makes_no_sense_is_refused(spec: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PruneSpec.of(**spec)


def test_a_recipe_can_be_written_and_read_again() -> None:
    for spec in (
        PruneSpec.of(method="sparse"),
        PruneSpec.of(method="sparse", pattern="2:4", criterion="sparsegpt"),
        PruneSpec.of(),
    ):
        assert PruneSpec.model_validate(spec.model_dump()) == spec
    assert (PruneSpec.of(method="sparse").criterion, PruneSpec.of(method="sparse").sparsity) == ("wanda", 0.5)


@pytest.mark.parametrize("told", ["{", "[]", '{"criterion": "wanda", "pattern": "2-4", "shares": {"a": 0.5}}',
                                  '{"criterion": "wanda", "pattern": "2:4", "shares": ["a"]}'])  # fmt: skip
def test_a_damaged_description_is_refused(told: str, sparse: Path, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(told)
    with pytest.raises(CheckpointError, match="prune the checkpoint again") as refused:
        Sparsity.read(tmp_path)
    assert "\n" not in str(refused.value)
    with pytest.raises(CheckpointError, match="names other, which the model does not have"):
        Zeros.of(opening.load_model(sparse), Sparsity("wanda", "2:4", {"other": 0.5}))


def test_the_page_and_the_terminal_say_what_zeros_are_worth(tmp_path: Path) -> None:
    note = RUNTIMES["ctranslate2"].zeros_note("unstructured", 0.5)
    assert note == "50 % of the pruned weights are zero; ctranslate2 stores and multiplies them all: no gain in size or speed"
    assert "NVIDIA's sparse tensor cores" in RUNTIMES["vllm"].zeros_note("2:4", 0.5)
    rows = (
        VariantRow("baseline", "torch", "baseline"),
        VariantRow("half/ct2", "ctranslate2", "winner", metrics={"zero_share": 0.5}, notes=(note,)),
        VariantRow("tuned/ct2", "ctranslate2", "loser", metrics={"zero_share": 0.5}, notes=(note,)),
    )
    result = OptimizationResult("demo", "size", "half/ct2", rows)
    assert result.note_lines == [f"half/ct2, tuned/ct2: {note}"]
    assert OptimizationResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    assert [column.text(rows[1]) for column in columns(result) if column.title == "zeros"] == ["50.0 %"]
    render_report(result, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"<dt>half/ct2, tuned/ct2</dt><dd>{note}</dd>" in page
