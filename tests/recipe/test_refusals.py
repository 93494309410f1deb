"""Combinations of quantize and serve: what is impossible or useless is refused with its reason, all else is let through."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from featherweight.grid import GRIDS
from featherweight.model.parent import Parent
from featherweight.quantization.spec import QuantizeSpec
from featherweight.recipe.refusals import Chosen, machine_refusal, refusal
from featherweight.runtimes.spec import CompileSpec, ExportSpec
from featherweight.runtimes.torch import runtime
from featherweight.system.machine import Gpu, Machine
from tests.support.paths import ROOT
from tests.support.serving_models import serving_spec

METHODS = ROOT / "docs" / "methods.md"


def serve(text: str) -> CompileSpec | ExportSpec:
    """'ENGINE' or 'ENGINE PRECISION' as a spec."""
    engine, _, precision = text.partition(" ")
    compiled = engine in ("onnxruntime-genai", "torch-compile")
    key = "precision" if compiled else "compute_type"
    return (CompileSpec if compiled else ExportSpec).model_validate({"engine": engine, **({key: precision} if precision else {})})


def machine(features: Collection[str] = (), gpus: tuple[Gpu, ...] = ()) -> Machine:
    """A machine with these CPU features and GPUs."""
    return Machine("Linux", "x86_64", "some", frozenset(features), 2, 2, 2**33, gpus)


@pytest.mark.parametrize(
    "engine",
    ["onnxruntime-genai", "onnxruntime-genai int8", "onnxruntime-genai int4", "torch-compile", "torch", "ctranslate2",
     "ctranslate2 int8", "ctranslate2 int8_float32", "vllm", "vllm int8", "torch-dynamic", "torch-static", "torchao-int8",
     "torchao-int4", "torchao-int8-dynamic"],
)  # fmt: skip
def test_float_weights_are_served_by_every_engine(engine):
    assert refusal(None, serve(engine)) is None


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ("torch-compile int8", "torch.compile serves float32, bfloat16, float16 here, not int8"),
        ("torch int8", "not int8"),
        ("vllm int8_float32", "vllm serves float32, bfloat16, float16, int8, w8a16, w4a16, fp8, not int8_float32"),
        ("ctranslate2 fp8", "not fp8"),
        ("vllm nf4", "not nf4"),
    ],
)
def test_precisions_that_an_engine_does_not_have(engine, reason):
    assert reason in refusal(None, serve(engine))


@pytest.mark.parametrize(
    ("grid", "head", "engine"),
    [("int8", "int8", "onnxruntime-genai int8"), ("int4-g32", "int8", "onnxruntime-genai int4"),
     ("int4-g128", None, "onnxruntime-genai int4"), ("int8-g32", "int8", "onnxruntime-genai int8"),
     ("int8", "int8", "ctranslate2 int8"), ("int8-reduced", "int8-reduced", "ctranslate2 int8"),
     ("int8", "int8", "torch-dynamic"), ("int8-reduced", None, "torch-static"), ("int8", "int8", "torchao-int8-dynamic"),
     ("int8-g32", "int4-g32", "torchao-int8"), ("int4", "int8", "torchao-int4"), ("int4-g128", None, "torchao-int4"),
     ("int2-g128", "int8", "onnxruntime-genai int2"), ("int2-g64", "int2-g64", "onnxruntime-genai int2"),
     ("int8", None, "ctranslate2 int8_float32"), ("int8", "int8", "vllm int8"), ("int8", None, "vllm int8"),
     ("int8", "int8", "ctranslate2 int8_float16"), ("int8", None, "vllm w8a16"), ("int8-g128", None, "vllm w8a16"),
     ("int4-g32", "int8", "vllm w4a16"), ("int4", None, "vllm w4a16"), ("fp8", "fp8", "vllm fp8")],
)  # fmt: skip
def test_grids_that_an_engine_holds(grid, head, engine):
    assert refusal(QuantizeSpec.of(grid=grid, head=head), serve(engine)) is None


@pytest.mark.parametrize(
    ("grid", "head", "engine", "reason"),
    [("int4-g32", "int4-g32", "ctranslate2 int8", "CTranslate2 packs int8 and float only"),
     ("int8", "int4-g32", "ctranslate2 int8", "CTranslate2 packs int8 and float only"),
     ("int8-g32", "int8", "ctranslate2 int8", "one scale per row"),
     ("int8", None, "ctranslate2 int8", "quantize the head too"),
     ("int4-g32", "int8", "onnxruntime-genai int8", "4-bit grid"),
     ("int8", "int8", "onnxruntime-genai int4", "8-bit grid"),
     ("int4-g32", "int8", "torch-dynamic", "take another engine"), ("int4", "int8", "torchao-int8", "round the 4-bit grid again"),
     ("int8", "int8", "torchao-int4", "take another engine"), ("int8-g32", "int8", "torch-static", "not int8-g32; take another"),
     ("int8", "int4-g32", "torchao-int8-dynamic", "one scale per row"),
     ("int4-g32", "int8", "vllm int8", "compressed-tensors W8A8 holds 8-bit integer weights with one scale per row, not int4-g32"),
     ("fp8", None, "vllm int8", "not fp8"), ("int8", None, "vllm fp8", "8-bit float weights with one scale per row, not int8"),
     ("int8", None, "vllm w4a16", "4-bit integer weights with one scale per row or group, not int8"),
     ("int4-g32", None, "vllm w8a16", "not int4-g32"), ("fp8", "fp8", "ctranslate2 int8", "CTranslate2 packs int8 and float only"),
     ("int8", None, "ctranslate2 int8_float16", "quantize the head too"),
     ("fp8", "fp8", "onnxruntime-genai int8", "not fp8"), ("fp8", "fp8", "torchao-int8", "not fp8"),
     ("int2-g64", "int8", "onnxruntime-genai int4", "2-bit grid"),
     ("int8", "int2-g64", "onnxruntime-genai int8", "take head: int8"),
     ("int8", "int2-g64", "torchao-int8", "no product of 2-bit integers (int2-g64)"),
     ("int8", "int8", "torch nf4", "give it float ones")],
)  # fmt: skip
def test_grids_that_an_engine_does_not_hold(grid, head, engine, reason):
    assert reason in refusal(QuantizeSpec.of(method="gptq", grid=grid, head=head), serve(engine))


@pytest.mark.parametrize("engine", ["ctranslate2", "llama.cpp", "vllm", "torch", "torchao-int4", "torch-compile"])
def test_engines_without_a_product_of_two_bits_name_the_one_that_has_it(engine):
    asked = Chosen(
        "text-generation", None, None, QuantizeSpec.of(method="qat", grid="int2-g128"), serve(engine), machine({"avx512bw"})
    )
    assert asked.obstacle() == (
        f"qat-int2-g128 + {engine}: it has no product of 2-bit integers (int2-g128); take onnxruntime-genai"
    )


def test_two_bits_need_the_kernel_and_a_method_that_chose_them():
    asked = serve("onnxruntime-genai int2")
    assert "take int4" in machine_refusal(asked, machine({"avx2"}))
    assert machine_refusal(asked, machine({"avx512f", "avx512bw"})) is None
    assert "{method: qat, grid: int2-g128, head: int8}" in refusal(None, asked)


@pytest.mark.parametrize("engine", ["onnxruntime-genai", "torch-compile", "torch", "ctranslate2", "vllm"])
def test_float32_of_rounded_weights_is_a_useless_duplicate(engine):
    assert "no smaller and no faster" in refusal(QuantizeSpec.of(), serve(engine))


@pytest.mark.parametrize("engine", ["torch", "ctranslate2", "vllm"])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_sixteen_bits_are_for_float_weights(engine, name):
    assert refusal(None, serve(f"{engine} {name}")) is None
    assert f"{name} would store rounded weights" in refusal(QuantizeSpec.of(), serve(f"{engine} {name}"))


CUDA = ["ctranslate2 int8_float16", "ctranslate2 float16", "ctranslate2 bfloat16", "vllm w8a16", "torch nf4", "torch llm.int8"]


@pytest.mark.parametrize(
    ("engine", "features", "reason"),
    [*((engine, {"avx2", "avx512f"}, "needs a CUDA GPU") for engine in CUDA),
     ("vllm w4a16", {"avx2"}, "CUDA GPU or a CPU with AVX-512"), ("vllm w4a16", {"avx2", "avx512f"}, None),
     ("vllm int8", {"avx2"}, None), ("vllm fp8", {"avx2"}, None), ("ctranslate2 int8", {"avx2"}, None)],
)  # fmt: skip
def test_what_a_machine_has_no_kernel_for(engine, features, reason, monkeypatch):
    found = machine_refusal(serve(engine), machine(features))
    assert found is None if reason is None else reason in found
    monkeypatch.setattr(runtime, "find_spec", lambda name: name)
    assert machine_refusal(serve(engine), machine(gpus=(Gpu("some", 2**34),))) is None


def test_bitsandbytes_is_asked_for_where_there_is_a_gpu(monkeypatch):
    accelerated = machine(gpus=(Gpu("some", 2**34),))
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    assert "pip install bitsandbytes" in machine_refusal(serve("torch nf4"), accelerated)
    assert machine_refusal(serve("vllm w8a16"), accelerated) is None


def test_an_fp8_cache_is_vllms_and_wants_wide_registers():
    spec = serving_spec(engine="vllm", kv_cache="fp8")
    for features, refused in (({"avx2"}, True), ({"avx2", "avx512f"}, False)):
        assert ("leave kv_cache out" in (machine_refusal(spec, machine(features)) or "")) == refused
    assert refusal(None, spec) is None
    assert "ctranslate2 keeps keys and values in float" in refusal(None, serving_spec("ctranslate2", kv_cache="fp8"))


def test_w8a8_is_what_int8_means_to_vllm():
    assert ExportSpec.model_validate({"engine": "vllm", "compute_type": "w8a8"}) == serve("vllm int8")


def test_the_reason_names_the_combination():
    reason = refusal(QuantizeSpec.of(method="gptq", grid="int4-g32"), serve("ctranslate2 int8"))
    assert reason == "gptq-int4-g32 + ctranslate2: CTranslate2 packs int8 and float only"


def test_an_explicit_reduced_range_does_not_round_again():
    spec = serving_spec(engine="ctranslate2", compute_type="int8", reduce_range=True)
    assert "second rounding" in refusal(QuantizeSpec.of(grid="int8"), spec)
    assert refusal(QuantizeSpec.of(grid="int8-reduced", head="int8-reduced"), spec) is None


def test_every_grid_has_an_engine():
    engines = [*(serve(f"onnxruntime-genai int{bits}") for bits in (2, 4, 8)), serve("vllm fp8")]
    for name in GRIDS:
        assert any(refusal(QuantizeSpec.of(grid=name, head=name), engine) is None for engine in engines), name


@pytest.mark.parametrize(
    ("row", "engine"),
    [("W8A8", "vllm int8"), ("W8A16", "vllm w8a16"), ("W4A16", "vllm w4a16"), ("FP8", "vllm fp8"),
     ("int8_float16", "ctranslate2 int8_float16"), ("dynamic int8", "torch-dynamic"), ("static int8", "torch-static"),
     ("int8 dynamic", "torchao-int8-dynamic")],
)  # fmt: skip
def test_the_docs_name_the_grids_that_a_format_holds(row, engine):
    (line,) = [line for line in METHODS.read_text().splitlines() if line.startswith(f"| {row} |")]
    told = [name for name in GRIDS if f"`{name}`" in line.split(" | ")[4]]
    assert told == [name for name in GRIDS if refusal(QuantizeSpec.of(grid=name, head=name), serve(engine)) is None]


def test_torchao_holds_mixed_precision_where_it_is_weight_only():
    mixed = QuantizeSpec.of(grid="int4-g32", mixed={"grid": "int8"})
    assert refusal(mixed, serve("torchao-int4")) is None
    assert "round the 4-bit grid again" in refusal(mixed, serve("torch-dynamic"))


@pytest.mark.parametrize(
    ("task", "model_type", "options", "reason"),
    [("text-generation", "gptj", {"method": "smoothquant"}, None), ("fill-mask", None, {"method": "gptq", "smooth": "awq"}, None),
     ("fill-mask", None, {"method": "smoothquant"}, "the norms of every encoder known here feed the residual too"),
     ("fill-mask", "bert", {"method": "gptq", "smooth": "smoothquant"}, "the norms of a 'bert' model feed the residual too"),
     ("text2text-generation", None, {"method": "smoothquant"}, None), ("fill-mask", "bert", {"method": "awq"}, None),
     ("text2text-generation", "t5", {"method": "rtn", "smooth": "smoothquant"}, None),
     ("text2text-generation", "bart", {"method": "rtn", "smooth": "smoothquant"}, "take awq or gptq"),
     ("text2text-generation", "led", {"method": "qat", "start": "gptq"}, "where a 'led' model keeps its blocks is not known here"),
     ("text2text-generation", "led", {"method": "qat", "start": "rtn"}, None), ("fill-mask", "led", {"method": "rtn"}, None),
     ("text-generation", "gptj", {"method": "autoround"}, "where a 'gptj' model keeps its blocks is not known here; known: llama"),
     ("text-generation", "qwen2", {"method": "autoround"}, None), ("text-generation", None, {"method": "autoround"}, None),
     ("feature-extraction", "qwen3", {"method": "autoround"}, None), ("text2text-generation", "t5", {"method": "autoround"}, None),
     ("fill-mask", None, {"method": "qat", "generated_tokens": 64}, "drop generated_tokens")],
)  # fmt: skip
def test_calibrated_methods_know_tasks_and_model_types(task, model_type, options, reason):
    found = QuantizeSpec.of(**options).refusal(Parent(task, model_type))
    assert found is None if reason is None else reason in found and found.startswith(task)
