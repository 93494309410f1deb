"""Writing the folder that PyTorch's quantized engines serve: the integers, and the ranges of inputs where they are fixed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint.saving import copy_tokenizer
from featherweight.grid import GRIDS
from featherweight.model.matrices import heads, move_to_grid
from featherweight.progress import Metrics
from featherweight.runtimes.bounds import EXACT
from featherweight.runtimes.parity import Reference
from featherweight.runtimes.torch import pack
from featherweight.runtimes.torch.formats import FORMATS, WEIGHT_ONLY, Format
from featherweight.runtimes.torch.static_ranges import input_ranges, simulated, simulated_by_token
from featherweight.runtimes.torch.storage import Packed
from featherweight.store.served_folder import Serving

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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

    The reference rounds activations as the engine does: what that costs is a matter of quality.
    """
    weights = _check_float_twin(source.reference(), served)
    with _simulated(source.model, served):
        reference = source.reference()
    source.release()
    return {**weights, **reference.check(served)}


def _simulated(model: PreTrainedModel, served: Path) -> AbstractContextManager[None]:
    """`model` with its inputs rounded as those of what is served."""
    kind = FORMATS[Serving.read(served).engine]
    if kind.activations == "static":
        return simulated(model, pack.ranges(served))
    names = set(Packed.read(served).quantized.q)
    return simulated_by_token(model, names if kind.vocabulary else names - heads(model), kind.rounding())


def _check_float_twin(reference: Reference, served: Path) -> Metrics:
    name = f"{Serving.read(served).engine} with float activations"
    measured = reference.hold_twin(pack.load(served, WEIGHT_ONLY), EXACT, name)
    return {"parity_weights_max_abs": measured["parity_max_abs"]}
