"""compile: the very integers and scales of the checkpoint in the ONNX graph, and an engine that agrees with PyTorch."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from featherweight.errors import RecipeError
from featherweight.grid import GRIDS
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.runtimes.bounds import EXACT
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.interface import Limits
from featherweight.runtimes.onnx import pack
from featherweight.runtimes.onnx_genai import patches, stretches
from featherweight.runtimes.onnx_genai.write import build_decoder
from featherweight.runtimes.packing import Packable
from featherweight.runtimes.parity import load_reference
from featherweight.runtimes.spec import CompileSpec
from featherweight.store.served_folder import Serving
from featherweight.system.machine import describe
from tasks.compile import compile
from tests.conftest import _tokenizer
from tests.support import serving_models as models
from tests.support.serving_models import serving_spec


def genai(precision: str = "float32") -> CompileSpec:
    return serving_spec(engine="onnxruntime-genai", precision=precision)


def unpack(blocks: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """MatMulNBits' storage read by its definition: offset binary, low half first. int [rows, columns]."""
    flat = blocks.reshape(blocks.shape[0], -1).astype(np.int64)
    flat = np.stack([flat >> place & 2**bits - 1 for place in range(0, 8, bits)], axis=-1).reshape(flat.shape[0], -1)
    return flat[:, :columns] - 2 ** (bits - 1)


def read_packed(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(integers [rows, columns], float weights) of every MatMulNBits in a graph, in its order."""
    model = onnx.load(folder / "model.onnx")
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    result = []
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            q = unpack(arrays[node.input[1]], attributes["bits"], attributes["K"])
            scales = np.repeat(arrays[node.input[2]], attributes["block_size"], axis=1)[:, : attributes["K"]]
            result.append((q, q.astype(np.float32) * scales))
    return result


def expected(quantized: QuantizedWeights, *names: str) -> tuple[np.ndarray, np.ndarray]:
    """(integers, float weights) of parameters stacked row by row."""
    q = torch.cat([quantized.q[name] for name in names]).numpy()
    return q, torch.cat([quantized.dequantize(name) for name in names]).numpy()


@pytest.mark.parametrize("grid", [grid for grid in GRIDS.values() if grid.kind == "int"], ids=lambda grid: grid.name)
@pytest.mark.parametrize("columns", [64, 88, 160])
def test_blocks_hold_the_integers_and_scales_of_any_grid(grid, columns):
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    q, scales = grid.quantize(weight)
    blocks, repeated = pack.pack_blocks(Packable(grid, tuple(q.shape), lambda: (q, scales)))
    size = pack.block_size(grid, columns)
    assert blocks.shape == (5, -(-columns // size), size * grid.bits // 8)
    found = unpack(blocks.numpy(), grid.bits, columns)
    np.testing.assert_array_equal(found, q.numpy())
    spread = np.repeat(repeated.numpy(), size, axis=1)[:, :columns]
    np.testing.assert_array_equal(found.astype(np.float32) * spread, grid.dequantize(q, scales).numpy())


@pytest.mark.engine
def test_quantized_weights_reach_the_graph_without_a_second_rounding(checkpoints, text, tmp_path):
    quantized = models.quantize(checkpoints["llama"], tmp_path / "q", {"embed_tokens.weight": "int8", "": "int4-g32"})
    (tmp_path / "out").mkdir()
    metrics = compile(genai("int4"), checkpoint=tmp_path / "q", calibration=text, out=tmp_path / "out")
    prefix, found = "model.layers.0.self_attn.", read_packed(tmp_path / "out")
    wanted = [
        expected(quantized, *(f"{prefix}{part}_proj.weight" for part in "qkv")),
        expected(quantized, f"{prefix}o_proj.weight"),
    ]
    for (q, weights), (wanted_q, wanted_weights) in zip(found, wanted, strict=False):
        np.testing.assert_array_equal(q, wanted_q)
        np.testing.assert_array_equal(weights, wanted_weights)
    np.testing.assert_array_equal(found[-1][1], expected(quantized, "model.embed_tokens.weight")[1])
    assert len(found) == 2 * 5 + 1
    assert metrics["parity_weights_max_abs"] < 1e-4
    assert metrics["parity_mean_abs"] <= metrics["parity_bound"]
    assert Serving.read(tmp_path / "out") == Serving("onnxruntime-genai", grid="int4-g32", max_tokens=256, context=256)


@pytest.mark.engine
@pytest.mark.skipif("avx512bw" not in describe().cpu_features, reason="ONNX Runtime's product of 2-bit integers wants AVX-512")
@pytest.mark.parametrize(("grid", "head"), [("int2-g128", "int8"), ("int2-g64", "int2-g64")])
def test_two_bits_are_served_as_the_very_integers(checkpoints, text, tmp_path, grid, head):
    quantized = models.quantize(checkpoints["llama"], tmp_path / "q", {"embed_tokens.weight": head, "": grid})
    (tmp_path / "out").mkdir()
    metrics = compile(genai("int2"), checkpoint=tmp_path / "q", calibration=text, out=tmp_path / "out")
    wanted_q, wanted_weights = expected(quantized, "model.layers.0.self_attn.o_proj.weight")
    q, weights = read_packed(tmp_path / "out")[1]
    np.testing.assert_array_equal(q, wanted_q)
    np.testing.assert_array_equal(weights, wanted_weights)
    assert metrics["parity_weights_max_abs"] < 1e-4
    assert metrics["parity_mean_abs"] <= metrics["parity_bound"]


@pytest.mark.engine
def test_products_of_float_activations_lose_nothing_but_what_the_weights_lost(checkpoints, text, tmp_path):
    spec = serving_spec(engine="onnxruntime-genai", precision="int4", accuracy_level=1)
    metrics = compile(spec, checkpoint=checkpoints["llama"], calibration=text, out=tmp_path)
    assert metrics["parity_max_abs"] <= metrics["parity_bound"] == EXACT.value
    nodes = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node
    levels = {one.i for node in nodes if node.op_type == "MatMulNBits" for one in node.attribute if one.name == "accuracy_level"}
    assert levels == {1} and Serving.read(tmp_path).options == {"activations": "float32"}


def test_a_level_of_accuracy_says_nothing_of_floats():
    assert "accuracy_level" in serving_spec(engine="onnxruntime-genai").unread
    assert "accuracy_level" not in genai("int8").unread


@pytest.mark.engine
def test_a_tied_embedding_and_head_are_stored_once(checkpoints, text, tmp_path):
    compile(genai("int8"), checkpoint=checkpoints["llama"], calibration=text, out=tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    by_operator = {node.op_type: node for node in model.graph.node}
    head = next(node for node in model.graph.node if node.output[0] == "logits")
    assert by_operator["GatherBlockQuantized"].input[2] == head.input[2]
    assert by_operator["Reshape"].input[0] == head.input[1]
    assert sum(tensor.dims[0] == 320 for tensor in model.graph.initializer) == 2  # integers and scales, of 320 tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "genai_config.json", "generation_config.json", "model.onnx", "model.onnx.data",
        "serving.json", "tokenizer.json", "tokenizer_config.json", "writing.onnx",
    ]  # fmt: skip


@pytest.mark.engine
def test_scores_are_of_all_positions_and_texts_of_the_last_over_the_same_weights(checkpoints, text, tmp_path):
    """The graph that writes is loaded in the place of the one that scores, and that one again; each tells the same as before."""
    compile(genai("int8"), checkpoint=checkpoints["untied"], calibration=text, out=tmp_path)
    graphs = [onnx.load(tmp_path / name, load_external_data=False) for name in ("model.onnx", "writing.onnx")]
    assert [one.type.tensor_type.shape.dim[1].dim_value for graph in graphs for one in graph.graph.output[:1]] == [0, 1]
    engine = RUNTIMES["onnxruntime-genai"].loaded_model()(tmp_path, Serving.read(tmp_path), Limits(1, 64, 4))
    prompts, windows = [[9, 8, 7, 12], [5, 6, 11, 3], [4, 5]], [[9, 8, 7, 12, 5], [4, 5]]
    written, scores = engine.generate(prompts, 6).tokens, engine.logprobs(windows)
    assert [len(row) for row in scores] == [4, 1]
    assert engine.generate(prompts, 6).tokens == written and engine.logprobs(windows) == scores
    (tmp_path / "writing.onnx").unlink()
    whole = RUNTIMES["onnxruntime-genai"].loaded_model()(tmp_path, Serving.read(tmp_path), Limits(1, 64, 4))
    assert whole.generate(prompts, 6).tokens == written and whole.logprobs(windows) == scores


@pytest.mark.engine
@pytest.mark.parametrize("family", ["untied", "pruned", "qwen2"])
@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
def test_families_compute_what_pytorch_computes(family, precision, checkpoints, text, tmp_path):
    metrics = compile(genai(precision), checkpoint=checkpoints[family], calibration=text, out=tmp_path)
    assert metrics["parity_mean_abs"] <= metrics["parity_bound"]
    assert metrics["parity_weights_max_abs" if precision != "float32" else "parity_max_abs"] < 1e-4
    assert Serving.read(tmp_path).grid == {"float32": None, "int8": "int8", "int4": "int4-g32"}[precision]


@pytest.mark.engine
def test_grids_may_differ_between_query_key_and_value_and_the_head_may_stay_float(checkpoints, text, tmp_path):
    grids = {"q_proj.weight": "int8", "_proj.weight": "int4-g32"}
    quantized = models.quantize(checkpoints["untied"], tmp_path / "q", grids)
    assert quantized.head is None
    (tmp_path / "out").mkdir()
    metrics = compile(genai("int4"), checkpoint=tmp_path / "q", calibration=text, out=tmp_path / "out")
    assert metrics["parity_weights_max_abs"] < 1e-4
    assert len(read_packed(tmp_path / "out")) == 2 * 7


def test_an_architecture_that_the_builder_does_not_know(checkpoints, text, tmp_path):
    with pytest.raises(RecipeError, match="model builder does not know GPT2LMHeadModel; take ctranslate2"):
        compile(genai(), checkpoint=checkpoints["gpt2"], calibration=text, out=tmp_path)


def test_heads_that_the_attention_kernel_would_refuse(text, tmp_path):
    narrow = models.make("llama", tmp_path / "narrow", _tokenizer(), num_attention_heads=8)
    with pytest.raises(RecipeError, match=r"multiple of 16 channels, these have 8"):
        compile(genai(), checkpoint=narrow, calibration=text, out=tmp_path)


@pytest.mark.parametrize(("precision", "reason"), [("int8", "round them again"), ("float32", "full size")])
def test_a_precision_that_is_not_the_grids(precision, reason, checkpoints, text, tmp_path):
    models.quantize(checkpoints["llama"], tmp_path / "q", {"": "int4-g32"})
    (tmp_path / "out").mkdir()
    with pytest.raises(RecipeError, match=reason):
        compile(genai(precision), checkpoint=tmp_path / "q", calibration=text, out=tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_builder_says_nothing(checkpoints, tmp_path, capfd):
    build_decoder(checkpoints["llama"], tmp_path)
    assert "Reading" not in capfd.readouterr().out
    assert json.loads((tmp_path / "genai_config.json").read_text())["model"]["context_length"] == 256


def test_the_graph_names_the_builders_version_and_no_repositorys_commit(checkpoints, tmp_path):
    build_decoder(checkpoints["llama"], tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert model.producer_version == version("onnxruntime-genai")


def test_weights_that_are_written_a_stretch_at_a_time_are_those_of_the_builder(checkpoints, tmp_path, monkeypatch):
    build_decoder(checkpoints["llama"], tmp_path / "builder")
    monkeypatch.setattr(patches, "SMALL", 0)
    monkeypatch.setattr(stretches, "BYTES", 1024)
    for kind in (torch.float32, torch.bfloat16):
        build_decoder(checkpoints["llama"], tmp_path / str(kind), model=load_reference(checkpoints["llama"]).to(kind))
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "torch.float32" / file).read_bytes() == (tmp_path / "builder" / file).read_bytes()
    ours, theirs = (np.fromfile(tmp_path / kind / "model.onnx.data", np.float32) for kind in ("torch.bfloat16", "builder"))
    assert np.allclose(ours, theirs, rtol=2**-8, atol=1e-2) and not np.array_equal(ours, theirs)


@pytest.mark.engine
@pytest.mark.skipif(RUNTIMES["torch-compile"].missing() is not None, reason="torch.compile cannot run here")
def test_torch_compile_serves_the_checkpoints_own_files(checkpoints, text, tmp_path):
    spec = serving_spec(engine="torch-compile")
    metrics = compile(spec, checkpoint=checkpoints["llama"], calibration=text, out=tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_ino == (checkpoints["llama"] / "model.safetensors").stat().st_ino
    assert metrics["parity_max_abs"] <= metrics["parity_bound"]
