"""llm-compressor's one-shot calibration, kept to itself: no bars, no log lines, no files, no session left behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from featherweight.errors import StageError, one_line
from featherweight.grid import Grid

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

BATCH = 8
LIBRARIES = ("llmcompressor", "compressed_tensors")


def run(model: PreTrainedModel, modifiers: Callable[[], list[Any]], blocks: Tensor) -> list[Any]:
    """Calibrate `model` in place with `blocks` (int64 [blocks, length]), decoder layer by decoder layer.

    modifiers: makes llm-compressor's modifiers; they are returned once they have run. Raises StageError where the library fails.
    """
    try:
        with _quiet():
            return _oneshot(model, modifiers(), blocks)
    except Exception as error:  # the library's own checks, tracing and linear algebra each raise in their way
        raise StageError(f"llm-compressor could not calibrate this checkpoint: {one_line(error)}") from error


def weights_scheme(grid: Grid) -> dict[str, Any]:
    """llm-compressor's description of weights on `grid`. 127 steps on either side are 8 bits wide there, 63 are 7."""
    return {
        "num_bits": (grid.qmax + 1).bit_length() if grid.kind == "int" else grid.bits,
        "type": grid.kind,
        "symmetric": True,
        "strategy": "channel" if grid.group_size is None else "group",
        "group_size": grid.group_size,
    }


def _oneshot(model: PreTrainedModel, modifiers: list[Any], blocks: Tensor) -> list[Any]:
    from llmcompressor import oneshot
    from llmcompressor.core import reset_session
    from torch.utils.data import DataLoader

    samples: Any = [{"input_ids": ids} for ids in blocks]
    loader: DataLoader[Any] = DataLoader(samples, batch_size=BATCH)
    try:
        oneshot(model=model, recipe=modifiers, dataset=loader, pipeline="sequential", num_calibration_samples=len(blocks))
    finally:
        reset_session()
    return modifiers


@contextmanager
def _quiet() -> Iterator[None]:
    """llm-compressor draws a bar per layer, logs each module, and switches the tokenizers' threads off for good."""
    import llmcompressor  # noqa: F401 (importing it sets its log up, so that comes before switching it off)
    from loguru import logger
    from tqdm import tqdm

    threads = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    shown = tqdm.__init__
    tqdm.__init__ = lambda bar, *args, **options: shown(bar, *args, **(options | {"disable": True}))
    for library in LIBRARIES:
        logger.disable(library)
    try:
        yield
    finally:
        tqdm.__init__ = shown
        for library in LIBRARIES:
            logger.enable(library)
        if threads is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
