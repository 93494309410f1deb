"""AWQ (Lin et al. 2023) through llm-compressor, before rounding: channels that carry large activations get finer steps.

Each input channel of a layer is scaled up by its mean |activation| to a power that a search on the calibration text finds, and
the layer before it down by as much. The function of the model does not change; what rounding costs it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from featherweight.grid import Grid, grid_named
from featherweight.quantized import HEADS
from tasks.quantizers import oneshot
from tasks.quantizers.job import Job


def smooth(job: Job) -> None:
    """Scale the channels of `job.model` in place, by the search on the grid of the decoder's weights."""
    with _without_pinned_memory():
        oneshot.run(job.model, lambda: _modifiers(job), job.calibration)


def _modifiers(job: Job) -> list[Any]:
    """AWQ and, since it asks the model for its schemes, a quantization that it searches with."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    grid = grid_named(job.spec.grid)
    return [AWQModifier(), QuantizationModifier(config_groups=_groups(job, grid))]


def _groups(job: Job, grid: Grid) -> dict[str, Any]:
    """Schemes of the search. It knows no short last group: a matrix that would need one is searched with one scale per row."""
    whole: list[str] = []
    rest: list[str] = []
    for name, tensor in job.tensors():
        if name in job.grids and not name.endswith(HEADS):
            fits = grid.group_size is None or tensor.shape[1] % grid.group_size == 0
            (whole if fits else rest).append(name.removesuffix(".weight"))
    per_row = oneshot.weights_scheme(grid) | {"strategy": "channel", "group_size": None}
    groups = {
        "whole": {"targets": whole, "weights": oneshot.weights_scheme(grid)},
        "rest": {"targets": rest, "weights": per_row},
    }
    return {name: group for name, group in groups.items() if group["targets"]}


@contextmanager
def _without_pinned_memory() -> Iterator[None]:
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
