"""Checkpoints that are quantized already: layouts packed here by their definitions, and by llm-compressor itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from featherweight.checkpoint.facts import read_facts
from featherweight.checkpoint.opening import load_model
from featherweight.checkpoint.quantized_formats import rounded_when_run
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import CheckpointError
from featherweight.grid import GRIDS
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.progress import Progress
from featherweight.quantization.spec import QuantizeSpec
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.interface import Grids
from featherweight.runtimes.vllm import pack
from featherweight.runtimes.vllm.schemes import SCHEMES as SCHEMES_OF_VLLM
from featherweight.text.documents import Document, write_documents
from tasks.export import export
from tasks.load import load
from tasks.quantize import quantize
from tests.conftest import STORY
from tests.support.serving_models import llm_compressor, serving_spec

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Notes(Progress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def words(values: np.ndarray, order: tuple[int, ...] | None = None, bits: int = 4) -> np.ndarray:
    """Unsigned integers [n, m] -> int32 [n, m * bits / 32]: value `order[k]` of each run stands at bit k * bits."""
    per = 32 // bits
    runs = values.astype(np.uint64).reshape(values.shape[0], -1, per)
    packed = np.zeros(runs.shape[:2], dtype=np.uint64)
    for place, taken in enumerate(order or range(per)):
        packed |= runs[:, :, taken] << np.uint64(place * bits)
    return packed.astype(np.uint32).view(np.int32)


def stream(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned integers [n, m] -> int32 [n, m * bits / 32], their bits one after another; of 3 bits some lie in two words."""
    single = (values[:, :, None] >> np.arange(bits) & 1).reshape(len(values), -1, 32)
    return (single.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32).view(np.int32)


def gptq(q: np.ndarray, zeros: np.ndarray, bits: int, lead: int) -> dict[str, np.ndarray]:
    """AutoGPTQ: columns run down the words of `qweight`, rows along those of `qzeros`; zero points are stored less `lead`."""
    if bits == 3:
        return {"qweight": stream(q, bits).T, "qzeros": stream((zeros.T - lead) % 8, bits)}
    ones = np.uint32(lead * sum(1 << place for place in range(0, 32, bits)))
    points = (words(zeros.T, bits=bits).view(np.uint32) - ones).view(np.int32)  # word by word, as gptqmodel's conversion does it
    return {"qweight": words(q, bits=bits).T, "qzeros": points}


def awq(q: np.ndarray, zeros: np.ndarray) -> dict[str, np.ndarray]:
    """AutoAWQ, gemm: rows run along the words of both."""
    return {"qweight": words(q.T, AWQ_ORDER), "qzeros": words(zeros.T, AWQ_ORDER)}


def make(
    source: Path,
    out: Path,
    method: str,
    *,
    bits: int = 4,
    asymmetric: bool = False,
    act_order: bool = False,
    lead: int = 1,
    down: int | None = None,
) -> dict[str, Any]:
    """A checkpoint in one of the layouts; returns (unsigned q, zeros, scales, group of each column) by parameter, in numpy.

    down: the bits of the layers called down_proj, where they are others.
    """
    shutil.copytree(source, out)
    tensors, truth = load_file(source / "model.safetensors"), {}
    random, usual = np.random.default_rng(0), bits
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors.pop(name).shape
        groups, bits = columns // GROUP, down if down and "down_proj" in name else usual
        q = random.integers(0, 2**bits, (rows, columns))
        zeros = random.integers(0, 2**bits, (rows, groups)) if asymmetric else np.full((rows, groups), 2 ** (bits - 1))
        scales = (random.random((rows, groups)) * 0.02 / 2**bits * 8 + 0.001).astype(np.float16)
        index = random.permutation(columns) // GROUP if act_order else np.arange(columns) // GROUP
        packed = awq(q, zeros) if method == "awq" else gptq(q, zeros, bits, lead) | {"g_idx": index.astype(np.int32)}
        module = name.removesuffix(".weight")
        packed["scales"] = scales.T
        tensors |= {f"{module}.{part}": torch.from_numpy(np.ascontiguousarray(value)) for part, value in packed.items()}
        truth[name] = (q, zeros, scales, index)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    settings: dict[str, Any] = {"quant_method": method, "bits": usual, "group_size": GROUP}
    settings |= {"version": "gemm", "zero_point": asymmetric} if method == "awq" else {"desc_act": act_order, "sym": not asymmetric}
    settings |= {"format": "gptq_v2"} if method == "gptq" and lead == 0 else {}
    settings |= {"dynamic": {"-:.*lm_head": {}, r"+:.*\.down_": {"bits": down}, r".*\.(down|none)": {"bits": 3}}} if down else {}
    describe(out, settings)
    return truth


def describe(folder: Path, settings: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16", "quantization_config": settings}))


def loaded(source: Path, tmp_path: Path, progress: Progress = Progress()) -> tuple[Path, dict[str, float]]:
    out = tmp_path / "loaded"
    out.mkdir()
    return out, dict(load(LoadSpec(source=str(source)), out=out, progress=progress))


GROUPS = {"g": {"targets": ["Linear"], "weights": {"num_bits": 4}}}
CASES = {
    "gptq": ("gptq", {}, "int4-g32"),
    "gptq-v2": ("gptq", {"lead": 0}, "int4-g32"),
    "gptq-8-bits": ("gptq", {"bits": 8}, "int8-g32"),
    "awq": ("awq", {}, "int4-g32"),
    "gptq-zero-points": ("gptq", {"asymmetric": True}, None),
    "gptq-act-order": ("gptq", {"act_order": True}, None),
    "gptq-2-bits": ("gptq", {"bits": 2}, None),
    "gptq-3-bits": ("gptq", {"bits": 3, "asymmetric": True}, None),
    "gptq-v2-3-bits": ("gptq", {"bits": 3, "lead": 0}, None),
    "awq-zero-points": ("awq", {"asymmetric": True}, None),
}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options", "grid"), CASES.values(), ids=CASES.keys())
def test_every_integer_scale_and_zero_point_is_read(method, options, grid, tiny_checkpoint, tmp_path):
    truth, notes = make(tiny_checkpoint, tmp_path / "source", method, **options), Notes()
    out, metrics = loaded(tmp_path / "source", tmp_path, notes)
    state = load_model(out).state_dict()
    for name, (q, zeros, scales, index) in truth.items():
        expected = (q - zeros[:, index]) * scales.astype(np.float64)[:, index]
        np.testing.assert_array_equal(state[name].numpy(), expected.astype(np.float32))
    found = QuantizedWeights.read(out)
    assert (found and found.grid) == grid
    if found is None:
        assert metrics["dequantized_layers"] == len(truth) == 14 and metrics["quantized_layers"] == 0
        assert "14 of 14 layers become float" in notes.texts[-1]
        return
    assert metrics["quantized_layers"] == 14 and set(found.q) == set(truth)
    for name, (q, zeros, scales, _) in truth.items():
        np.testing.assert_array_equal(found.q[name].numpy(), q - zeros[:, :1])
        np.testing.assert_array_equal(found.scales[name].numpy(), scales.astype(np.float32))
        assert torch.equal(found.dequantize(name), state[name])


def test_layers_that_gptqmodel_packs_otherwise_are_read_by_their_own_bits(tiny_checkpoint, tmp_path):
    truth = make(tiny_checkpoint, tmp_path / "source", "gptq", down=8)
    out, metrics = loaded(tmp_path / "source", tmp_path)
    state, found = load_model(out).state_dict(), QuantizedWeights.read(out)
    assert found is not None and metrics["quantized_layers"] == len(truth)
    for name, (q, zeros, scales, index) in truth.items():
        assert found.grids[name].name == ("int8-g32" if "down_proj" in name else "int4-g32")
        expected = (q - zeros[:, index]) * scales.astype(np.float64)[:, index]
        np.testing.assert_array_equal(state[name].numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_autoround_says_whose_layout_it_packs(method, tiny_checkpoint, tmp_path):
    make(tiny_checkpoint, tmp_path / "source", method)
    plain, _ = loaded(tmp_path / "source", tmp_path)
    (tmp_path / "loaded").rename(tmp_path / "plain")
    said = {"quant_method": "auto-round", "packing_format": f"auto_round:auto_{method}", "bits": 4, "group_size": GROUP}
    describe(tmp_path / "source", said | {"sym": True} | {"extra_config": {"lm_head": {"bits": 16}}})
    facts = read_facts(LoadSpec(source=str(tmp_path / "source")))
    out, metrics = loaded(tmp_path / "source", tmp_path)
    assert facts.quantized == method and metrics["quantized_layers"] == 14 and plain == out
    found, right = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "plain"))
    assert all(torch.equal(found[name], tensor) for name, tensor in right.items())


def test_it_goes_on_to_the_runtimes_that_hold_its_grid_and_to_no_second_rounding(tiny_checkpoint, tmp_path):
    make(tiny_checkpoint, tmp_path / "source", "gptq")
    out, _ = loaded(tmp_path / "source", tmp_path)
    grids = Grids(GRIDS["int4-g32"])
    for spec in (serving_spec("torchao-int4"), serving_spec("onnxruntime-genai", precision="int4")):
        assert RUNTIMES[spec.engine].grid_refusal(grids, spec) is None
    text, served = tmp_path / "text", tmp_path / "served"
    for folder in (text, served, tmp_path / "again"):
        folder.mkdir()
    write_documents(text, [Document("a", STORY)])
    with pytest.raises(CheckpointError, match=r"quantized already .* leave the quantize stage out"):
        quantize(QuantizeSpec.of(sequence=16, samples=2), checkpoint=out, text=text, calibration=text, out=tmp_path / "again")
    export(serving_spec(engine="torch"), checkpoint=out, calibration=text, out=served)  # the baseline: its float values
    assert torch.equal(load_model(served).lm_head.weight, load_model(out).lm_head.weight)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"packed \(bitsandbytes\), and no tensor is \(\*\.SCB"),
     ({"quant_method": "bitsandbytes", "format": "pack_8bit"}, "says neither load_in_4bit nor load_in_8bit"),
     ({"quant_method": "aqlm"}, "the quant_method 'aqlm', and the weights are floats; take it out"),
     ({"quant_method": "auto-round", "packing_format": "auto_round"}, "'auto-round', and the weights are floats"),
     ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4,
       "extra_config": {"a": {"bits": 16}, "lm_head": {"bits": 8}}}, r"in some layers \(extra_config: lm_head\)"),
     ({"quant_method": "awq", "version": "gemv"}, "version 'gemv' are not read here; known: gemm"),
     ({"quant_method": "awq", "format": "gemv"}, "format 'gemv' are not read here; known: gemm"),
     ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "'marlin' are not read"),
     ({"quant_method": "gptq", "format": "gptq_p"}, "the format 'gptq_p' are not read"),
     ({"quant_method": "gptq", "pack_dtype": "int16"}, "packed into int16 are not read here"),
     ({"quant_method": "gptq", "bits": 5}, "gptq weights of 5 bits"),
     ({"quant_method": "gptq", "bits": "4"}, "bits of quantization_config is '4', and must be a whole number"),
     ({"quant_method": "awq", "group_size": None}, "group_size of quantization_config is None"),
     ({"quant_method": "gptq", "dynamic": {"-:lm_head": {}, "+:.*down.*": {"bits": 6}}}, "gptq weights of 6 bits"),
     ({"quant_method": "gptq", "dynamic": {".*down.*": None}}, "must have settings for each pattern"),
     ({"quant_method": "gptq", "bits": 4}, r"packed \(gptq\), and no tensor is .* take quantization_config out"),
     ({"quant_method": "fp8"}, "weight_block_size is None"), ({}, "names no quant_method"), ("gptq", "names no quant_method"),
     ({"quant_method": None}, "names no quant_method"), ({"load_in_8bit": True}, r"packed \(bitsandbytes\), and no tensor is"),
     ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "no config_groups"),
     ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": "four"}}}}, "config_groups.g of"),
     ({"quant_method": "compressed-tensors", "config_groups": GROUPS, "transform_config": {"config_groups": {}}}, "rotated for"),
     ({"quant_method": "compressed-tensors", "config_groups": GROUPS, "sparsity_config": {"format": "sparse-24-bitmask"}},
      "sparsity_config: sparse-24-bitmask"),
     ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}}, "known: pack-quantized")],
)  # fmt: skip
def test_what_is_not_read_is_refused_in_one_line(settings, reason, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "source")
    describe(tmp_path / "source", settings)
    with pytest.raises(CheckpointError, match=reason) as caught:
        loaded(tmp_path / "source", tmp_path)
    assert "\n" not in str(caught.value) and not list((tmp_path / "loaded").iterdir())
    with pytest.raises(CheckpointError, match=reason):
        read_facts(LoadSpec(source=str(tmp_path / "source")))


def test_packed_weights_of_which_config_json_says_nothing_are_refused_in_the_plan(tiny_checkpoint, tmp_path):
    """As AutoGPTQ left them, its settings in a file of their own."""
    make(tiny_checkpoint, tmp_path / "source", "gptq")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "quantization_config"}))
    with pytest.raises(CheckpointError, match=r"qweight is a packed weight, and config\.json has no quantization_config"):
        read_facts(LoadSpec(source=str(tmp_path / "source")))


@pytest.mark.parametrize(
    ("settings", "dropped", "reason"),
    [({"bits": 8}, "none", r"scales has shape \[\d, \d+\], and 8 bits in groups of 32 of \d+ times \d+ ask for"),
     ({"group_size": 64}, "none", r"scales has shape \[\d, \d+\], and 4 bits in groups of 64 of"),
     ({"desc_act": True}, ".g_idx", r"down_proj\.g_idx is missing")],
)  # fmt: skip
def test_settings_of_other_weights_are_told(settings, dropped, reason, tiny_checkpoint, tmp_path):
    make(tiny_checkpoint, tmp_path / "source", "gptq")
    describe(tmp_path / "source", {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True} | settings)
    tensors = load_file(tmp_path / "source/model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(dropped)}
    save_file(kept, tmp_path / "source/model.safetensors", {"format": "pt"})
    refused(tmp_path / "source", tmp_path, reason, in_plan=True)


@pytest.mark.parametrize("form", ["blocks", "bytes", "whole"])
def test_float8_is_what_transformers_reads(form, tiny_checkpoint, tmp_path):
    """As DeepSeek and Qwen, MXFP8 and Mistral publish it; without a GPU transformers makes floats of it, too."""
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        scales = torch.rand(()) + 0.5 if form == "whole" else torch.rand(-(-rows // 32), -(-columns // 32)) + 0.5
        tensors[f"{name}_scale_inv"] = (scales * 8 + 120).to(torch.uint8) if form == "bytes" else scales
        tensors |= {f"{name.removesuffix('.weight')}.activation_scale": torch.rand(())} if form == "whole" else {}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    fp8 = {"quant_method": "fp8", "weight_block_size": None if form == "whole" else [32, 32], "fmt": "e4m3"}
    describe(source, fp8 | {"modules_to_not_convert": ["lm_head"], "activation_scheme": "static" if form == "whole" else "dynamic"})
    assert read_facts(LoadSpec(source=str(source))).quantized == "fp8"
    out, metrics = loaded(source, tmp_path)
    assert (metrics["quantized_layers"], metrics["dequantized_layers"]) == (0, 14)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in load_model(out).state_dict().items())


def bitsandbytes_4bit(weight: torch.Tensor, twice: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A weight in NF4 as bitsandbytes lays it out, its scales quantized once more where `twice`, and what it stands for."""
    count, dice = weight.numel(), torch.Generator().manual_seed(weight.numel())
    places = torch.randint(0, 16, (count,), generator=dice)
    map_, outer_map = torch.linspace(-1, 1, 16) ** 3, torch.linspace(-1, 1, 256)
    told: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    scales = torch.rand(-(-count // 64), generator=dice) + 0.5
    parts = {"": (places[::2] << 4 | places[1::2]).to(torch.uint8)[:, None], ".absmax": scales, ".quant_map": map_}
    if twice:
        absmax = torch.randint(0, 256, scales.shape, generator=dice).to(torch.uint8)
        outer = torch.rand(-(-len(scales) // 256), generator=dice) + 0.5
        told |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        parts |= {".absmax": absmax, ".nested_absmax": outer, ".nested_quant_map": outer_map}
        scales = outer_map[absmax.long()] * outer.repeat_interleave(256)[: len(scales)] + 0.25
    parts[".quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
    return parts, (map_[places] * scales.repeat_interleave(64)[:count]).reshape(weight.shape)


@pytest.mark.parametrize("twice", [False, True])
def test_bitsandbytes_of_4_bits_become_the_floats_that_they_stand_for(twice, tiny_checkpoint, tmp_path):
    source, truth = Path(shutil.copytree(tiny_checkpoint, tmp_path / "source")), {}
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        parts, truth[name] = bitsandbytes_4bit(tensors.pop(name), twice)
        tensors |= {f"{name}{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    describe(source, {"quant_method": "bitsandbytes", "_load_in_4bit": True, "bnb_4bit_use_double_quant": twice})
    assert read_facts(LoadSpec(source=str(source))).quantized == "bitsandbytes"
    out, metrics = loaded(source, tmp_path)
    assert (metrics["quantized_layers"], metrics["dequantized_layers"]) == (0, len(truth))
    found = load_file(out / "model.safetensors")
    assert found.keys() == load_file(tiny_checkpoint / "model.safetensors").keys()
    assert all(torch.equal(found[name], weight) for name, weight in truth.items())


def test_bitsandbytes_of_8_bits_keep_their_integers(tiny_checkpoint, tmp_path):
    source, truth = Path(shutil.copytree(tiny_checkpoint, tmp_path / "source")), {}
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight, module = tensors[name], name.removesuffix(".weight")
        largest = weight.abs().amax(1).float()
        truth[name] = (weight.float() * 127 / largest[:, None]).round()
        tensors |= {name: truth[name].to(torch.int8), f"{module}.SCB": largest, f"{module}.weight_format": torch.tensor(0).byte()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    describe(source, {"load_in_8bit": True, "llm_int8_threshold": 6.0})
    out, metrics = loaded(source, tmp_path)
    kept = QuantizedWeights.read(out)
    assert metrics["quantized_layers"] == len(truth) and kept is not None and kept.grid == "int8"
    for name, q in truth.items():
        assert torch.equal(kept.q[name].float(), q)
        assert torch.allclose(kept.dequantize(name), q * tensors[f"{name.removesuffix('.weight')}.SCB"][:, None] / 127)


def test_bitsandbytes_in_the_order_of_a_gpus_tiles_are_refused(tiny_checkpoint, tmp_path):
    """They were read as rows."""
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    module = {"weight": (weight * 100).to(torch.int8), "SCB": torch.ones(len(weight)), "weight_format": torch.tensor(2).byte()}
    tensors |= {f"model.layers.0.mlp.up_proj.{part}": tensor for part, tensor in module.items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    describe(source, {"load_in_8bit": True})
    refused(source, tmp_path, r"up_proj\.weight_format is 2, an order that bitsandbytes reads no more", in_plan=False)


def test_a_missing_part_is_named(tiny_checkpoint, tmp_path):
    make(tiny_checkpoint, tmp_path / "source", "gptq")
    tensors = load_file(tmp_path / "source/model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, tmp_path / "source/model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.qweight is packed \(gptq\), and the scale of its numbers is missing"):
        read_facts(LoadSpec(source=str(tmp_path / "source")))
    with pytest.raises(CheckpointError, match=r"up_proj\.qweight is packed \(gptq\), and the scale of its numbers is missing"):
        loaded(tmp_path / "source", tmp_path)


def in_rows_of_8_bits(source: Path, out: Path, changed: dict[str, Any], dropped: str = "none") -> Path:
    """The checkpoint as compressed-tensors stores integers of 8 bits with a scale for each row, its settings changed."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        scales = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors |= {name: (tensors[name] / scales).round().to(torch.int8), f"{name}_scale": scales}
    save_file(
        {name: one for name, one in tensors.items() if not name.endswith(dropped)}, out / "model.safetensors", {"format": "pt"}
    )
    told = scheme(8, "int", "channel", activations=False)
    group = told | {"weights": told["weights"] | changed}
    describe(out, {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}})
    return out


def test_integers_without_a_scale_are_no_weights(tiny_checkpoint, tmp_path):
    """They were served as they are, a layer of numbers up to 127, and nothing was said."""
    source = in_rows_of_8_bits(tiny_checkpoint, tmp_path / "source", {}, "layers.1.mlp.up_proj.weight_scale")
    for read in (lambda: read_facts(LoadSpec(source=str(source))), lambda: loaded(source, tmp_path)):
        with pytest.raises(CheckpointError, match=r"up_proj\.weight is packed \(compressed-tensors\), and the scale of its"):
            read()


def refused(source: Path, tmp_path: Path, reason: str, *, in_plan: bool) -> None:
    """At load, and where headers tell it in the plan."""
    with pytest.raises(CheckpointError, match=reason) as caught:
        loaded(source, tmp_path)
    assert "\n" not in str(caught.value)
    if in_plan:
        with pytest.raises(CheckpointError, match=reason):
            read_facts(LoadSpec(source=str(source)))


def without(part: str, **new: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """A change of tensors: the up projection's `part` left out, others in its place."""
    module = "model.layers.1.mlp.up_proj"
    return lambda tensors: (
        {name: one for name, one in tensors.items() if name != f"{module}.{part}"}
        | {f"{module}.{name}": one for name, one in new.items()}
    )


DAMAGED = {
    "awq-no-zeros": ("awq", without("qzeros"), True, r"up_proj\.qweight is packed \(awq\), and its zero points \(qzeros\) are m"),
    "gptq-no-zeros": ("gptq", without("qzeros"), True, r"up_proj\.qweight is packed \(gptq\), and its zero points \(qzeros\) are"),
    "awq-other-zeros": (
        *("awq", without("qzeros", qzeros=torch.zeros(2, 32, dtype=torch.int16)), True),
        r"up_proj\.qzeros has shape \[2, 32\], and 4 bits in groups of 32 of 128 times 64 ask for \[2, 16\]",
    ),
    "gptq-one-group-of-zeros": (
        *("gptq", without("qzeros", qzeros=torch.zeros(1, 16, dtype=torch.int32)), True),
        r"up_proj\.qzeros has shape \[1, 16\], and 4 bits in groups of 32 of 128 times 64 ask for \[2, 16\]",
    ),
    "gptq-narrower": (
        *("gptq", without("qweight", qweight=torch.zeros(8, 120, dtype=torch.int32)), True),
        r"up_proj\.scales has shape \[2, 128\], and 4 bits in groups of 32 of 120 times 64 ask for \[2, 120\]",
    ),
    "gptq-fewer-columns": (
        *("gptq", without("g_idx", g_idx=torch.zeros(63, dtype=torch.int32)), True),
        r"up_proj\.g_idx has shape \[63\]",
    ),
    "awq-another-matrix": (
        *(
            "awq",
            without(
                "qweight",
                qweight=torch.zeros(64, 15, dtype=torch.int32),
                qzeros=torch.zeros(2, 15, dtype=torch.int32),
                scales=torch.ones(2, 120, dtype=torch.float16),
            ),
            True,
        ),
        r"tensor model\.layers\.1\.mlp\.up_proj\.weight has shape \[120, 64\], but config\.json asks for \[128, 64\]",
    ),
    "awq-scaled-activations": (
        *("awq", without("none", **{"act_fn.scales": torch.ones(128)}), True),
        r"act_fn\.scales scales no weight but what a module makes \(awq\)",
    ),
    "gptq-group-below-0": (
        *("gptq", without("g_idx", g_idx=torch.tensor([-1] + [0] * 31 + [1] * 32, dtype=torch.int32)), False),
        r"up_proj\.g_idx has the group -1",
    ),
}


@pytest.mark.parametrize(("method", "change", "in_plan", "reason"), DAMAGED.values(), ids=DAMAGED.keys())
def test_zero_points_are_those_of_the_scales(method, change, in_plan, reason, tiny_checkpoint, tmp_path):
    """An AWQ layer that had lost them was served as if it were symmetric, one of other groups with whichever torch took."""
    make(tiny_checkpoint, tmp_path / "source", method, asymmetric=True)
    save_file(change(load_file(tmp_path / "source/model.safetensors")), tmp_path / "source/model.safetensors", {"format": "pt"})
    refused(tmp_path / "source", tmp_path, reason, in_plan=in_plan)


def test_the_scale_of_another_method_is_none(tiny_checkpoint, tmp_path):
    """float8 whose scale stood under compressed-tensors' name was served without it, up to 448."""
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale" if "1.mlp.up_proj" in name else f"{name}_scale_inv"] = torch.ones(())
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    describe(source, {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "dynamic"})
    refused(source, tmp_path, r"up_proj\.weight is packed \(fp8\), and the scale of its numbers is missing", in_plan=True)


def test_groups_that_the_scales_are_not_of_are_told(tiny_checkpoint, tmp_path):
    source = in_rows_of_8_bits(tiny_checkpoint, tmp_path / "source", {"strategy": "group", "group_size": 32})
    reason = r"weight_scale has shape \[\d+, 1\], and settings of one scale a group of \[\d+, \d+\] ask for"
    refused(source, tmp_path, reason, in_plan=True)


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_zero_points_of_the_other_format_of_gptq_are_told(lead, asymmetric, tiny_checkpoint, tmp_path):
    """Each weight was a step off zero, and nothing was said."""
    make(tiny_checkpoint, tmp_path / "source", "gptq", lead=lead)
    path = tmp_path / "source/model.safetensors"
    tensors, random = load_file(path), np.random.default_rng(0)
    for name in [name for name in tensors if asymmetric and name.endswith(".qzeros")]:
        groups, wide = tensors[name].shape[0], tensors[name].shape[1] * 8
        points = random.integers(5, 11, (wide, groups))
        columns = len(tensors[name.replace("qzeros", "g_idx")])
        q = (random.normal(0, 2, (wide, columns)).round() + points[:, np.arange(columns) // GROUP]).clip(0, 15)
        packed = gptq(q.astype(np.int64), points, 4, lead)
        tensors |= {name.replace("qzeros", part): torch.from_numpy(value.copy()) for part, value in packed.items()}
    save_file(tensors, path, {"format": "pt"})
    settings = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": not asymmetric}
    for said in ("gptq", "gptq_v2"):
        describe(tmp_path / "source", settings | {"checkpoint_format": said})
        if said == ("gptq" if lead else "gptq_v2"):
            loaded(tmp_path / "source", tmp_path)
            shutil.rmtree(tmp_path / "loaded")
        else:
            right = "gptq" if lead else "gptq_v2"
            refused(tmp_path / "source", tmp_path, rf"one step off zero, .* say checkpoint_format: {right} there", in_plan=False)
            shutil.rmtree(tmp_path / "loaded")


# compressed-tensors, written by llm-compressor


def scheme(bits: int, kind: str, strategy: str, activations: bool, symmetric: bool = True) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "dynamic": False}
    weights |= {"group": {"group_size": GROUP}, "block": {"block_structure": [16, 16]}}.get(strategy, {})
    dynamic = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    return {"targets": ["Linear"], "weights": weights} | ({"input_activations": dynamic} if activations else {})


SCHEMES = {
    "w4a16": (scheme(4, "int", "group", False), "int4-g32"),
    "w4a16-per-row": (scheme(4, "int", "channel", False), "int4"),
    "w8a16": (scheme(8, "int", "channel", False), "int8-full"),
    "w8a8": (scheme(8, "int", "channel", True), "int8-full"),
    "w8a8-one-scale": (scheme(8, "int", "tensor", True), "int8-full"),
    "w4a16-zero-points": (scheme(4, "int", "group", False, symmetric=False), None),
    "fp8": (scheme(8, "float", "channel", True), "fp8"),
    "fp8-one-scale": (scheme(8, "float", "tensor", True), "fp8"),
    "fp8-weights-only": (scheme(8, "float", "channel", False), "fp8"),
    "fp8-blocks": (scheme(8, "float", "block", False), None),
}


def written_by_llm_compressor(source: Path, out: Path, recipe: dict[str, Any]) -> None:
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("model*"))
    llm_compressor(source, out, {"ignore": ["lm_head"], **recipe})


@pytest.mark.slow
@pytest.mark.parametrize(("described", "grid"), SCHEMES.values(), ids=SCHEMES.keys())
def test_compressed_tensors_are_read_as_the_library_reads_them(described, grid, tiny_checkpoint, tmp_path):
    from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer

    written_by_llm_compressor(tiny_checkpoint, tmp_path / "source", {"config_groups": {"group_0": described}})
    notes = Notes()
    out, metrics = loaded(tmp_path / "source", tmp_path, notes)
    said = any(note.startswith("activations are to be rounded when the model runs") for note in notes.texts)
    assert said == (described.get("input_activations") is not None)
    reader = CompressedTensorsDequantizer(str(tmp_path / "source"), ["re:.*embed.*", "re:.*norm.*"], dtype=torch.float32)
    expected = reader.process(load_file(tmp_path / "source/model.safetensors"))
    state, found = load_file(out / "model.safetensors"), QuantizedWeights.read(out)
    assert set(state) == set(expected) and all(torch.equal(state[name].float(), expected[name].float()) for name in expected)
    assert (found and found.grid) == grid
    assert metrics["quantized_layers" if grid else "dequantized_layers"] == 14
    assert found is None or all(torch.equal(found.dequantize(name), expected[name]) for name in found.q)


def test_what_is_to_be_rounded_when_the_model_runs_is_said(tiny_checkpoint, tmp_path):
    described, notes = scheme(8, "int", "channel", activations=True), Notes()
    recipe = {"config_groups": {"group_0": described}, "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    assert rounded_when_run(recipe) == ["activations", "keys and values"]
    assert rounded_when_run({"config_groups": {"group_0": {**described, "input_activations": None}}}) == []
    make(tiny_checkpoint, tmp_path / "source", "gptq")
    loaded(tmp_path / "source", tmp_path, notes)
    assert not any("are to be rounded" in note for note in notes.texts)


@pytest.mark.slow
def test_a_module_that_a_pattern_names_is_read_by_its_own_group_and_not_by_that_of_its_class(tiny_checkpoint, tmp_path):
    groups = {
        "group_0": scheme(4, "int", "group", False),
        "group_1": scheme(8, "int", "channel", False) | {"targets": ["re:.*down_proj$"]},
    }
    written_by_llm_compressor(tiny_checkpoint, tmp_path / "source", {"config_groups": groups})
    out, _ = loaded(tmp_path / "source", tmp_path)
    found, weights = QuantizedWeights.read(out), load_file(tiny_checkpoint / "model.safetensors")
    assert found is not None
    for name, grid in found.grids.items():
        assert grid.bits == (8 if "down_proj" in name else 4), name
        rounded = (found.dequantize(name) - weights[name].float()).abs().max() / weights[name].float().abs().max()
        assert rounded < (0.01 if "down_proj" in name else 0.15), name


FP8: dict[str, dict[str, Any]] = {
    "FP8_DYNAMIC": {"scheme": "FP8_DYNAMIC", "targets": "Linear"},
    "one scale": {"config_groups": {"group_0": scheme(8, "float", "tensor", True)}},
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", FP8.values(), ids=FP8.keys())
def test_fp8_weights_go_on_to_vllm_bit_for_bit(recipe, tiny_checkpoint, tmp_path):
    written_by_llm_compressor(tiny_checkpoint, tmp_path / "source", recipe)
    out, _ = loaded(tmp_path / "source", tmp_path)
    found = QuantizedWeights.read(out)
    assert found and set(found.grids.values()) == {GRIDS["fp8"]}
    (tmp_path / "again").mkdir()
    pack.pack(load_model(out), found, out, tmp_path / "again", SCHEMES_OF_VLLM["fp8"])
    theirs, again = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "again"))
    for name in found.q:
        assert torch.equal(again[name].view(torch.uint8), theirs[name].view(torch.uint8)), name
        scale = theirs[f"{name}_scale"].float()
        assert torch.equal(again[f"{name}_scale"], scale.reshape(-1, 1).expand(len(found.q[name]), 1)), name


def test_a_head_beside_packed_weights_is_its_own_whatever_config_json_says(tiny_checkpoint, tmp_path):
    """transformers takes what the file holds; engines that go by config.json took the embedding."""
    make(tiny_checkpoint, tmp_path / "source", "awq")
    path = tmp_path / "source/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    tensors = load_file(tmp_path / "source/model.safetensors")
    tensors["lm_head.weight"] = torch.randn(tensors["model.embed_tokens.weight"].shape) * 0.02
    save_file(tensors, tmp_path / "source/model.safetensors", {"format": "pt"})
    out, metrics = loaded(tmp_path / "source", tmp_path)
    assert metrics["head_settled"] == 1 and json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_model(out).lm_head.weight, tensors["lm_head.weight"])


def in_an_order(source: Path, out: Path, dropped: str = "none", symmetric: bool = True) -> dict[str, torch.Tensor]:
    """4 bits of compressed-tensors whose columns are in groups by their activations, as it wrote them up to 0.18; the weights."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    shutil.copytree(source, out)
    tensors, truth, dice = load_file(out / "model.safetensors"), {}, torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors.pop(name).shape
        q = torch.randint(-8, 8, (rows, columns), generator=dice, dtype=torch.int8)
        scales = torch.rand(rows, columns // GROUP, generator=dice) * 0.01 + 0.001
        index = torch.randperm(columns, generator=dice) // GROUP
        module = name.removesuffix(".weight")
        parts = {"weight_packed": pack_to_int32(q, 4), "weight_scale": scales, "weight_g_idx": index.to(torch.int32)}
        tensors |= {f"{module}.{part}": one for part, one in parts.items() if part != dropped}
        tensors[f"{module}.weight_shape"] = torch.tensor([rows, columns])
        truth[name] = q.float() * scales[:, index]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    told = scheme(4, "int", "group", activations=False, symmetric=symmetric)
    group = told | {"weights": told["weights"] | ({"actorder": "group"} if symmetric else {})}
    describe(out, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}})
    return truth


def test_columns_in_an_order_of_their_own_are_read_though_the_library_knows_none(tiny_checkpoint, tmp_path):
    truth = in_an_order(tiny_checkpoint, tmp_path / "source")
    assert read_facts(LoadSpec(source=str(tmp_path / "source"))).grids == {}
    out, metrics = loaded(tmp_path / "source", tmp_path)
    state = load_model(out).state_dict()
    assert metrics["dequantized_layers"] == len(truth) and all(torch.equal(state[name], one) for name, one in truth.items())


@pytest.mark.parametrize(("dropped", "symmetric"), [("weight_g_idx", True), ("none", False)])
def test_an_order_or_zero_points_that_are_lost_are_told_in_the_plan(dropped, symmetric, tiny_checkpoint, tmp_path):
    """They were read as if there had been none."""
    in_an_order(tiny_checkpoint, tmp_path / "source", dropped, symmetric)
    lost = "weight_g_idx" if symmetric else "weight_zero_point"
    refused(tmp_path / "source", tmp_path, rf"_proj\.{lost} is missing, which the settings ask for", in_plan=True)
