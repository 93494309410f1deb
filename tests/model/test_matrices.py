"""The matrices of a model, and which are its vocabulary's: the same to whoever quantizes, rounds at export, packs or counts."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from featherweight.checkpoint.facts import facts_of
from featherweight.checkpoint.opening import load_config
from featherweight.errors import RecipeError
from featherweight.grid import GRIDS
from featherweight.model.matrices import heads, matrices, move_to_grid, round_to_nearest, rows_of
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.quantization.spec import QuantizeSpec
from featherweight.runtimes.parity import load_reference
from featherweight.runtimes.spec import ExportSpec
from tasks.export import export
from tasks.quantize import quantize
from tests.support.families import family_checkpoint, write_pairs

HEADS = {
    "llama": {"model.embed_tokens.weight", "lm_head.weight"},
    "qwen2": {"model.embed_tokens.weight", "lm_head.weight"},
    "phi": {"model.embed_tokens.weight", "lm_head.weight"},
    "opt": {"model.decoder.embed_tokens.weight", "lm_head.weight"},
    "gpt2": {"transformer.wte.weight", "lm_head.weight"},
    "gpt_bigcode": {"transformer.wte.weight", "lm_head.weight"},
    "gptj": {"transformer.wte.weight", "lm_head.weight"},
    "falcon": {"transformer.word_embeddings.weight", "lm_head.weight"},
    "bloom": {"transformer.word_embeddings.weight", "lm_head.weight"},
    "gpt_neox": {"gpt_neox.embed_in.weight", "lm_head.weight"},
    "t5": {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"},
    "marian": {f"model.{name}.weight" for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")} | {"lm_head.weight"},
    "bert": {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"},
    "roberta": {"roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"},
    "distilbert": {"distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"},
}
BLOCK = {
    "llama": 7,
    "qwen2": 7,
    "phi": 6,
    "opt": 6,
    "gpt2": 4,
    "gpt_bigcode": 4,
    "gptj": 6,
    "falcon": 4,
    "bloom": 4,
    "gpt_neox": 4,
    "t5": 8,
    "marian": 8,
    "bert": 6,
    "roberta": 6,
    "distilbert": 6,
}
"""Matrices of a block; of an encoder-decoder, half of those of a block of each stack."""
STACKS = {"t5": 2, "marian": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint of a model type, made once."""
    return cache(lambda kind: family_checkpoint(kind, tmp_path_factory.mktemp(kind) / "checkpoint"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", HEADS)
def test_quantize_and_export_round_the_very_same_matrices(kind: str, checkpoint: Any, text: Path, tmp_path: Path) -> None:
    spec = QuantizeSpec.of(sequence=16, samples=2)
    metrics = quantize(spec, checkpoint=checkpoint(kind), text=text, calibration=text, out=tmp_path)
    stored, model = QuantizedWeights.read(tmp_path), load_reference(checkpoint(kind))
    assert stored
    rounded = round_to_nearest(model, GRIDS["int8"], GRIDS["int8"])
    assert stored.q.keys() == rounded.q.keys()
    assert all(stored.q[name].equal(q) for name, q in rounded.q.items())
    assert heads(model) == HEADS[kind]
    assert len(stored.body) == 2 * BLOCK[kind] * STACKS.get(kind, 1)
    assert stored.heads == HEADS[kind] & stored.q.keys()
    assert (stored.grid, stored.head) == ("int8", "int8")
    saved = load_reference(tmp_path)
    move_to_grid(model, rounded)
    for (name, found), (_, expected) in zip(saved.named_parameters(), model.named_parameters(), strict=True):
        assert found.equal(expected), name
    sizes = {name: parameter.numel() for name, parameter in saved.named_parameters()}
    assert metrics["float_weights"] == pytest.approx(1 - sum(q.numel() for q in stored.q.values()) / sum(sizes.values()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_a_head_in_float_stays_so_whatever_it_is_called(kind: str, checkpoint: Any, text: Path, tmp_path: Path) -> None:
    spec = QuantizeSpec.of(sequence=16, samples=2, head=None, grid="int4-g32")
    quantize(spec, checkpoint=checkpoint(kind), text=text, calibration=text, out=tmp_path)
    stored = QuantizedWeights.read(tmp_path)
    assert stored
    assert not HEADS[kind] & stored.q.keys()
    assert (stored.grid, stored.head) == ("int4-g32", None)


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
@pytest.mark.parametrize("engine", ["torch-dynamic", "torchao-int8"])
def test_what_is_quantized_is_packed_as_it_is(kind: str, engine: str, checkpoint: Any, text: Path, tmp_path: Path) -> None:
    small, served = tmp_path / "small", tmp_path / "served"
    small.mkdir()
    served.mkdir()
    quantize(QuantizeSpec.of(sequence=16, samples=2), checkpoint=checkpoint(kind), text=text, calibration=text, out=small)
    metrics = export(ExportSpec.model_validate({"engine": engine}), checkpoint=small, calibration=text, out=served)
    exact = metrics.get("parity_weights_max_abs", metrics["parity_max_abs"])
    assert exact < 1e-3


@pytest.mark.engine
def test_a_quantized_gpt2_reaches_ctranslate2(checkpoint: Any, text: Path, tmp_path: Path) -> None:
    small, served = tmp_path / "small", tmp_path / "served"
    small.mkdir()
    served.mkdir()
    quantize(QuantizeSpec.of(sequence=16, samples=2), checkpoint=checkpoint("gpt2"), text=text, calibration=text, out=small)
    spec = ExportSpec.model_validate({"engine": "ctranslate2", "compute_type": "int8_float32"})
    assert export(spec, checkpoint=small, calibration=text, out=served)["parity_max_abs"] < 1e-3


@pytest.mark.parametrize("options", [{"method": "gptq"}, {"method": "rtn", "smooth": "smoothquant"}, {"method": "qat"}])
def test_what_knows_linear_alone_refuses_conv1d(options: dict[str, Any], checkpoint: Any, text: Path, tmp_path: Path) -> None:
    spec = QuantizeSpec.model_validate({"sequence": 16, "samples": 2, **options})
    with pytest.raises(RecipeError, match="Conv1D; take method: rtn"):
        quantize(spec, checkpoint=checkpoint("gpt2"), text=text, calibration=text, out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_mixture_of_experts_is_refused_by_name_before_any_weight_is_read(checkpoint: Any, text: Path, tmp_path: Path) -> None:
    """81 % of a Qwen3-MoE stayed in float, the metric said 8.5 bits a weight and the report int8."""
    facts = facts_of(checkpoint("qwen3_moe"), load_config(checkpoint("qwen3_moe")))
    model = load_reference(checkpoint("qwen3_moe"))
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    assert facts.experts == pytest.approx(experts / sum(parameter.numel() for parameter in model.parameters()))
    assert facts_of(checkpoint("gpt2"), load_config(checkpoint("gpt2"))).experts == 0
    inputs = {"checkpoint": checkpoint("qwen3_moe"), "calibration": text, "out": tmp_path}
    with pytest.raises(RecipeError, match=rf"^quantize: {facts.experts:.0%} of the weights .* are its experts'"):
        quantize(QuantizeSpec.of(sequence=16, samples=2), text=text, **inputs)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RecipeError, match="quantized in name only"):
        export(ExportSpec.model_validate({"engine": "torchao-int8"}), **inputs)


def test_a_conv1d_is_rounded_by_its_output_features(checkpoint: Any) -> None:
    model = load_reference(checkpoint("gpt2"))
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[:, 5] *= 100
    rounded = round_to_nearest(model, GRIDS["int8"], None)
    name = "transformer.h.0.attn.c_attn.weight"
    weight = next(rows_of(parameter, transposed) for found, parameter, transposed in matrices(model) if found == name)
    assert weight.shape == (96, 32)
    error = (rounded.dequantize(name) - weight).abs().amax(1)
    assert error[5] > 20 * error[6], "one large output feature costs only itself"


def test_the_names_of_the_vocabulary_are_stored(checkpoint: Any, text: Path, tmp_path: Path) -> None:
    quantize(QuantizeSpec.of(sequence=16, samples=2), checkpoint=checkpoint("gpt_neox"), text=text, calibration=text, out=tmp_path)
    told = json.loads((tmp_path / "quantization.json").read_text())
    assert told["heads"] == sorted(HEADS["gpt_neox"])
    assert "embed_out.weight" in load_file(tmp_path / "model.safetensors"), "in the files, its head keeps the name it always had"


@pytest.mark.parametrize("kind", ["camembert", "roberta", "xlm-roberta"])
def test_a_tied_matrix_is_known_by_the_name_that_it_is_stored_by(kind: str) -> None:
    """CamemBERT and XLM-R have their head before their embedding."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, **sizes, tie_word_embeddings=True))
    vocabulary = [name for name, parameter, _ in matrices(model) if parameter.shape[0] == 32]
    assert vocabulary == ["roberta.embeddings.word_embeddings.weight"]
