"""What is changed in llm-compressor 0.14 while it runs here, each with its reason; afterwards it is as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from featherweight.system.bars import hidden_bars
from featherweight.system.device import torch_device

MODULES = ("llmcompressor", "compressed_tensors")
GPTQ_KERNEL = "LLMCOMPRESSOR_DISABLE_GPTQ_TRITON"


@contextmanager
def eager_gptq() -> Iterator[None]:
    """Its Triton kernel for GPTQ on CUDA clamps every scale to a positive one (0.14.0), and so destroys grids of signed scales.

    The eager code that runs on a CPU takes scales as they are, on CUDA too.
    """
    before = os.environ.get(GPTQ_KERNEL)
    os.environ[GPTQ_KERNEL] = "1"
    try:
        yield
    finally:
        os.environ.pop(GPTQ_KERNEL) if before is None else os.environ.update({GPTQ_KERNEL: before})


@contextmanager
def device_in_use() -> Iterator[None]:
    """It takes an accelerator wherever torch knows one, whatever device its caller computes on."""
    from llmcompressor.pipelines.data_free import pipeline as data_free
    from llmcompressor.pipelines.sequential import pipeline as sequential

    pipelines: tuple[Any, ...] = (data_free, sequential)
    before = [pipeline.get_main_device for pipeline in pipelines]
    for pipeline in pipelines:
        pipeline.get_main_device = torch_device
    try:
        yield
    finally:
        for pipeline, theirs in zip(pipelines, before, strict=True):
            pipeline.get_main_device = theirs


@contextmanager
def quiet() -> Iterator[None]:
    """llm-compressor draws a bar per layer, logs each module, and switches the tokenizers' threads off for good."""
    import llmcompressor  # noqa: F401 (importing it sets its log up, so that comes before switching it off)
    from loguru import logger

    threads = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for module in MODULES:
        logger.disable(module)
    try:
        with hidden_bars():
            yield
    finally:
        for module in MODULES:
            logger.enable(module)
        if threads is None:
            del os.environ["TOKENIZERS_PARALLELISM"]


@contextmanager
def without_pinned_memory() -> Iterator[None]:
    """The search pins its cache for the copy to an accelerator, which raises where there is none."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.accelerator.is_available():
        yield
        return
    pinned = IntermediatesCache.pin_memory
    IntermediatesCache.pin_memory = lambda *args, **options: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = pinned  # type: ignore[method-assign]
