"""llm-compressor as it runs here: which of its kernels it takes, and that it is left as it was."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from featherweight.quantization import patches


def takes_triton(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether llm-compressor would take its Triton kernel for a block of GPTQ on a machine that has CUDA."""
    from llmcompressor.modifiers.gptq import gptq_quantize

    anything: dict[str, Any] = dict.fromkeys(("scale", "zero_point", "global_scale", "g_idx"))
    monkeypatch.setattr(gptq_quantize, "triton_req", lambda _: True)
    monkeypatch.setattr(gptq_quantize, "get_triton_gptq_config", lambda _: (0, -8, 7))
    block = torch.zeros(1, 16, 128)
    eligible = gptq_quantize._gptq_block_update_triton_req
    return eligible(*[block] * 5, **anything, quant_args=SimpleNamespace(), i1=0)


@pytest.mark.parametrize("before", [None, "0"])
def test_gptq_never_takes_the_kernel_that_knows_no_negative_scales(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(patches.GPTQ_KERNEL, raising=False)
    if before is not None:
        monkeypatch.setenv(patches.GPTQ_KERNEL, before)
    assert takes_triton(monkeypatch)
    with patches.eager_gptq():
        assert not takes_triton(monkeypatch)
    assert os.environ.get(patches.GPTQ_KERNEL) == before
