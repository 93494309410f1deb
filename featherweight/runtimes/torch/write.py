"""Writing the folder that PyTorch's quantized engines serve: the integers, and the ranges of inputs where they are fixed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint.saving import copy_tokenizer
from featherweight.grid import GRIDS
from featherweight.model.matrices import move_to_grid
from featherweight.progress import Metrics
from featherweight.runtimes.bounds import EXACT
from featherweight.runtimes.parity import Reference
from featherweight.runtimes.torch import pack
from featherweight.runtimes.torch.formats import WEIGHT_ONLY, Format
from featherweight.runtimes.torch.static_ranges import input_ranges, simulated
from featherweight.store.served_folder import Serving

if TYPE_CHECKING:
    from featherweight.runtimes.writing import Source


def write(engine: str, format: Format, source: Source, out: Path) -> None:
    """See Runtime.write."""
    quantized = source.round(GRIDS[format.body], GRIDS[format.head])
    move_to_grid(source.model, quantized)
    ranges = {}
    if format.activations == "static":
        source.progress.note("finding the ranges of activations")
        ranges = input_ranges(source.model, quantized.q, source.checkpoint, source.calibration, source.seed)
    pack.write(source.model, quantized, ranges, out)
    copy_tokenizer(source.checkpoint, out)
    Serving(engine, grid=quantized.grid).write(out)


def check_rounded(source: Source, served: Path) -> Metrics:
    """Parity where activations are rounded: the weights to the exact bound in layers that leave activations in float, then all.

    The reference of a static engine rounds activations by the same ranges.
    """
    weights = _check_float_twin(source.reference(), served)
    with simulated(source.model, pack.ranges(served)):
        reference = source.reference()
    source.release()
    return {**weights, **reference.check(served)}


def _check_float_twin(reference: Reference, served: Path) -> Metrics:
    name = f"{Serving.read(served).engine} with float activations"
    measured = reference.hold_twin(pack.load(served, WEIGHT_ONLY), EXACT, name)
    return {"parity_weights_max_abs": measured["parity_max_abs"]}
