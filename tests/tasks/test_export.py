"""export: the very integers of the checkpoint in each engine's files, and an engine that agrees with PyTorch."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from featherweight.checkpoint import saving
from featherweight.errors import RecipeError, StageError
from featherweight.grid import GRIDS
from featherweight.model.matrices import move_to_grid, round_to_nearest
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.ctranslate2 import write
from featherweight.runtimes.parity import Reference, load_reference
from featherweight.runtimes.spec import ExportSpec
from featherweight.runtimes.vllm import on_cpus, pack
from featherweight.runtimes.vllm.schemes import SCHEMES
from featherweight.store.served_folder import Serving
from tasks.export import export
from tests.conftest import _tokenizer
from tests.support import serving_models as models
from tests.support.serving_models import serving_spec

TYPES = {1: np.int8, 0: np.float32, 2: np.int16, 3: np.int32}


def ctranslate2(compute_type: str = "float32", reduce_range: bool | str = "auto") -> ExportSpec:
    return serving_spec(engine="ctranslate2", compute_type=compute_type, reduce_range=reduce_range)


@pytest.fixture(scope="module")
def quantized(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama on int8 rows, embedding and head included, by scales that no rounding to nearest would choose."""
    out = tmp_path_factory.mktemp("quantized") / "int8"
    models.quantize(checkpoints["llama"], out, {"": "int8"})
    return out


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """The variables of a model.bin (binary version 6), read by its layout; aliases have their target's values."""
    data, at = path.read_bytes(), 0

    def take(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(form, data, at)
        at += struct.calcsize(form)
        return value

    def text() -> str:
        nonlocal at
        length = take("<H")
        at += length
        return data[at - length : at - 1].decode()

    take("<I"), text(), take("<I")
    variables = {}
    for _ in range(take("<I")):
        name, shape = text(), [take("<I") for _ in range(take("<B"))]
        kind, size = take("<B"), take("<I")
        variables[name] = np.frombuffer(data, TYPES[kind], size // np.dtype(TYPES[kind]).itemsize, at).reshape(shape)
        at += size
    for _ in range(take("<I")):
        alias, target = text(), text()
        variables[alias] = variables[target]
    return variables


def test_pytorch_folder_is_the_checkpoint_linked(quantized, checkpoints, text, tmp_path):
    assert export(serving_spec(engine="torch"), checkpoint=checkpoints["llama"], calibration=text, out=tmp_path) == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [path.name for path in checkpoints["llama"].iterdir()] + ["serving.json"]
    )
    weights = "model.safetensors"
    assert (tmp_path / weights).stat().st_ino == (checkpoints["llama"] / weights).stat().st_ino
    assert Serving.read(tmp_path) == Serving("torch", max_tokens=256, context=256)


@pytest.mark.engine
def test_integers_reach_ctranslate2_without_a_second_rounding(quantized, text, tmp_path):
    metrics = export(ctranslate2("int8"), checkpoint=quantized, calibration=text, out=tmp_path)
    wanted, found = QuantizedWeights.read(quantized), read_ctranslate2(tmp_path / "ctranslate2/model.bin")
    layer, prefix = "decoder/layer_1/self_attention", "model.layers.1.self_attn."
    matrices = {
        f"{layer}/linear_0": [f"{prefix}{part}_proj.weight" for part in "qkv"],
        f"{layer}/linear_1": [f"{prefix}o_proj.weight"],
        "decoder/layer_0/ffn/linear_1": ["model.layers.0.mlp.down_proj.weight"],
        "decoder/embeddings": ["model.embed_tokens.weight"],
        "decoder/projection": ["model.embed_tokens.weight"],
    }
    for variable, names in matrices.items():
        q, scale = found[f"{variable}/weight"], found[f"{variable}/weight_scale"]
        np.testing.assert_array_equal(q, np.concatenate([wanted.q[name].numpy() for name in names]))
        weights = np.concatenate([wanted.dequantize(name).numpy() for name in names])
        np.testing.assert_allclose(q / scale[:, None], weights, rtol=3e-7, atol=0)
    assert metrics["parity_weights_max_abs"] < 1e-4
    assert metrics["parity_mean_abs"] <= metrics["parity_bound"]
    assert Serving.read(tmp_path) == Serving("ctranslate2", "ctranslate2", {"compute_type": "int8"}, "int8", 256, 256)
    assert not (tmp_path / "twin").exists()


@pytest.mark.engine
@pytest.mark.parametrize("family", ["untied", "narrow", "pruned", "qwen2", "gpt2"])
@pytest.mark.parametrize("compute_type", ["float32", "int8"])
def test_families_compute_what_pytorch_computes(family, compute_type, checkpoints, text, tmp_path):
    metrics = export(ctranslate2(compute_type), checkpoint=checkpoints[family], calibration=text, out=tmp_path)
    assert metrics["parity_mean_abs"] <= metrics["parity_bound"]
    assert metrics["parity_weights_max_abs" if compute_type == "int8" else "parity_max_abs"] < 1e-4


@pytest.mark.engine
def test_int8_float32_stores_a_quarter_and_computes_in_float(checkpoints, text, tmp_path):
    sizes, metrics = {}, {}
    for compute_type in ("float32", "int8_float32"):
        out = tmp_path / compute_type
        out.mkdir()
        metrics = export(ctranslate2(compute_type), checkpoint=checkpoints["llama"], calibration=text, out=out)
        sizes[compute_type] = (out / "ctranslate2/model.bin").stat().st_size
    assert sizes["int8_float32"] < sizes["float32"] / 3
    assert metrics["parity_max_abs"] < 1e-4
    served = Serving.read(tmp_path / "int8_float32")
    assert (served.options, served.grid) == ({"compute_type": "float32"}, "int8")


def test_reduced_range_is_chosen_where_the_cpu_would_saturate(monkeypatch):
    for features, grid in ((frozenset({"avx2"}), "int8-reduced"), (frozenset({"avx2", "avx_vnni"}), "int8")):
        monkeypatch.setattr(write, "cpu_features", lambda features=features: features)
        assert write.grid_here(ctranslate2("int8")).name == grid
        assert write.grid_here(ctranslate2("int8", reduce_range=True)).name == "int8-reduced"
        assert write.grid_here(ctranslate2("int8", reduce_range=False)).name == "int8"
        assert write.grid_here(ctranslate2("int8_float32")).name == "int8"


@pytest.mark.engine
def test_reduced_range_uses_63_steps(checkpoints, text, tmp_path):
    export(ctranslate2("int8", reduce_range=True), checkpoint=checkpoints["llama"], calibration=text, out=tmp_path)
    found = read_ctranslate2(tmp_path / "ctranslate2/model.bin")
    assert {int(np.abs(values).max()) for name, values in found.items() if name.endswith("linear_0/weight")} == {63}
    assert Serving.read(tmp_path).grid == "int8-reduced"


@pytest.mark.parametrize(
    ("grids", "compute_type", "reason"),
    [({"": "int4-g32"}, "int8", "CTranslate2 packs int8 and float only"),
     ({"": "int8-g32"}, "int8", "one scale per row"),
     ({"_proj.weight": "int8"}, "int8", "round the float head"),
     ({"": "int8"}, "float32", "full size")],
)  # fmt: skip
def test_grids_that_ctranslate2_does_not_hold(grids, compute_type, reason, checkpoints, text, tmp_path):
    models.quantize(checkpoints["llama"], tmp_path / "q", grids)
    (tmp_path / "out").mkdir()
    with pytest.raises(RecipeError, match=reason):
        export(ctranslate2(compute_type), checkpoint=tmp_path / "q", calibration=text, out=tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.engine
def test_a_float_head_is_kept_by_int8_float32(checkpoints, text, tmp_path):
    models.quantize(checkpoints["untied"], tmp_path / "q", {"_proj.weight": "int8"})
    (tmp_path / "out").mkdir()
    metrics = export(ctranslate2("int8_float32"), checkpoint=tmp_path / "q", calibration=text, out=tmp_path / "out")
    found = read_ctranslate2(tmp_path / "out/ctranslate2/model.bin")
    assert found["decoder/projection/weight"].dtype == np.float32
    assert metrics["parity_max_abs"] < 1e-4


def test_an_architecture_that_ctranslate2_does_not_know(text, tmp_path):
    from transformers import OlmoConfig, OlmoForCausalLM

    tokenizer = _tokenizer()
    tokenizer.save_pretrained(tmp_path / "olmo")
    shape = models.GROUPED | {"vocab_size": len(tokenizer), "pad_token_id": 1}
    OlmoForCausalLM(OlmoConfig(**shape)).save_pretrained(tmp_path / "olmo")
    (tmp_path / "out").mkdir()
    with pytest.raises(RecipeError, match="CTranslate2's converter does not know olmo models; take onnxruntime-genai"):
        export(ctranslate2(), checkpoint=tmp_path / "olmo", calibration=text, out=tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "untied", "pruned"])
def test_vllm_folder_holds_the_integers_and_another_reader_agrees(family, checkpoints, text, tmp_path):
    model = load_reference(checkpoints[family])
    quantized = round_to_nearest(model, GRIDS["int8"], None)
    move_to_grid(model, quantized)
    pack.pack(model, quantized, checkpoints[family], tmp_path, SCHEMES["int8"])
    tensors, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(tensors[name], quantized.q[name])
    assert torch.equal(tensors[f"{name}_scale"], quantized.scales[name])
    embedding = "model.embed_tokens.weight"
    assert torch.equal(tensors[embedding], model.get_input_embeddings().weight)
    assert ("lm_head.weight" in tensors) == (family == "untied")
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]
    ours = Reference.of(model, checkpoints[family], text)
    theirs = Reference.of(load_reference(tmp_path), checkpoints[family], text)  # compressed-tensors' own W8A8
    pairs = [(a, b) for rows in zip(ours.logprobs, theirs.logprobs, strict=True) for a, b in zip(*rows, strict=True)]
    assert 0 < np.mean([abs(a - b) for a, b in pairs]) < 0.05


@pytest.mark.engine
@pytest.mark.parametrize(
    "spec",
    [serving_spec("torch"), serving_spec("vllm"), serving_spec("vllm", compute_type="int8"), ctranslate2("int8")],
    ids=["torch", "vllm", "vllm-int8", "ctranslate2-int8"],
)
def test_a_served_folder_shares_nothing_but_weights_with_its_checkpoint(spec, checkpoints, text, tmp_path, monkeypatch):
    monkeypatch.setattr(Reference, "check", lambda *_: {"parity_max_abs": 0.0})
    monkeypatch.setattr(on_cpus, "widths", tuple)  # its server is not started
    source = checkpoints["llama"]
    before = models.digests(source)
    export(spec, checkpoint=source, calibration=text, out=tmp_path)
    assert models.digests(source) == before
    inodes = {path.stat().st_ino: path.name for path in source.iterdir()}
    shared = {inodes[path.stat().st_ino] for path in tmp_path.rglob("*") if path.stat().st_ino in inodes}
    assert shared <= {"model.safetensors"}
    (tmp_path / "config.json").write_text("{}")
    assert models.digests(source) == before


def test_precisions_that_vllm_and_pytorch_do_not_serve(quantized, checkpoints, text, tmp_path):
    refused = [
        (serving_spec(engine="vllm", compute_type="int8_float32"), checkpoints["llama"], "not int8_float32"),
        (serving_spec(engine="vllm"), quantized, "full size"),
        (serving_spec(engine="torch", compute_type="int8"), checkpoints["llama"], "not int8"),
    ]
    for spec, checkpoint, reason in refused:
        with pytest.raises(RecipeError, match=reason):
            export(spec, checkpoint=checkpoint, calibration=text, out=tmp_path)


@pytest.mark.engine
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_sixteen_bits_are_stored_and_served(checkpoints: dict[str, Path], text: Path, tmp_path: Path, name: str) -> None:
    metrics = export(
        serving_spec(engine="torch", compute_type=name), checkpoint=checkpoints["llama"], calibration=text, out=tmp_path
    )
    assert 0 < metrics["parity_mean_abs"] < 0.02
    stored = load_file(tmp_path / "model.safetensors")
    source = load_file(checkpoints["llama"] / "model.safetensors")
    assert all(torch.equal(stored[key], source[key].to(getattr(torch, name))) for key in source)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == name


@pytest.mark.engine
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_vllm_and_ctranslate2_take_the_same_sixteen_bits(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CTranslate2 computes with these files in float32 on a CPU: then they must give the logits of the rounded weights."""
    for engine in ("torch", "vllm", "ctranslate2"):
        for refusal in ("machine_refusal", "device_refusal"):
            monkeypatch.setattr(type(RUNTIMES[engine]), refusal, lambda *_: None)
    monkeypatch.setattr(Reference, "check", lambda reference, served: {})
    monkeypatch.setattr(on_cpus, "widths", tuple)  # its server is not started
    for engine in ("torch", "vllm", "ctranslate2"):
        (tmp_path / engine).mkdir()
        spec = serving_spec(engine=engine, compute_type=name)
        export(spec, checkpoint=checkpoints["llama"], calibration=text, out=tmp_path / engine)
    monkeypatch.undo()
    same = [(tmp_path / engine / "model.safetensors").read_bytes() for engine in ("torch", "vllm")]
    assert same[0] == same[1]
    assert Serving.read(tmp_path / "vllm").options == {"dtype": name}
    whole = tmp_path / "float32"
    whole.mkdir()
    export(ctranslate2(), checkpoint=checkpoints["llama"], calibration=text, out=whole)
    half, full = ((folder / "ctranslate2" / "model.bin").stat().st_size for folder in (tmp_path / "ctranslate2", whole))
    assert half < 0.55 * full
    assert Serving.read(tmp_path / "ctranslate2").options == {"compute_type": name}
    Serving("ctranslate2", "ctranslate2").write(tmp_path / "ctranslate2")
    Reference.of(load_reference(tmp_path / "torch"), tmp_path / "torch", text).check(tmp_path / "ctranslate2")


def test_weights_beyond_float16_are_refused(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    model = load_reference(checkpoints["untied"])
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    folder, out = tmp_path / "large", tmp_path / "out"
    out.mkdir()
    saving.save_model(model, folder, checkpoints["untied"])
    with pytest.raises(StageError, match="too large for float16; take bfloat16"):
        export(serving_spec(engine="torch", compute_type="float16"), checkpoint=folder, calibration=text, out=out)
    assert not list(out.iterdir())


def test_the_converter_of_ctranslate2_gets_weights_in_main_memory(checkpoints: dict[str, Path], monkeypatch) -> None:
    """Whatever memory they lie in; what is tied stays one tensor. Here main memory is called another, so that all is moved."""
    from featherweight.runtimes.ctranslate2 import pack as converter

    model = load_reference(checkpoints["llama"])
    monkeypatch.setattr(converter, "CPU", "elsewhere")
    shell = converter._shell(model)
    assert all(tensor.device.type == "cpu" for tensor in shell.state_dict().values())
    assert shell.lm_head.weight is shell.model.embed_tokens.weight is not model.lm_head.weight
    assert all(torch.equal(one, other) for one, other in zip(shell.parameters(), model.parameters(), strict=True))
