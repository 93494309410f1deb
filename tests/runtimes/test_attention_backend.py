"""Which attention a model takes: what is asked for is what runs, by PyTorch's own profiler."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from featherweight.measure.measurement import Comparison
from featherweight.model.architecture import auto_class
from featherweight.runtimes.torch.attention_backend import attention_backends, backend, kernels_of
from tests.support.comparisons import measurement
from tests.support.families import family_checkpoint

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
OPERATORS = {
    "flash": "aten::_scaled_dot_product_flash_attention",
    "memory-efficient": "aten::_scaled_dot_product_efficient_attention",
    "cuDNN": "aten::_scaled_dot_product_cudnn_attention",
    "math": "aten::_scaled_dot_product_attention_math",
}


def ran(run) -> set[str]:
    """The kernels that `run` went through, by the names of PyTorch's operators."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.inference_mode():
        run()
    seen = {event.key for event in profile.key_averages()}
    return {name for name, operator in OPERATORS.items() if any(key.startswith(operator) for key in seen)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["plain", "grouped", "masked", "odd"])
def test_what_is_asked_for_is_what_runs(device, dtype, case):
    query = torch.randn(2, 8, 16, 20 if case == "odd" else 64, device=device, dtype=dtype)
    key = query[:, :2].contiguous() if case == "grouped" else query
    mask = torch.ones(16, 16, dtype=torch.bool, device=device).tril() if case == "masked" else None
    how = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": case == "grouped"}
    with torch.inference_mode():
        told = backend(query, key, key, **how)
    assert ran(lambda: torch.nn.functional.scaled_dot_product_attention(query, key, key, **how)) == {told}


@pytest.mark.parametrize(("kind", "passes"), [("llama", ["prompt", "step"]), ("t5", ["prompt", "step"]), ("bert", ["prompt"])])
def test_a_model_is_asked_in_every_pass(tmp_path, kind, passes):
    family_checkpoint(kind, tmp_path)
    model = auto_class(AutoConfig.from_pretrained(tmp_path)).from_pretrained(tmp_path).eval().to(DEVICES[-1])
    found = attention_backends(model)
    assert list(found) == passes
    assert {name for told in found.values() for name in told.split(", ")} <= set(OPERATORS), "several where layers differ"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert set(attention_backends(model).values()) == {"math"}


def test_a_model_with_products_of_its_own_says_so(tmp_path):
    family_checkpoint("bloom", tmp_path)
    model = auto_class(AutoConfig.from_pretrained(tmp_path)).from_pretrained(tmp_path).eval()
    assert attention_backends(model) == {"prompt": "eager", "step": "eager"}


def test_kernels_are_named_for_every_device_here():
    for device in DEVICES:
        assert set(kernels_of(device, torch.float32)) == {"alone", "grouped"}


def test_a_measurement_keeps_what_its_engine_said(tmp_path):
    told = replace(measurement(), attention={"prompt": "flash", "step": "math"})
    Comparison(told, measurement()).write(tmp_path)
    assert Comparison.read(tmp_path).variant == told
