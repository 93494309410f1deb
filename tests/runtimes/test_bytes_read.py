"""What a token makes an engine read: counted by hand on tiny checkpoints of every format."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from featherweight.grid import GRIDS
from featherweight.model.matrices import round_to_nearest
from featherweight.runtimes.bytes_read import bytes_read
from featherweight.runtimes.torch import pack
from featherweight.store.served_folder import Serving
from tests.support.families import family_checkpoint

HIDDEN, INNER, LAYERS = 32, 48, 2
ATTENTION = [(32, 32), (16, 32), (16, 32), (32, 32)]  # q and o of four heads, k and v of two
LLAMA = [*ATTENTION, (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]
NORMS = LAYERS * 2 * HIDDEN + HIDDEN
POSITION = 2 * LAYERS * 2 * 8 * 4  # keys and values, two key/value heads of eight channels, float32


def weights(shapes: list[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in shapes)


def vocabulary(folder: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(folder).vocab_size)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def llama(request, tmp_path_factory) -> tuple[Path, bool]:
    folder = tmp_path_factory.mktemp("bytes-read") / "llama"
    return family_checkpoint("llama", folder, tie_word_embeddings=request.param), request.param


def served(checkpoint: Path, folder: Path, serving: Serving) -> Path:
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    serving.write(folder)
    return folder


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_pytorch_reads_every_float_once_and_a_row_of_the_embedding(llama, tmp_path, dtype, width):
    checkpoint, tied = llama
    read = bytes_read(served(checkpoint, tmp_path, Serving("torch", options={"dtype": dtype})))
    row = 0 if tied else HIDDEN
    assert read.step == width * (LAYERS * weights(LLAMA) + NORMS + vocabulary(checkpoint) * HIDDEN + row)
    assert (read.once, read.position, read.source_position) == (0, POSITION * width / 4, 0)


def test_an_fp8_cache_has_a_byte_for_each_number(llama, tmp_path):
    options = {"dtype": "float16", "kv_cache_dtype": "fp8"}
    assert bytes_read(served(llama[0], tmp_path, Serving("torch", options=options))).position == POSITION / 4


@pytest.mark.parametrize(("engine", "grid"), [("torch-dynamic", "int8"), ("torchao-int8", "int8"), ("torchao-int4", "int4-g32")])
def test_pytorchs_quantized_engines_hold_a_byte_a_weight(llama, tmp_path, engine, grid):
    """4 bits take a byte in memory; torchao's engines turn the vocabulary into float as they load it."""
    from transformers import AutoModelForCausalLM

    checkpoint, tied = llama
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    pack.write(model, round_to_nearest(model, GRIDS[grid], GRIDS["int8"]), {}, tmp_path)
    shutil.copy(checkpoint / "config.json", tmp_path)
    Serving(engine, grid=grid).write(tmp_path)
    groups = [rows * (-(-columns // 32) if grid == "int4-g32" else 1) for rows, columns in LLAMA]
    row = HIDDEN + 4 if engine == "torch-dynamic" else 4 * HIDDEN
    head = vocabulary(checkpoint) * row + (0 if tied else row)
    assert bytes_read(tmp_path).step == LAYERS * (weights(LLAMA) + 4 * sum(groups)) + 4 * NORMS + head


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "computed", "width"), [("float32", "float32", 4), ("int8", "int8", 1), ("int8", "float32", 4)])
def test_ctranslate2_holds_what_it_computes_in(llama, tmp_path, stored, computed, width):
    import ctranslate2

    checkpoint, tied = llama
    converter = ctranslate2.converters.TransformersConverter(str(checkpoint))
    converter.convert(str(tmp_path / "model"), quantization=None if stored == "float32" else stored)
    shutil.copy(checkpoint / "config.json", tmp_path)
    Serving("ctranslate2", "model", {"compute_type": computed}).write(tmp_path)
    scale = 4 if stored == "int8" else 0
    rows = sum(rows for rows, _ in LLAMA)
    row = width * HIDDEN + scale
    head = vocabulary(checkpoint) * row + (0 if tied else row)
    norms = HIDDEN  # all of them ones here, and CTranslate2 stores equal vectors once
    assert bytes_read(tmp_path).step == LAYERS * (width * weights(LLAMA) + scale * rows) + 4 * norms + head


@pytest.mark.parametrize("tied", [False, True])
def test_onnx_runtime_reads_4_bits_and_a_scale_for_each_block(llama, tmp_path, tied):
    """A graph of one MatMulNBits, the head, and a GatherBlockQuantized, which share their integers where they are tied."""
    import onnx
    from onnx import TensorProto, helper

    words, blocks = 100, HIDDEN // 32
    names = ["head"] if tied else ["head", "embedding"]
    constants = [helper.make_tensor(f"{n}.q", TensorProto.UINT8, [words, blocks, 16], bytes(words * 16), raw=True) for n in names]
    constants += [helper.make_tensor(f"{n}.s", TensorProto.FLOAT, [words, blocks], bytes(words * 4), raw=True) for n in names]
    constants += [helper.make_tensor("flat", TensorProto.INT64, [2], [words, 16])]
    constants += [helper.make_tensor("cosines", TensorProto.FLOAT, [512, 4], bytes(512 * 16), raw=True)]
    table = names[-1]
    nodes = [
        helper.make_node("Reshape", [f"{table}.q", "flat"], ["rows"]),
        helper.make_node("GatherBlockQuantized", ["rows", "ids", f"{table}.s"], ["x"], domain="com.microsoft"),
        helper.make_node("RotaryEmbedding", ["x", "ids", "cosines", "cosines"], ["y"], domain="com.microsoft"),
        helper.make_node("MatMulNBits", ["y", "head.q", "head.s"], ["logits"], domain="com.microsoft"),
    ]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], constants)), tmp_path / "model.onnx")
    shutil.copy(llama[0] / "config.json", tmp_path)
    Serving("onnxruntime-genai").write(tmp_path)
    row = HIDDEN / 2 + 4
    assert bytes_read(tmp_path).step == words * row + (0 if tied else row) + 4 * 4


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["marian", "t5"])
@pytest.mark.parametrize("engine", ["torch", "ctranslate2"])
def test_an_encoder_and_the_keys_of_its_output_are_read_once(tmp_path, model_type, engine):
    checkpoint = family_checkpoint(model_type, tmp_path / "checkpoint")
    if engine == "ctranslate2":
        from transformers import AutoModelForSeq2SeqLM

        from featherweight.runtimes.ctranslate2.pack import convert

        convert(AutoModelForSeq2SeqLM.from_pretrained(checkpoint), checkpoint, tmp_path / "served" / "model", None)
        shutil.copy(checkpoint / "config.json", tmp_path / "served")
        Serving("ctranslate2", "model").write(tmp_path / "served")
    else:
        served(checkpoint, tmp_path / "served", Serving("torch"))
    read = bytes_read(tmp_path / "served")
    square = HIDDEN * HIDDEN
    encoder, decoder = LAYERS * (4 * square + 2 * HIDDEN * INNER), LAYERS * (6 * square + 2 * HIDDEN * INNER)
    cross = LAYERS * 2 * square
    head = vocabulary(checkpoint) * HIDDEN
    assert read.once == pytest.approx(4 * (encoder + cross), rel=0.05), "but for biases and norms"
    assert read.step == pytest.approx(4 * (decoder + head), rel=0.05)
    assert read.position == read.source_position == 2 * LAYERS * 4 * 8 * 4


def test_of_experts_only_the_active_are_read(tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "num_key_value_heads": 4}
    config = AutoConfig.for_model("mixtral", **sizes, **experts)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    Serving("torch").write(tmp_path)
    dense = 4 * 32 * 32 + 4 * 32 + 3 * 32 + 64 * 32 + 32
    assert bytes_read(tmp_path).step == 4 * (dense + 3 * 32 * 48)


def test_memory_is_not_the_roof_of_an_encoder(tmp_path):
    assert bytes_read(served(family_checkpoint("bert", tmp_path / "bert"), tmp_path / "encoder", Serving("torch"))) is None


@pytest.mark.parametrize(("rounded", "bits", "scales"), [("nf4", 4, lambda r, c: -(-r * c // 64)), ("llm.int8", 8, lambda r, c: r)])
def test_bitsandbytes_holds_rounded_matrices_and_the_rest_in_float16(llama, tmp_path, rounded, bits, scales):
    checkpoint, tied = llama
    read = bytes_read(served(checkpoint, tmp_path, Serving("torch", options={"bitsandbytes": rounded})))
    matrices = sum(rows * columns * bits / 8 + 4 * scales(rows, columns) for rows, columns in LLAMA)
    rest = 2 * (NORMS + vocabulary(checkpoint) * HIDDEN + (0 if tied else HIDDEN))
    assert (read.step, read.position) == (LAYERS * matrices + rest, POSITION / 2)


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "computed"), [("float16", "float16"), ("int8", "int8_float16"), ("int8", "int8_bfloat16")])
def test_ctranslate2_computes_floats_in_16_bits_on_a_gpu(llama, tmp_path, stored, computed):
    import ctranslate2

    checkpoint, tied = llama
    converter = ctranslate2.converters.TransformersConverter(str(checkpoint))
    converter.convert(str(tmp_path / "model"), quantization=stored)
    shutil.copy(checkpoint / "config.json", tmp_path)
    Serving("ctranslate2", "model", {"compute_type": computed}).write(tmp_path)
    width, scale = (1, 4) if stored == "int8" else (2, 0)
    row = width * HIDDEN + scale
    head = vocabulary(checkpoint) * row + (0 if tied else row)
    read = bytes_read(tmp_path)
    assert read.step == LAYERS * (width * weights(LLAMA) + scale * sum(rows for rows, _ in LLAMA)) + 2 * HIDDEN + head
    assert read.position == POSITION / 2
