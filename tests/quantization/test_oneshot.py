"""Calibration of encoders and encoder-decoders: each method against its formula, on text without padding, or refused."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from featherweight.checkpoint import opening
from featherweight.errors import RecipeError
from featherweight.grid import grid_named
from featherweight.model.architecture import PRE_NORM, blocks, model_types
from featherweight.model.blockwise import linears
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.progress import Progress
from featherweight.quantization.catalog import QUANTIZERS
from featherweight.quantization.channels import inner_pairs
from featherweight.quantization.interface import QuantizationInput
from featherweight.quantization.smoothing import smoothed
from featherweight.quantization.spec import QuantizeSpec
from featherweight.text.documents import Document, write_documents
from featherweight.text.model_inputs import IGNORED, example_blocks, window_inputs
from tasks.export import export
from tasks.quantize import quantize
from tests.support.families import PLAIN_WORDS, alone_inputs, family_checkpoint
from tests.support.gptq_formula import reference_gptq
from tests.support.serving_models import opened, score, serving_spec, windows_of

NOT_CAUSAL = (*model_types("text2text-generation"), *model_types("fill-mask"))
SMOOTHINGS = [*(("awq", kind) for kind in NOT_CAUSAL), *(("smoothquant", kind) for kind in NOT_CAUSAL if kind in PRE_NORM)]

STILL = {"steps": 2, "batch": 2, "learning_rate": 1e-9}
"""Training that hardly moves a weight."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences in no order, and shorter ones for their translations."""
    draws = torch.randint(len(PLAIN_WORDS), (40, 20), generator=torch.Generator().manual_seed(0)).tolist()
    sentences = [[PLAIN_WORDS[word] for word in draw[: 6 + place % 14]] for place, draw in enumerate(draws)]
    folder = tmp_path_factory.mktemp("text")
    write_documents(folder, [Document(str(i), " ".join(one), " ".join(one[-1:3:-1])) for i, one in enumerate(sentences)])
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint of a model type, made once; in each norm a few channels stand out, as in language models."""

    @cache
    def get(kind: str) -> Path:
        changes = {"initializer_factor": 0.7} if kind in ("t5", "mt5") else {}
        folder = family_checkpoint(kind, tmp_path_factory.mktemp(kind) / "checkpoint", **changes)
        weights = load_file(folder / "model.safetensors")
        for name in weights:
            if "norm" in name.lower() and name.endswith("weight"):
                weights[name][[3, 17]] *= 4
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return get


def input_of(checkpoint: Path, text: Path, **options: Any) -> QuantizationInput:
    spec = QuantizeSpec.model_validate({"sequence": 16, "samples": 24, "grid": "int4-g32", "head": None, **options})
    model = opening.load_model(checkpoint)
    ids = example_blocks(checkpoint, model.config, text, spec.sequence, limit=spec.samples, seed=0)
    return QuantizationInput(spec, checkpoint, model, ids, text, 0, Progress())


def logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of everything predicted for `ids`, each block read alone: [positions, vocabulary]."""
    with torch.inference_mode():
        return torch.cat([model.eval()(**alone_inputs(model, block)).logits[0].log_softmax(-1) for block in ids])


def inputs_of(block: Any, model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each matrix of a block reads when every example goes through the model alone: name -> [tokens, channels]."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in linears(block)}
    hooks = [
        linear.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].flatten(0, 1)))
        for name, linear in linears(block).items()
    ]
    logprobs(model, ids)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "m2m_100", "marian", "bert", "distilbert"])
def test_gptq_is_the_formula_for_every_matrix(kind: str, checkpoint: Any, text: Path) -> None:
    """Each block reads what the quantized ones before it put out, and a cross-attention the quantized encoder's text."""
    given = input_of(checkpoint(kind), text, method="gptq")
    found = QUANTIZERS["gptq"].choose(given).quantized
    model, agreed, losses = opening.load_model(checkpoint(kind)).eval(), [], torch.zeros(3, dtype=torch.float64)
    for block in blocks(model):
        for name, inputs in inputs_of(block, model, given.calibration).items():
            weight, ours = model.get_submodule(name).weight.detach(), found.dequantize(f"{name}.weight")
            expected, nearest = reference_gptq(weight, inputs, "int4-g32"), grid_named("int4-g32").fake_quantize(weight)
            agreed.append(torch.isclose(ours.double(), expected, atol=1e-5).double().mean().item())
            loss = [(inputs.double() @ (one - weight).double().T).square().sum() for one in (ours, expected, nearest)]
            losses += torch.stack(loss)
            assert loss[0] < loss[2], name
        for name, linear in linears(block).items():
            linear.weight.data = found.dequantize(f"{name}.weight")
    assert len(agreed) == len(found.q) and min(agreed) > 0.9 and sum(agreed) / len(agreed) > 0.97
    assert losses[0] == pytest.approx(losses[1].item(), rel=0.05)
    assert losses[0] < 0.8 * losses[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "bert"])
@pytest.mark.parametrize("better", ["gptq", "autoround"])
def test_what_calibrates_loses_less_than_rounding(better: str, kind: str, text: Path, tmp_path: Path) -> None:
    sizes = {"t5": {"d_model": 96, "d_ff": 192, "num_layers": 4, "initializer_factor": 0.7}}
    wide = sizes.get(kind, {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4})
    folder = family_checkpoint(kind, tmp_path / "checkpoint", **wide)
    losses = {}
    for method in ("rtn", better):
        short = {"steps": 40} if method == "autoround" else {}
        given = input_of(folder, text, method=method, grid="int4", samples=40, **short)
        expected = logprobs(given.model, given.calibration)
        state = {name: found.dequantize(name) for found in [QUANTIZERS[method].choose(given).quantized] for name in found.q}
        model = opening.load_model(folder)
        model.load_state_dict(state, strict=False)
        found = logprobs(model, given.calibration)
        losses[method] = torch.nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean").item()
    assert 0 < losses[better] < 0.7 * losses["rtn"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kind"), [("gptq", "t5"), ("gptq", "marian"), ("awq", "mbart"), ("smoothquant", "mbart"), ("autoround", "t5")]
)
def test_padding_is_no_text(method: str, kind: str, checkpoint: Any, text: Path) -> None:
    given = input_of(checkpoint(kind), text, method=method, **({"steps": 12} if method == "autoround" else {}))
    source, target = given.calibration.chunk(2, dim=1)
    assert (source == 0).any() and (target == 0).any()
    longer = torch.cat([torch.nn.functional.pad(part, (0, 9)) for part in (source, target)], dim=1)
    padded = dataclasses.replace(given, model=opening.load_model(given.checkpoint), calibration=longer)
    smooths = QUANTIZERS[method].smooth is not None
    ours, theirs = ((smoothed if smooths else QUANTIZERS[method].choose)(one) for one in (given, padded))
    found, expected = (one.smoothed if smooths else one.quantized.q for one in (ours, theirs))
    assert found and all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kind"), SMOOTHINGS)
def test_smoothing_keeps_the_function(method: str, kind: str, checkpoint: Any, text: Path) -> None:
    given = input_of(checkpoint(kind), text, method=method)
    unseen = example_blocks(checkpoint(kind), given.model.config, text, 16, limit=6, seed=1)
    before = logprobs(given.model, unseen)
    found = smoothed(given)
    assert torch.allclose(logprobs(found.model, unseen), before, atol=1e-4)
    norms = {name for name in found.smoothed if "norm" in name.lower()}
    assert bool(norms) == (kind in PRE_NORM)
    inside = {f"{pair.source}.weight" for pair in inner_pairs(given.model)}
    assert method == "smoothquant" or inside & found.smoothed.keys()


def named(model: Any) -> dict[Any, str]:
    return {module: name for name, module in model.named_modules()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mt5", "mbart"])
def test_smoothquant_is_the_papers_formula(kind: str, checkpoint: Any, text: Path) -> None:
    """s_j = sqrt(max|X_j| / max|W_j|) over the matrices that read X; before a cross-attention that is its query alone."""
    given = input_of(checkpoint(kind), text, method="smoothquant")
    model, found = opening.load_model(checkpoint(kind)), smoothed(given).smoothed
    names = named(model)
    for block in blocks(model):
        inputs = inputs_of(block, model, given.calibration)
        own, *across = block.attentions
        readers = [(own.norm, (own.q, own.k, own.v)), *((one.norm, (one.q,)) for one in across)]
        for norm, matrices in [*readers, (block.feed_forward.norm, block.feed_forward.inputs)]:
            peak = torch.cat([one.weight for one in matrices]).abs().amax(0)
            scales = (inputs[names[matrices[0]]].abs().amax(0) / peak).sqrt()
            after = [found[f"{names[one]}.weight"] for one in matrices]
            torch.testing.assert_close(norm.weight / found[f"{names[norm]}.weight"], scales, rtol=1e-3, atol=1e-5)
            for one, weight in zip(matrices, after, strict=True):
                torch.testing.assert_close(weight, one.weight * scales, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {"method": method}) for kind in NOT_CAUSAL for method in ("gptq", "smoothquant")),
        *((kind, {"method": "gptq", "smooth": "awq"}) for kind in ("mt5", "bart", "bert")),
        *((kind, {"method": "autoround", "steps": 2}) for kind in NOT_CAUSAL),
        *((kind, {"method": "qat", "start": "gptq", **STILL}) for kind in ("t5", "marian", "xlm-roberta")),
    ],
)
def test_every_method_works_or_is_refused(options: Any, kind: str, checkpoint: Any, text: Path, tmp_path: Path) -> None:
    spec = QuantizeSpec.of(**options, head=None, sequence=16, samples=8)
    stage = {"checkpoint": checkpoint(kind), "text": text, "calibration": text, "out": tmp_path}
    if spec.method == "smoothquant" and kind not in PRE_NORM:
        with pytest.raises(
            RecipeError, match=f"smoothquant: the norms of a '{kind}' model feed the residual too.*take awq or gptq$"
        ):
            quantize(spec, **stage)
        return
    metrics = quantize(spec, **stage)
    assert metrics["loss_after"] == pytest.approx(metrics["loss_before"], rel=0.02)
    model, quantized = opening.load_model(tmp_path), QuantizedWeights.read(tmp_path)
    assert quantized and set(quantized.q) == {f"{name}.weight" for block in blocks(model) for name in linears(block)}
    assert all(torch.equal(model.get_parameter(name), quantized.dequantize(name)) for name in quantized.q)


def test_a_structure_that_is_not_known_is_refused_before_any_weight_is_read(text: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "led", "is_encoder_decoder": true}')
    save_file({"shared.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(RecipeError, match="text2text-generation \\+ gptq: where a 'led' model keeps its blocks is not known here"):
        quantize(QuantizeSpec.of(method="gptq"), checkpoint=tmp_path, text=text, calibration=text, out=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "engine", "bound"),
    [
        ("t5", {"method": "gptq", "grid": "int8"}, "torch-dynamic", 0.1),
        ("mbart", {"method": "smoothquant", "grid": "int8"}, "torch-dynamic", 0.1),
        ("marian", {"method": "awq", "grid": "int8"}, "torchao-int8", 1e-4),
        ("bert", {"method": "gptq", "smooth": "awq", "grid": "int4-g32"}, "torchao-int4", 1e-4),
    ],
)
def test_what_was_calibrated_is_served_as_it_is(
    kind: str, options: Any, engine: Any, bound: float, checkpoint: Any, text: Path, tmp_path: Path, without_parity: None
) -> None:
    rounded = quantized_folder(checkpoint(kind), text, tmp_path / "rounded", **options)
    out = tmp_path / "served"
    out.mkdir()
    export(serving_spec(engine=engine), checkpoint=rounded, calibration=text, out=out)
    model, windows = windows_of(rounded, text)
    rows = score(opened(out), windows)
    for window, row in zip(windows, rows, strict=True):
        inputs, labels = window_inputs(model.config, torch.tensor([window.ids]), torch.tensor([window.source]))
        with torch.no_grad():
            logs = model(**inputs).logits.log_softmax(-1)
        expected = logs[labels != IGNORED].gather(-1, labels[labels != IGNORED][:, None])[:, 0]
        assert (torch.tensor(row) - expected).abs().mean() < bound


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), [("mbart", {"method": "gptq", "smooth": "smoothquant"}), ("t5", {"method": "gptq"})])
def test_calibrated_translators_are_packed_as_they_are(
    kind: str, options: Any, checkpoint: Any, text: Path, tmp_path: Path
) -> None:
    """Parity holds the packed integers to 0.001 nats with float activations, and the int8 engine to its own bound."""
    rounded = quantized_folder(checkpoint(kind), text, tmp_path / "rounded", grid="int8-reduced", **options)
    out = tmp_path / "served"
    out.mkdir()
    metrics = export(serving_spec(engine="ctranslate2", compute_type="int8"), checkpoint=rounded, calibration=text, out=out)
    assert metrics["parity_weights_max_abs"] < 1e-3 and metrics["parity_mean_abs"] < metrics["parity_bound"]


def quantized_folder(checkpoint: Path, text: Path, folder: Path, grid: str, **options: Any) -> Path:
    folder.mkdir()
    spec = QuantizeSpec.model_validate({"grid": grid, "head": grid, "sequence": 16, "samples": 12, **options})
    quantize(spec, checkpoint=checkpoint, text=text, calibration=text, out=folder)
    return folder
