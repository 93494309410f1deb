"""PyTorch's and torchao's quantized layers: our integers as they are, the libraries' own results, every family of models."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from featherweight.checkpoint.opening import load_model
from featherweight.errors import IntegrityError, ParityError, RecipeError, ToolchainError
from featherweight.grid import GRIDS
from featherweight.model.matrices import move_to_grid, round_to_nearest
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.runtimes.torch import pack, storage
from featherweight.runtimes.torch.linear import DynamicLinear, InputRange, Matrix, StaticLinear, of_rows, saturates, weight_only
from featherweight.runtimes.torch.static_ranges import _prepare, input_ranges, simulated
from featherweight.runtimes.torch.storage import Packed
from featherweight.store.served_folder import Serving
from featherweight.text.model_inputs import example_blocks, inputs_and_labels
from tasks.export import export
from tests.conftest import STORY, _tokenizer
from tests.support import serving_models as models
from tests.support.families import family_checkpoint
from tests.support.serving_models import serving_spec

INTEGERS = {name: grid for name, grid in GRIDS.items() if grid.kind == "int"}
PER_ROW = [grid for grid in INTEGERS.values() if grid.bits == 8 and grid.group_size is None]


def matrix(grid, rows: int = 48, columns: int = 72, bias: bool = True) -> Matrix:
    generator = torch.Generator().manual_seed(rows)
    q, scales = grid.quantize(torch.randn(rows, columns, generator=generator))
    return Matrix(grid, q, scales, torch.randn(rows, generator=generator) if bias else None)


def dequantized(m: Matrix) -> torch.Tensor:
    return m.grid.dequantize(m.q, m.scales)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_text(tmp_path_factory.mktemp("text"), STORY)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make("llama", tmp_path_factory.mktemp("models") / "llama", _tokenizer())


# What lies on disk


@pytest.mark.parametrize("grid", INTEGERS.values(), ids=INTEGERS.keys())
@pytest.mark.parametrize("columns", [72, 75])
def test_a_folder_holds_the_integers_of_any_grid(grid, columns, tmp_path):
    m = matrix(grid, columns=columns)
    rest = {"norm.weight": torch.randn(7)}
    Packed(QuantizedWeights({"a.weight": grid}, {"a.weight": m.q}, {"a.weight": m.scales}, "test"), rest).write(tmp_path)
    found = Packed.read(tmp_path)
    assert torch.equal(found.quantized.q["a.weight"], m.q) and torch.equal(found.quantized.scales["a.weight"], m.scales)
    assert found.quantized.grids == {"a.weight": grid} and found.quantized.method == "test"
    assert torch.equal(found.rest["norm.weight"], rest["norm.weight"])


def test_two_4_bit_integers_lie_in_a_byte():
    q = torch.tensor([[-8, 7, 0]], dtype=torch.int8)
    halves = storage.pack_nibbles(q)
    assert halves.tolist() == [[0 | 15 << 4, 8]]
    assert torch.equal(storage.unpack_nibbles(halves, 3), q)


def test_a_damaged_folder_says_so(tmp_path):
    with pytest.raises(IntegrityError, match=r"packed\.safetensors is damaged"):
        Packed.read(tmp_path)
    (tmp_path / storage.FILE).write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(IntegrityError, match="export the variant again"):
        Packed.read(tmp_path)


# The layers


@pytest.mark.parametrize("grid", INTEGERS.values(), ids=INTEGERS.keys())
@pytest.mark.parametrize("columns", [64, 72, 256])
def test_torchao_holds_every_grid_exactly(grid, columns):
    m = matrix(grid, columns=columns)
    layer = weight_only(m)
    assert torch.equal(layer.weight.dequantize()[:, :columns], dequantized(m))
    x = torch.randn(3, 5, columns)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dequantized(m), m.bias), rtol=0, atol=1e-4)


@pytest.mark.parametrize("grid", PER_ROW, ids=lambda grid: grid.name)
def test_torchs_packed_weights_are_our_integers_and_scales(grid):
    m = matrix(grid)
    weight = DynamicLinear(m).weight()
    assert torch.equal(weight.int_repr(), m.q)
    assert torch.equal(weight.q_per_channel_scales(), m.scales.squeeze(1).double())
    assert not weight.q_per_channel_zero_points().any()
    assert torch.equal(weight.dequantize(), dequantized(m))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_rows_that_are_looked_up_are_scaled_as_their_embedding_scales_them(scale):
    from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100ScaledWordEmbedding

    m, ids = matrix(GRIDS["int8"], bias=False), torch.tensor([[0, 5, 47]])
    kinds = [nn.Embedding(48, 72)] if scale == 1.0 else []
    kinds += [kind(48, 72, 0, embed_scale=scale) for kind in (GemmaTextScaledWordEmbedding, M2M100ScaledWordEmbedding)]
    for embedding in kinds:
        found = of_rows(embedding, m)
        assert torch.equal(found(ids), dequantized(m)[ids] * scale)
        assert next(found.parameters()).dtype == torch.float32  # a model of nothing but integers has a type still


def test_a_head_keeps_a_bias_that_has_another_name_too(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(**sizes, max_position_embeddings=16, architectures=["BertForMaskedLM"])).eval()
    nn.init.normal_(model.cls.predictions.bias)
    pack.write(model, round_to_nearest(model, GRIDS["int8"], GRIDS["int8"]), {}, tmp_path)
    model.config.save_pretrained(tmp_path)
    assert torch.equal(pack.load(tmp_path, "torch-dynamic").cls.predictions.decoder.bias, model.cls.predictions.bias)


def torchs_own(m: Matrix) -> nn.Module:
    """`torch.ao.quantization.quantize_dynamic` of a Linear layer with these weights."""
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    linear = nn.Linear(m.q.shape[1], m.q.shape[0])
    with torch.no_grad():
        linear.weight.copy_(dequantized(m))
        linear.bias.copy_(m.bias)
    return quantize_dynamic(nn.Sequential(linear), {nn.Linear: per_channel_dynamic_qconfig})[0]


def test_a_token_alone_is_computed_as_quantize_dynamic_computes_it():
    m = matrix(GRIDS["int8"])
    theirs = torchs_own(m)
    weight = theirs.weight()
    ours = DynamicLinear(Matrix(m.grid, weight.int_repr(), weight.q_per_channel_scales().float()[:, None], m.bias))
    ours.reduce_range = True
    for scale in (0.01, 1.0, 300.0):
        x = torch.randn(1, 1, 72) * scale
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("engine", ["torch-dynamic", "torchao-int8-dynamic"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_reference_rounds_inputs_as_the_layer_does(engine, tokens):
    """What it costs is many times what is left between the two."""
    m = matrix(GRIDS["int8"])
    x = torch.randn(1, tokens, 72) * torch.logspace(-2, 2, tokens)[:, None]
    format = pack.FORMATS[engine]
    layer, floats = format.layer()(m)(x), nn.functional.linear(x, dequantized(m), m.bias)
    simulated = nn.functional.linear(format.rounding()(x), dequantized(m), m.bias)
    assert (layer - simulated).abs().max() < 1e-5 * x.abs().max()
    assert (layer - floats).abs().max() > 1e-3 * x.abs().max()


def test_an_outlier_costs_the_other_tokens_nothing():
    m = matrix(GRIDS["int8"])
    x = torch.randn(8, 72)
    x[3] *= 1000
    exact, quiet = nn.functional.linear(x, dequantized(m), m.bias), [row for row in range(8) if row != 3]
    error = (DynamicLinear(m)(x) - exact)[quiet].abs().max()
    assert error < 1 < 10 < (torchs_own(m)(x) - exact)[quiet].abs().max()


def test_tokens_of_zeros_are_numbers():
    m = matrix(GRIDS["int8"])
    x = torch.zeros(2, 3, 72)
    torch.testing.assert_close(DynamicLinear(m)(x), m.bias.expand(2, 3, 48), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(48, 72), (64, 64)])
def test_a_static_layer_is_what_torchao_lowers_pt2e_to(bias, rows, columns):
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    m = matrix(GRIDS["int8"], rows, columns, bias)
    linear = nn.Linear(columns, rows, bias=bias).requires_grad_(False)
    linear.weight.copy_(dequantized(m))
    if bias:
        linear.bias.copy_(m.bias)
    graph, x = _prepare(linear), torch.randn(9, columns)
    graph(x)
    converted = convert_pt2e(graph)
    with torch.no_grad():  # torch's own observer of weights has another grid than ours
        dict(converted.named_buffers())["_frozen_param0"].copy_(m.q)
        dict(converted.named_buffers())["_scale_0"].copy_(m.scales.squeeze(1))
    rounding = next(node for node in converted.graph.nodes if "quantize_per_tensor" in str(node.target))
    _, scale, zero_point, _, most, _ = rounding.args
    ours = StaticLinear(Matrix(m.grid, m.q, m.scales, m.bias, InputRange(scale, zero_point, most)))
    assert torch.equal(ours(x), lower_pt2e_quantized_to_x86(converted, (x,))(x))
    assert most == (127 if saturates() else 255)
    rounded = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, most)
    torch.testing.assert_close(ours(x), nn.functional.linear(rounded, dequantized(m), m.bias), rtol=0, atol=1e-4)


def test_a_torch_with_which_nothing_is_rounded_is_named(llama, text, monkeypatch):
    """torch 2.11 with this torchao leaves the graph as it was."""
    monkeypatch.setattr("torchao.quantization.pt2e.quantize_pt2e.convert_pt2e", lambda graph: graph)
    with pytest.raises(ToolchainError, match=f"with torch {re.escape(torch.__version__)}; take"):
        input_ranges(load_model(llama), ["model.layers.0.mlp.up_proj.weight"], llama, text)


def test_a_range_survives_the_disk():
    here = InputRange(0.1, 124, 127)
    assert InputRange.of(here.stored()) == here


# Whole models


def quantized_folder(engine: str, source: Path, text: Path, folder: Path):
    """(the served folder's model, the reference on the grid, its ranges)."""
    kind, model = pack.FORMATS[engine], load_model(source)
    quantized = round_to_nearest(model, GRIDS[kind.body], GRIDS[kind.head])
    move_to_grid(model, quantized)
    ranges = input_ranges(model, quantized.q, source, text) if kind.activations == "static" else {}
    folder.mkdir()
    pack.write(model, quantized, ranges, folder)
    (folder / "config.json").write_text((source / "config.json").read_text())
    return pack.load(folder, engine), model, ranges


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "t5", "marian", "bert", "gpt2"])
def test_every_family_computes_what_its_float_weights_compute(family, text, tmp_path):
    make = models.make("gpt2", tmp_path / "m", _tokenizer()) if family == "gpt2" else family_checkpoint(family, tmp_path / "m")
    blocks = None
    for engine in pack.FORMATS if family == "llama" else ("torch-static", "torchao-int4"):
        served, model, ranges = quantized_folder(engine, make, text, tmp_path / engine)
        blocks = example_blocks(make, model.config, text, 24, 2, 0) if blocks is None else blocks
        inputs = inputs_and_labels(model.config, blocks)[0]
        with torch.inference_mode(), simulated(model, ranges):
            expected, found = model(**inputs).logits, served(**inputs).logits
        errors = (found - expected).std(-1) / expected.std()
        if pack.FORMATS[engine].activations == "dynamic":
            assert errors.max() < 0.1, engine
        else:  # an activation halfway between two integers may fall to either side, by the order of a sum
            assert errors.median() < 1e-5 and errors.max() < 0.02, (engine, errors)
        assert not [name for name, parameter in served.named_parameters() if parameter.is_meta]


@pytest.mark.slow
def test_a_reference_is_as_it_was_after_calibration(llama, text):
    model = load_model(llama)
    before = copy.deepcopy(model.state_dict())
    ranges = input_ranges(model, [name for name in before if name.endswith("proj.weight")], llama, text)
    assert len(ranges) == 2 * 7 and all(0 <= here.zero_point <= here.most and here.scale > 0 for here in ranges.values())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not [module for module in model.modules() if "forward" in vars(module)]
    assert input_ranges(model, [name for name in before if name.endswith("proj.weight")], llama, text) == ranges


# The stage


@pytest.mark.engine
@pytest.mark.parametrize(
    ("engine", "grids"),
    [("torchao-int4", {"embed_tokens.weight": "int8", "": "int4-g32"}), ("torch-static", {"": "int8-reduced"})],
)  # fmt: skip
def test_a_quantized_checkpoint_is_served_without_a_second_rounding(engine, grids, llama, text, tmp_path):
    quantized = models.quantize(llama, tmp_path / "q", grids)
    (tmp_path / "out").mkdir()
    metrics = export(serving_spec(engine=engine), checkpoint=tmp_path / "q", calibration=text, out=tmp_path / "out")
    found = Packed.read(tmp_path / "out").quantized
    assert found.grids == quantized.grids and Serving.read(tmp_path / "out").grid == quantized.grid
    assert all(torch.equal(found.q[name], q) for name, q in quantized.q.items())
    assert all(torch.equal(found.scales[name], scales) for name, scales in quantized.scales.items())
    exact = "parity_max_abs" if engine == "torchao-int4" else "parity_weights_max_abs"
    assert metrics[exact] < 1e-4
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {storage.FILE, "serving.json", "config.json", "tokenizer.json"}
    assert not list((tmp_path / "out").glob("model*"))


def test_float_weights_are_rounded_and_take_their_own_bits_on_disk(llama, text, tmp_path):
    quantized_folder("torchao-int4", llama, text, tmp_path / "out")
    found = Packed.read(tmp_path / "out").quantized
    assert (found.grid, found.head, found.method) == ("int4-g32", "int8", "rtn")
    body = sum(q.numel() for name, q in found.q.items() if found.grids[name].bits == 4)
    head = sum(q.numel() for name, q in found.q.items() if found.grids[name].bits == 8)
    rest = sum(scales.nbytes for scales in found.scales.values()) + 5 * 64 * 4  # scales and norms
    assert 0 < (tmp_path / "out" / storage.FILE).stat().st_size - (body / 2 + head + rest) < 8192


def test_one_row_with_a_doubled_scale_fails(llama, text, tmp_path, monkeypatch):
    write = Packed.write

    def doubled(self, folder):
        scales = {name: tensor.clone() for name, tensor in self.quantized.scales.items()}
        scales["model.layers.1.mlp.down_proj.weight"][3] *= 2
        write(Packed(QuantizedWeights(self.quantized.grids, self.quantized.q, scales, "test"), self.rest), folder)

    monkeypatch.setattr(Packed, "write", doubled)
    with pytest.raises(ParityError, match=r"torch-dynamic with float activations .*bound 0\.001"):
        export(serving_spec(engine="torch-dynamic"), checkpoint=llama, calibration=text, out=tmp_path)


def test_weights_on_another_grid_are_refused_before_anything_runs(llama, text, tmp_path):
    models.quantize(llama, tmp_path / "q", {"": "int4-g32"})
    (tmp_path / "out").mkdir()
    with pytest.raises(RecipeError, match=r"int4-g32 \+ torch-dynamic: .*take onnxruntime-genai"):
        export(serving_spec(engine="torch-dynamic"), checkpoint=tmp_path / "q", calibration=text, out=tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_lacks_a_tensor_is_named(llama, text, tmp_path):
    quantized_folder("torchao-int8", llama, text, tmp_path / "a")
    found = Packed.read(tmp_path / "a")
    Packed(found.quantized, {name: tensor for name, tensor in found.rest.items() if name != "model.norm.weight"}).write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((llama / "config.json").read_text())))
    with pytest.raises(IntegrityError, match=r"lacks tensor model\.norm\.weight"):
        pack.load(tmp_path, "torchao-int8")


@pytest.mark.parametrize("engine", ["torchao-int8", "torchao-int4", "torchao-int8-dynamic"])
def test_a_loaded_model_lives_where_it_is_served_to_the_last_tensor(engine, llama, text, tmp_path, without_parity, monkeypatch):
    export(serving_spec(engine=engine), checkpoint=llama, calibration=text, out=tmp_path)
    given = {}
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda self, state, **options: given.update(state))
    monkeypatch.setattr(pack, "torch_device", lambda *_: torch.device("meta"))  # for any that is not the CPU
    with pytest.raises(IntegrityError, match="lacks tensor"):  # what lies on that device has no numbers
        pack.load(tmp_path, engine)
    assert {tensor.device.type for tensor in given.values()} == {"meta"} and any("embed" in name for name in given)
