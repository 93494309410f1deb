"""Folders for vLLM: llm-compressor's own format, our exact weights, and what vLLM makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from featherweight.checkpoint.saving import copy_companions
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import RecipeError, ToolchainError
from featherweight.grid import GRIDS
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.progress import Progress
from featherweight.recipe.refusals import machine_refusal
from featherweight.runtimes.bounds import APPROXIMATED, FP8, HALF, INT8_ACTIVATIONS, Bound
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.interface import Limits
from featherweight.runtimes.parity import Reference, bound_of, load_reference
from featherweight.runtimes.spec import ExportSpec
from featherweight.runtimes.vllm import pack
from featherweight.runtimes.vllm.loaded import VllmModel
from featherweight.runtimes.vllm.runtime import Vllm
from featherweight.runtimes.vllm.schemes import SCHEMES
from featherweight.runtimes.vllm.write import cache_windows
from featherweight.runtimes.writing import Source
from featherweight.store.served_folder import Serving
from featherweight.system.machine import cpu_features, describe, gpus
from tasks.export import export
from tasks.load import load
from tests.conftest import STORY, _tokenizer
from tests.support import serving_models as models
from tests.support.serving_models import serving_spec

LLM_COMPRESSOR = {"int8": "W8A8", "w8a16": "W8A16", "w4a16": "W4A16", "fp8": "FP8_DYNAMIC"}
GRID_OF = {"int8": "int8", "w8a16": "int8", "w4a16": "int4-g32", "fp8": "fp8"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with heads of 32, the narrowest that vLLM takes everywhere."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return models.make("untied", tmp_path_factory.mktemp("models") / "wide", _tokenizer(), **heads)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_text(tmp_path_factory.mktemp("text"), STORY)


def packed(checkpoint: Path, compute_type: str, grid: str, out: Path) -> QuantizedWeights:
    """Weights on a grid by scales that nobody would choose, packed."""
    quantized = models.quantize(checkpoint, out / "quantized", {"_proj.weight": grid})
    (out / "packed").mkdir()
    model = load_reference(out / "quantized")
    pack.pack(model, quantized, checkpoint, out / "packed", SCHEMES[compute_type])
    return quantized


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compute_type", "grid"),
    [("int8", "int8"), ("int8", "int8-reduced"), ("w8a16", "int8"), ("w8a16", "int8-g32"), ("w4a16", "int4"), ("w4a16", "int4-g32"),
     ("fp8", "fp8")],
)  # fmt: skip
def test_compressed_tensors_reads_our_very_weights(compute_type: str, grid: str, checkpoint: Path, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    quantized = packed(checkpoint, compute_type, grid, tmp_path)
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    described = models.quantization_of(tmp_path / "packed")
    scheme = QuantizationScheme(**described["config_groups"]["group_0"])
    reader: Any = BaseCompressor.get_value_from_registry(described["format"])
    for name in quantized.q:
        own = {key.removeprefix(name.removesuffix("weight")): value for key, value in tensors.items() if key.startswith(name)}
        assert torch.equal(reader.decompress(own, scheme)["weight"], quantized.dequantize(name)), name
    assert described["ignore"] == ["lm_head"]
    assert torch.equal(tensors["lm_head.weight"], load_file(checkpoint / "model.safetensors")["lm_head.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("compute_type", LLM_COMPRESSOR)
def test_what_we_packed_loads_as_the_very_same_numbers(compute_type: str, checkpoint: Path, tmp_path: Path) -> None:
    quantized = packed(checkpoint, compute_type, GRID_OF[compute_type], tmp_path)
    copy_companions(checkpoint, tmp_path / "packed")
    (tmp_path / "loaded").mkdir()
    metrics = load(LoadSpec(source=str(tmp_path / "packed")), out=tmp_path / "loaded")
    found = QuantizedWeights.read(tmp_path / "loaded")
    assert found is not None
    assert metrics["quantized_layers"] == len(quantized.q)
    assert found.q.keys() == quantized.q.keys()
    for name, q in quantized.q.items():
        assert torch.equal(found.q[name].view(torch.uint8), q.view(torch.uint8)), name
        assert torch.equal(found.scales[name], quantized.scales[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("compute_type", LLM_COMPRESSOR)
def test_the_format_is_llm_compressors_own(compute_type: str, checkpoint: Path, tmp_path: Path) -> None:
    """The same tensors, shapes and types, and every key that we write with the same value."""
    preset: Any = {"scheme": LLM_COMPRESSOR[compute_type], "targets": "Linear"}
    grid = GRIDS[GRID_OF[compute_type]]
    if compute_type.endswith("a16"):  # its presets are groups of 128, wider than this model
        from featherweight.quantization.oneshot import weights_scheme

        preset = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights_scheme(grid)}}}
    recipe = {"ignore": ["lm_head"], **preset}
    theirs, described = models.llm_compressor(checkpoint, tmp_path / "theirs", recipe, pipeline="datafree")
    packed(checkpoint, compute_type, grid.name, tmp_path)
    ours = load_file(tmp_path / "packed" / "model.safetensors")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in theirs.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in ours.items()
    }
    assert_within(models.quantization_of(tmp_path / "packed"), described)


def assert_within(ours: Any, theirs: Any) -> None:
    """Everything that we say they say too."""
    if isinstance(ours, dict):
        for key, value in ours.items():
            assert key in theirs
            assert_within(value, theirs[key])
    else:
        assert ours == theirs


def test_what_vllm_has_no_place_for_is_refused_before_anything_is_written(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Vllm, "machine_refusal", lambda *_: None)
    narrow = models.make("pruned", tmp_path / "narrow", _tokenizer())
    for name, grids, reason in (
        ("short", {"_proj.weight": "int4-g32"}, "88 columns, and int4-g32 groups of 32"),
        ("mixed", {"down_proj.weight": "int4", "o_proj.weight": "int8", "_proj.weight": "int4"}, "o_proj.weight lies on int8"),
    ):
        models.quantize(narrow, tmp_path / name, grids)
        spec = serving_spec(engine="vllm", compute_type="w4a16")
        (tmp_path / f"{name}-out").mkdir()
        with pytest.raises(RecipeError, match=reason):
            export(spec, checkpoint=tmp_path / name, calibration=text, out=tmp_path / f"{name}-out")
        assert not list((tmp_path / f"{name}-out").iterdir())


@pytest.mark.parametrize(
    "spec",
    [serving_spec(engine="vllm", compute_type="w8a16"), serving_spec(engine="ctranslate2", compute_type="int8_float16"),
     serving_spec(engine="torch", compute_type="nf4")],
    ids=["vllm-w8a16", "ctranslate2-int8_float16", "bitsandbytes"],
)  # fmt: skip
def test_what_only_a_gpu_runs_is_refused_in_one_line(spec: ExportSpec, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ToolchainError, match=r"needs a CUDA GPU") as refused:
        export(spec, checkpoint=checkpoint, calibration=text, out=tmp_path)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.cuda
@pytest.mark.engine
@pytest.mark.parametrize(
    "spec",
    [serving_spec(engine="ctranslate2", compute_type="int8_float16"), serving_spec(engine="torch", compute_type="nf4"),
     serving_spec(engine="torch", compute_type="llm.int8")],
    ids=["ctranslate2-int8_float16", "bitsandbytes-nf4", "bitsandbytes-llm.int8"],
)  # fmt: skip
def test_a_gpu_runs_it(spec: ExportSpec, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    if reason := machine_refusal(spec, describe()):
        pytest.skip(reason)
    export(spec, checkpoint=checkpoint, calibration=text, out=tmp_path)
    reference = Reference.of(load_reference(checkpoint), checkpoint, text)
    assert reference.check(tmp_path, Bound("mean", 0.5))["parity_mean_abs"] > 0


def windows(checkpoint: Path, text: Path) -> list[list[int]]:
    return cache_windows(Source(checkpoint, text, None, 0, Progress()))


@pytest.mark.slow
def test_scales_of_the_cache_are_llm_compressors(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    from torch.utils.data import DataLoader

    ids = windows(checkpoint, text)
    ours = pack.cache_scales(load_reference(checkpoint), ids)
    scheme: Any = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    samples: Any = [{"input_ids": torch.tensor(window)} for window in ids]
    options = {"dataset": DataLoader(samples, batch_size=1), "num_calibration_samples": len(ids)}
    theirs, described = models.llm_compressor(checkpoint, tmp_path / "theirs", {"kv_cache_scheme": scheme}, **options)
    assert len(ours) == 4
    assert ours == pytest.approx({name: theirs[name].item() for name in ours}, rel=1e-5)
    pack.pack(load_reference(checkpoint), None, checkpoint, tmp_path, None, ours)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tensors[name].shape for name in ours} == {name: theirs[name].shape for name in ours}
    assert_within({"kv_cache_scheme": models.quantization_of(tmp_path)["kv_cache_scheme"]}, described)


def test_narrow_heads_have_no_fp8_cache_on_a_cpu(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Vllm, "machine_refusal", lambda *_: None)
    narrow = models.make("llama", tmp_path / "narrow", _tokenizer())
    (tmp_path / "out").mkdir()
    with pytest.raises(RecipeError, match="these are 16 wide"):
        export(serving_spec(engine="vllm", kv_cache="fp8"), checkpoint=narrow, calibration=text, out=tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("options", "grid", "bound"),
    [({"compute_type": "int8"}, "int8", INT8_ACTIVATIONS), ({"compute_type": "fp8"}, "fp8", FP8),
     ({"compute_type": "w4a16", "dtype": "float16"}, "int4", HALF), ({"kv_cache_dtype": "fp8"}, None, FP8),
     ({"compute_type": "w4a16", "dtype": "float16", "kv_cache_dtype": "fp8"}, "int4", FP8), ({"gelu": "erf"}, None, APPROXIMATED)],
)  # fmt: skip
def test_bounds_follow_what_is_rounded_at_run_time(options: dict[str, str], grid: str | None, bound: object) -> None:
    assert bound_of(Serving("vllm", options=options, grid=grid)) == bound


def test_the_server_is_told_what_the_folder_wants(checkpoint: Path) -> None:
    for options, dtype, cache in (({}, "float32", "auto"), ({"dtype": "float16", "kv_cache_dtype": "fp8"}, "float16", "fp8")):
        engine = object.__new__(VllmModel)
        engine.weights = engine.served = checkpoint
        engine.options, engine.limits = options, Limits(threads=1)
        arguments = engine._arguments(8000)
        assert arguments[arguments.index("--dtype") + 1] == dtype
        assert arguments[arguments.index("--kv-cache-dtype") + 1] == cache


@pytest.mark.engine
@pytest.mark.skipif(RUNTIMES["vllm"].missing() is not None, reason="the vLLM toolchain is not installed: run 'make setup'")
@pytest.mark.skipif("avx512f" not in cpu_features() and not gpus(), reason="vLLM's kernels for these want AVX-512 or a GPU")
def test_vllm_serves_4_bit_weights_and_an_fp8_cache(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    models.quantize(checkpoint, tmp_path / "quantized", {"_proj.weight": "int4-g32"})
    (tmp_path / "out").mkdir()
    spec = serving_spec(engine="vllm", compute_type="w4a16", kv_cache="fp8")
    metrics = export(spec, checkpoint=tmp_path / "quantized", calibration=text, out=tmp_path / "out")
    assert 0 < metrics["parity_mean_abs"] < 0.1
