"""What makes a model smaller, on encoders that answer by vectors or labels: each stage goes by their own answers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from featherweight.checkpoint.opening import load_model
from featherweight.checkpoint.spec import LoadSpec
from featherweight.distillation.spec import DistillSpec
from featherweight.errors import DataError, RecipeError
from featherweight.measure.agreement import embedding_quality, label_quality
from featherweight.measure.measurement import Quality
from featherweight.pruning.spec import PruneSpec
from featherweight.quantization.spec import QuantizeSpec
from featherweight.text.documents import Document, read_documents, write_documents
from featherweight.text.examples import head_windows, packed_inputs
from featherweight.training.spec import FinetuneSpec
from tasks.distill import distill
from tasks.finetune import finetune
from tasks.load import load
from tasks.prune import prune
from tasks.quantize import quantize
from tests.support import heads
from tests.support.families import family_checkpoint

pytestmark = pytest.mark.slow
DECODER = {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None}
"""Whose own forward takes one text at a time."""
MADE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "vectors": ("feature-extraction", None, {}),
    "decoder": ("feature-extraction", None, {}),
    "labels": ("text-classification", heads.labelled, {"num_labels": 2}),
    "pairs": ("text-classification", heads.paired, {"num_labels": 1}),
    "tags": ("token-classification", heads.tagged, {}),
    "decoder labels": ("text-classification", heads.labelled, DECODER | {"num_labels": 2}),
}
VECTORS = ("vectors", "decoder")
METHODS = (("vectors", "gptq"), ("decoder", "gptq"), ("pairs", "gptq"), ("tags", "awq"), ("vectors", "qat"), ("labels", "qat"))
METHODS += (("decoder labels", "gptq"), ("decoder labels", "awq"))
KINDS = pytest.mark.parametrize("kind", MADE)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(checkpoint, text) of each kind."""

    @cache
    def get(kind: str) -> tuple[Path, Path]:
        task, documents, changes = MADE[kind]
        folder = tmp_path_factory.mktemp(kind)
        if kind == "decoder":
            source = heads.sentence_files(family_checkpoint("qwen3", folder / "made"), pooling_mode_lasttoken=True)
        else:
            told = {"model_type": "bert"} | changes
            source = heads.head_checkpoint(told.pop("model_type"), task, folder / "made", documents and documents(200), **told)
        if kind == "vectors":
            heads.sentence_files(source)
        (folder / "loaded").mkdir()
        load(LoadSpec(source=str(source), task=task), out=folder / "loaded")
        plain = [Document(one.id, one.text) for one in heads.labelled(80)]
        write_documents(folder / "text", documents(80) if documents else plain)
        return folder / "loaded", folder / "text"

    return get


def quality(kind: str, folder: Path, original: Path, text: Path) -> Quality:
    """How far the model in `folder` is from the original's."""
    import torch

    from featherweight.model.heads import answers

    found: list[list[list[list[float]]]] = []
    for one in (folder, original):
        model = load_model(one).eval()
        examples = head_windows(original, model.config, text, 24, 40)
        with torch.no_grad():
            found.append([answers(model, packed_inputs(model.config, [e.ids], [e.types]))[0].tolist() for e in examples])
    ours, theirs = found
    sizes = tuple(one.text_bytes for one in examples)
    if kind in VECTORS:
        return embedding_quality(ours, theirs, sizes)
    return label_quality(ours, theirs, [one.labels for one in examples], sizes, single=kind == "pairs")


def mean(found: Quality) -> float:
    return sum(found.nll) / len(found.nll)


@KINDS
def test_a_student_learns_what_its_teacher_answers(made: Any, tmp_path: Path, kind: str) -> None:
    checkpoint, text = made(kind)
    losses = []
    for name, steps in (("untrained", 1), ("trained", 80)):
        out = tmp_path / name
        out.mkdir()
        matched: dict[str, Any] = (
            {"hidden_weight": 0.1, "attention_weight": 0.1} if kind in ("labels", "decoder", "decoder labels") else {}
        )
        spec = DistillSpec(layers=1, steps=steps, batch=16, sequence=16, learning_rate=1e-3, kl_weight=0.8, **matched)
        metrics = distill(spec, checkpoint=checkpoint, text=text, out=out)
        assert metrics["parameters"] < metrics["parameters_teacher"]
        losses.append(mean(quality(kind, out, checkpoint, text)))
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize(("kind", "method"), [*((kind, "rtn") for kind in MADE), *METHODS])
def test_every_method_rounds_it(made: Any, tmp_path: Path, kind: str, method: str) -> None:
    checkpoint, text = made(kind)
    more: dict[str, Any] = {"steps": 4, "batch": 4} if method == "qat" else {}
    spec = QuantizeSpec.of(method=method, sequence=16, samples=16, **more)
    metrics = quantize(spec, checkpoint=checkpoint, text=text, calibration=text, out=tmp_path)
    assert abs(metrics["loss_after"] - metrics["loss_before"]) < 0.1
    found, before = (quality(kind, folder, checkpoint, text) for folder in (tmp_path, checkpoint))
    assert mean(found) - mean(before) < 0.02
    if kind not in VECTORS:
        assert found.figures["label_agreement"] > 0.95


@KINDS
def test_channels_are_pruned_by_what_they_do_to_the_answers(made: Any, tmp_path: Path, kind: str) -> None:
    checkpoint, text = made(kind)
    spec = PruneSpec.of(ratio=0.25, attention=False, samples=32, sequence=16, finetune=None)
    metrics = prune(spec, checkpoint=checkpoint, calibration=text, out=tmp_path)
    assert metrics["parameters"] < metrics["parameters_before"]
    found = quality(kind, tmp_path, checkpoint, text)
    assert mean(found) - mean(quality(kind, checkpoint, checkpoint, text)) < 0.5


def test_a_classifier_is_trained_on_labels_and_not_on_what_it_says_itself(made: Any, tmp_path: Path) -> None:
    checkpoint, text = made("labels")
    metrics = finetune(FinetuneSpec(steps=4, batch=4, sequence=16), checkpoint=checkpoint, text=text, out=tmp_path)
    assert metrics["loss_last"] >= 0
    write_documents(tmp_path / "bare", [Document(one.id, one.text) for one in read_documents(text)])
    with pytest.raises(DataError, match=r"has no labels to train on; set data.label"):
        finetune(FinetuneSpec(steps=4, batch=4, sequence=16), checkpoint=checkpoint, text=tmp_path / "bare", out=tmp_path)


def test_what_has_no_meaning_for_such_answers_is_refused_in_the_plan(made: Any, tmp_path: Path) -> None:
    from featherweight.model.parent import Parent

    mixed = QuantizeSpec.of(grid="int4-g32", mixed={"budget": 0.01, "grid": "int8"})
    assert "mixed" in str(mixed.refusal(Parent("text-classification")))
    assert QuantizeSpec.of(grid="int4-g32").refusal(Parent("text-classification")) is None
    student = heads.head_checkpoint("bert", "feature-extraction", tmp_path / "narrow", hidden_size=16)
    checkpoint, text = made("vectors")
    with pytest.raises(RecipeError, match="vectors of 16 numbers, and its teacher of 32"):
        distill(
            DistillSpec(student="narrow", steps=1, sequence=16), checkpoint=checkpoint, text=text, student=student, out=tmp_path
        )
