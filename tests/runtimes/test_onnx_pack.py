"""Graphs of ONNX Runtime with rounded weights: the very integers, computed with and stored once, whatever rounds activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from featherweight.grid import GRIDS
from featherweight.model.matrices import move_to_grid, round_to_nearest
from featherweight.runtimes.onnx import pack
from featherweight.runtimes.onnx.storage import DATA, save_together
from featherweight.runtimes.packing import QuantizedRows
from featherweight.runtimes.torch.linear import InputRange
from featherweight.system.machine import describe
from tests.support.families import tiny_model

IDS = numpy.array([[3, 1, 4, 1, 5]], dtype=numpy.int64)


@pytest.fixture(scope="module")
def rounded() -> Any:
    """(embedding and a query matrix in float, what they are rounded to, where their rows are found)."""
    model = tiny_model("llama", vocab_size=320, tie_word_embeddings=True)
    floats = [model.model.embed_tokens.weight, model.model.layers[0].self_attn.q_proj.weight]
    graphs = [weight.detach().clone().numpy() for weight in floats]
    quantized = round_to_nearest(model, GRIDS["int8-full"], GRIDS["int8-full"])
    rows = QuantizedRows.of(model, quantized)
    move_to_grid(model, quantized)
    return graphs, [weight.detach().clone() for weight in floats], rows


def graph(embedding: Any, query: Any) -> Any:
    """ids -> embedding -> query matrix, and -> the embedding as a head."""
    weights = {"embedding": embedding, "query": query.T.copy(), "head": embedding.T.copy()}
    nodes = [
        helper.make_node("Gather", ["embedding", "ids"], ["hidden"], name="look-up"),
        helper.make_node("MatMul", ["hidden", "query"], ["queries"], name="queries"),
        helper.make_node("MatMul", ["hidden", "head"], ["logits"], name="head"),
    ]
    held = [numpy_helper.from_array(numpy.ascontiguousarray(array), name) for name, array in weights.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("queries", "logits")]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"])
    made = helper.make_model(helper.make_graph(nodes, "some", [ids], outputs, held), opset_imports=[helper.make_opsetid("", 18)])
    made.ir_version = 10
    return onnx_ir.from_proto(made)


def computed(path: Path) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["queries", "logits"], {"ids": IDS})


@pytest.mark.engine
@pytest.mark.parametrize(
    ("activations", "signed", "operator"),
    [
        ("blocks", True, "MatMulNBits"),
        ("dynamic", True, "DynamicQuantizeMatMul"),
        ("dynamic", False, "DynamicQuantizeMatMul"),
        ("static", True, "MatMulIntegerToFloat"),
        ("static", False, "MatMulIntegerToFloat"),
    ],
)
def test_integers_are_what_is_computed_with(rounded: Any, tmp_path: Path, activations: Any, signed: bool, operator: str) -> None:
    if signed and activations != "blocks" and not describe().int8_dot_product:
        pytest.skip("products of signed integers saturate on this CPU, for which the writer takes unsigned ones")
    floats, (embedding, query), rows = rounded
    models = {"first.onnx": graph(*floats), "second.onnx": graph(*floats)}
    most = 0.9 * embedding.abs().max().item()  # some are beyond it, which a product in float is not to cut off
    ranges = {"model.layers.0.self_attn.q_proj": InputRange(most / 127, 127, 255)}
    for model in models.values():
        pack.pack_graph(model, rows, pack.Products(activations, signed, ranges if activations == "static" else {}))
    save_together(models, tmp_path)
    packed = onnx.load(tmp_path / "first.onnx", load_external_data=False)
    products = {node.output[0]: node.op_type for node in packed.graph.node}
    assert (products["queries"], products["logits"]) == (operator, "MatMulNBits")
    hidden = embedding[torch.from_numpy(IDS)]
    expected = [(hidden @ query.T).numpy(), (hidden @ embedding.T).numpy()]
    pack.in_float(tmp_path / "first.onnx", tmp_path / "exact.onnx")
    for found, wanted in zip(computed(tmp_path / "exact.onnx"), expected, strict=True):
        numpy.testing.assert_allclose(found, wanted, atol=1e-5)
    for found, wanted in zip(computed(tmp_path / "second.onnx"), expected, strict=True):
        assert 0 < numpy.abs(found - wanted).mean() < 0.02 * numpy.abs(wanted).mean()


@pytest.mark.engine
@pytest.mark.parametrize("turned", [0, 1], ids=["columns first", "rows first"])
@pytest.mark.parametrize("activations", ["blocks", "dynamic"])
def test_a_gemm_is_a_product_of_integers_and_a_sum(rounded: Any, tmp_path: Path, activations: Any, turned: int) -> None:
    (embedding, query), (_, exact), rows = rounded
    bias = numpy.linspace(-1, 1, len(query), dtype=numpy.float32)
    held = {"query": query if turned else query.T.copy(), "bias": bias}
    node = helper.make_node("Gemm", ["hidden", "query", "bias"], ["queries"], name="queries", transB=turned)
    hidden, queries = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 32]) for name in ("hidden", "queries"))
    weights = [numpy_helper.from_array(array, name) for name, array in held.items()]
    made = helper.make_model(
        helper.make_graph([node], "flat", [hidden], [queries], weights), ir_version=10, opset_imports=[helper.make_opsetid("", 18)]
    )
    model, given = onnx_ir.from_proto(made), embedding[:5]
    pack.pack_graph(model, rows, pack.Products(activations))
    onnx_ir.save(model, tmp_path / "packed.onnx")
    assert "Gemm" not in {node.op_type for node in model.graph}
    pack.in_float(tmp_path / "packed.onnx", tmp_path / "exact.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "exact.onnx"), providers=["CPUExecutionProvider"])
    numpy.testing.assert_allclose(session.run(None, {"hidden": given})[0], given @ exact.numpy().T + bias, atol=1e-5)


@pytest.mark.parametrize("told", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}])
def test_a_gemm_that_computes_more_stays(rounded: Any, told: dict[str, Any]) -> None:
    (_, query), _, rows = rounded
    node = helper.make_node("Gemm", ["hidden", "query"], ["queries"], name="queries", transB=1, **told)
    hidden, queries = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("hidden", "queries"))
    made = helper.make_model(helper.make_graph([node], "flat", [hidden], [queries], [numpy_helper.from_array(query, "query")]))
    model = onnx_ir.from_proto(made)
    pack.pack_graph(model, rows)
    assert [node.op_type for node in model.graph] == ["Gemm"]


def test_what_two_graphs_hold_lies_once(rounded: Any, tmp_path: Path) -> None:
    floats, _, _ = rounded
    models = {"first.onnx": graph(*floats), "second.onnx": graph(*floats)}
    save_together(models, tmp_path)
    held = [onnx.load(tmp_path / name, load_external_data=False).graph.initializer for name in models]
    places = [{one.name: {e.key: e.value for e in one.external_data} for one in graph} for graph in held]
    assert places[0] == places[1] and places[0]["embedding"]["location"] == DATA
    assert len({place["offset"] for place in places[0].values()}) == 3
    assert (tmp_path / DATA).stat().st_size == 2 * 320 * 32 * 4 + 32 * 32 * 4, "nothing twice, and no room lost between small ones"
    numpy.testing.assert_array_equal(computed(tmp_path / "first.onnx")[1], computed(tmp_path / "second.onnx")[1])


@pytest.mark.parametrize("behind", ["nothing", "soft cap", "two sources"])
def test_a_text_is_written_by_the_last_logits_alone(behind: str, tmp_path: Path) -> None:
    """What is done to each logit behind the head stays; where the head is not found, nothing is written."""
    drawn = numpy.random.default_rng(0)
    held = {
        "table": drawn.normal(size=(11, 6)),
        "norm": drawn.normal(size=6),
        "head": drawn.normal(size=(6, 11)),
        "cap": numpy.array(3.0),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["looked up"]),
        helper.make_node("Mul", ["looked up", "norm"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "head"], ["logits" if behind == "nothing" else "products"]),
    ]
    if behind == "soft cap":
        nodes += [helper.make_node("Div", ["products", "cap"], ["shares"]), helper.make_node("Tanh", ["shares"], ["bent"])]
        nodes += [helper.make_node("Mul", ["bent", "cap"], ["logits"])]
    if behind == "two sources":
        nodes += [helper.make_node("ReduceSum", ["hidden"], ["sum"]), helper.make_node("Add", ["products", "sum"], ["logits"])]
    weights = [numpy_helper.from_array(array.astype(numpy.float32), name) for name, array in held.items()]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", 11])
    made = helper.make_model(
        helper.make_graph(nodes, "some", [ids], [logits], weights), opset_imports=[helper.make_opsetid("", 18)]
    )
    made.ir_version = 10
    onnx.save(made, tmp_path / pack.MODEL)
    assert pack.last_logits(tmp_path / pack.MODEL, tmp_path / pack.WRITING) is (behind != "two sources")
    if behind == "two sources":
        assert not (tmp_path / pack.WRITING).exists()
        return
    texts = numpy.array([[3, 1, 4], [2, 7, 1]])
    every, last = (
        onnxruntime.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"]).run(None, {"ids": texts})[0]
        for name in (pack.MODEL, pack.WRITING)
    )
    assert last.shape == (2, 1, 11)
    numpy.testing.assert_array_equal(last, every[:, -1:])
