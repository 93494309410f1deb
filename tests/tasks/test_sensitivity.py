"""Sensitivity: the scan's figures against a direct computation, the choice of finer matrices, and mixed precision end to end."""

from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.errors import IntegrityError, RecipeError, StageError
from featherweight.grid import GRIDS
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.progress import Progress
from featherweight.quantization.sensitivity import FILE, PAGE, Matrix, Sensitivity
from featherweight.quantization.spec import QuantizeSpec, SensitivitySpec
from featherweight.recipe.plan import expand
from featherweight.recipe.recipe import Recipe
from featherweight.recipe.refusals import refusal
from featherweight.text.documents import Document, write_documents
from featherweight.text.model_inputs import example_blocks, inputs_and_labels
from tasks.quantize import quantize
from tasks.sensitivity import scan, sensitivity
from tests.support.families import family_checkpoint
from tests.support.serving_models import serving_spec

pytestmark = pytest.mark.slow

SCAN = SensitivitySpec(grid="int4-g32", head="int4-g32", finer="int8-g32", scale="absmax", samples=4, sequence=16)
MIXED = {"grid": "int4-g32", "head": "int4-g32", "samples": 8, "sequence": 16}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    stories = [f"once upon a time the fox met {number} bear and they ran over the hill by night." for number in range(60)]
    write_documents(folder, [Document(str(place), story) for place, story in enumerate(stories)])
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_checkpoint("llama", tmp_path_factory.mktemp("llama"), tie_word_embeddings=True, hidden_size=64)


@pytest.fixture(scope="module")
def scanned(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scan")
    sensitivity(SCAN, checkpoint=checkpoint, calibration=text, out=out)
    return out


def test_the_divergence_is_the_kl_of_a_model_with_that_matrix_rounded(checkpoint: Path, text: Path, scanned: Path) -> None:
    model = opening.load_model(checkpoint).eval()
    ids = example_blocks(checkpoint, model.config, text, 16, limit=4, seed=0)
    inputs, labels = inputs_and_labels(model.config, ids)
    found = Sensitivity.read(scanned)
    for one in (found.matrices[0], found.matrices[-1]):
        rounded = copy.deepcopy(model)
        weight = rounded.get_parameter(one.name)
        weight.data = GRIDS["int4-g32"].fake_quantize(weight.data)
        ours, theirs = (other(**inputs).logits[labels >= 0].double().log_softmax(-1) for other in (model, rounded))
        expected = torch.nn.functional.kl_div(theirs, ours, log_target=True, reduction="batchmean").item()
        assert one.divergence == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert one.divergence > 4 * one.finer_divergence > 0
    assert found.loss == pytest.approx(model(**inputs).logits[labels >= 0].double().log_softmax(-1)
                                       .gather(-1, labels[labels >= 0][:, None]).mean().neg().item(), abs=1e-5)  # fmt: skip


def test_every_matrix_that_is_rounded_is_scanned_and_left_as_it_was(checkpoint: Path, text: Path, scanned: Path) -> None:
    model = opening.load_model(checkpoint).eval()
    names = {name for name, weight in model.named_parameters() if weight.ndim == 2}
    assert {one.name for one in Sensitivity.read(scanned).matrices} == names
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    scan(model, dict.fromkeys(names, GRIDS["int4"]), torch.randint(5, 50, (2, 8)), "absmax", Progress())
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_the_most_sensitive_for_their_bits_are_kept_finer() -> None:
    small, large, calm = (
        Matrix("small", 100, 4, 8, 0.02, 0.0001),
        Matrix("large", 1000, 4, 8, 0.03, 0.0001),
        Matrix("calm", 100, 4, 8, 0.001, 0.0001),
    )
    found = Sensitivity("int4", "int8", 2.0, (calm, large, small))
    assert found.finer_for(0.03) == frozenset()
    assert found.finer_for(0.02) == {"small"}
    assert found.finer_for(0.001) == {"small", "large"}
    assert found.predicted_loss(frozenset({"small"})) == pytest.approx(0.0311 / 2)
    with pytest.raises(RecipeError, match=r"predicted loss is 0\.02%, above the budget of 0\.01%"):
        found.finer_for(0.0001)


def drawn(count: int, seed: int) -> Sensitivity:
    """A scan of matrices of a few sizes, as models have them."""
    draws = random.Random(seed)
    sizes = [draws.choice((100, 250, 250, 700)) for _ in range(count)]
    losses = [draws.lognormvariate(-6, 1.5) for _ in range(count)]
    matrices = (Matrix(f"m{i}", size, 5, 8.5, loss, loss / 250) for i, (size, loss) in enumerate(zip(sizes, losses, strict=True)))
    return Sensitivity("int4-g32", "int8", 2.0, tuple(matrices))


@pytest.mark.parametrize("seed", range(4))
def test_no_other_choice_of_matrices_is_better(seed: int) -> None:
    """Against all 1,024 of them, for either budget."""
    found = drawn(10, seed)
    names = [one.name for one in found.matrices]
    every = [frozenset(some) for count in range(11) for some in itertools.combinations(names, count)]
    for share in (0.02, 0.3, 0.9, 1.5):
        budget = share * found.predicted_loss(frozenset())
        fewest = min(found.bits_per_weight(one) for one in every if found.predicted_loss(one) <= budget)
        chosen = found.finer_for(budget)
        assert found.predicted_loss(chosen) <= budget * (1 + 1e-6)
        assert found.bits_per_weight(chosen) == pytest.approx(fewest, rel=1e-4)
    for bits in (5.0, 5.3, 6.5, 8.0, 9.0):
        least = min(found.predicted_loss(one) for one in every if found.bits_per_weight(one) <= bits)
        chosen = found.finer_within(bits)
        assert found.bits_per_weight(chosen) <= bits * (1 + 1e-6)
        assert found.predicted_loss(chosen) == pytest.approx(least, rel=1e-4)
    with pytest.raises(RecipeError, match=r"int4-g32 the weights take 5 bits each, scales included, above the budget of 4\.9;"):
        found.finer_within(4.9)


def test_many_matrices_are_chosen_among_alike_every_time() -> None:
    found = drawn(400, 9)
    assert found.finer_within(5.6) == found.finer_within(5.6) and len(found.finer_within(5.6)) > 20


def test_a_program_without_a_solution_is_said_in_one_line() -> None:
    found = drawn(2, 9)
    with pytest.raises(StageError, match=r"no matrices were found that keep to the budget \(.*infeasible"):
        found._chosen([1.0, 1.0], [0.1, 0.1], least=1)


def test_a_budget_is_of_loss_or_of_bits() -> None:
    with pytest.raises(ValueError, match="budget plays no role where bits are given; leave it out"):
        QuantizeSpec.of(grid="int4", mixed={"bits": 5.0, "budget": 0.01})
    assert "bits" not in QuantizeSpec.of(grid="int4", mixed={}).model_dump()["mixed"]


def test_the_page_shows_every_matrix_and_what_a_budget_buys(scanned: Path) -> None:
    page = (scanned / PAGE).read_text()
    for one in Sensitivity.read(scanned).matrices:
        assert one.name.removesuffix(".weight") in page
    assert page.count("fill: var(--first)") == len(Sensitivity.read(scanned).matrices)
    assert "of the weights" in page


def test_mixed_precision_within_bits_keeps_to_them(checkpoint: Path, text: Path, scanned: Path, tmp_path: Path) -> None:
    scan = Sensitivity.read(scanned)
    bits = (scan.bits_per_weight(frozenset()) + scan.bits_per_weight(frozenset(one.name for one in scan.matrices))) / 2
    spec = QuantizeSpec.model_validate(MIXED | {"mixed": {"grid": "int8-g32", "bits": bits}})
    metrics = quantize(spec, checkpoint=checkpoint, text=text, calibration=text, sensitivity=scanned, out=tmp_path)
    quantized = QuantizedWeights.read(tmp_path)
    assert quantized and quantized.bits_per_weight() <= bits * (1 + 1e-6)
    assert 0 < metrics["finer_matrices"] < len(quantized.grids)
    assert metrics["predicted_quality_loss"] == scan.predicted_loss(scan.finer_within(bits))


@pytest.mark.parametrize("method", ["rtn", "gptq", "qat"])
def test_mixed_precision_puts_just_those_matrices_on_the_finer_grid(
    checkpoint: Path, text: Path, scanned: Path, tmp_path: Path, method: str
) -> None:
    budget = Sensitivity.read(scanned).predicted_loss(frozenset()) / 3
    training = {"steps": 2, "batch": 2} if method == "qat" else {}
    spec = QuantizeSpec.model_validate(MIXED | training | {"method": method, "mixed": {"grid": "int8-g32", "budget": budget}})
    metrics = quantize(spec, checkpoint=checkpoint, text=text, calibration=text, sensitivity=scanned, out=tmp_path)
    quantized = QuantizedWeights.read(tmp_path)
    assert quantized is not None
    finer = {name for name, grid in quantized.grids.items() if grid.name == "int8-g32"}
    assert finer == Sensitivity.read(scanned).finer_for(budget)
    assert 0 < metrics["finer_matrices"] == len(finer) < len(quantized.grids)
    assert metrics["predicted_quality_loss"] <= budget
    assert quantized.grid == "int4-g32"
    saved = opening.load_model(tmp_path)
    assert all(torch.equal(saved.get_parameter(name), quantized.dequantize(name)) for name in quantized.grids)


def test_a_model_that_computes_no_numbers_is_refused(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    model = opening.load_model(checkpoint)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0] = torch.nan
    with pytest.raises(StageError, match="no numbers"):
        scan(model, {n: GRIDS["int4"] for n, w in model.named_parameters() if w.ndim == 2
             and "layers.1" in n}, torch.randint(5, 50, (2, 8)), "absmax", Progress())  # fmt: skip


def test_a_damaged_scan_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(IntegrityError, match="no sensitivity scan"):
        Sensitivity.read(tmp_path)


def test_the_plan_scans_before_it_quantizes() -> None:
    recipe = Recipe.model_validate({
        "name": "mixed", "checkpoint": {"source": "x"}, "data": {"source": "y"}, "promote": {"model": "m"},
        "stages": {
            "quantize": {"q": {"grid": "int4-g32", "head": "int8", "mixed": {"budget": 0.02}}},
            "compile": {"ort4": {"engine": "onnxruntime-genai", "precision": "int4"}},
        },
        "variants": [{"quantize": "q", "serve": "ort4"}],
    })  # fmt: skip
    plan = expand(recipe)
    assert plan.nodes["q"].inputs["sensitivity"] == "q+sensitivity"
    scanner = plan.nodes["q+sensitivity"]
    assert (scanner.stage, scanner.inputs) == ("sensitivity", {"checkpoint": "checkpoint", "calibration": "text/calibration"})
    assert list(plan.nodes).index("q+sensitivity") < list(plan.nodes).index("q")


def test_what_cannot_hold_two_grids_is_refused() -> None:
    mixed = QuantizeSpec.model_validate({"grid": "int8-reduced", "mixed": {"grid": "int8"}})
    assert refusal(mixed, serving_spec(engine="ctranslate2", compute_type="int8")) is None
    assert "one grid for all layers" in str(refusal(mixed, serving_spec(engine="vllm", compute_type="int8")))
    floats = QuantizeSpec.model_validate({"grid": "int4", "mixed": {"grid": "fp8"}})
    assert "it holds integers, not fp8" in str(refusal(floats, serving_spec(engine="torchao-int4")))
