"""A whole quantization method as another package would bring it: rounding to nearest with steps that clip the largest weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from featherweight.model.parent import Parent
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.quantization.interface import Choice, QuantizationInput, Quantizer
from featherweight.quantization.spec import QuantizeSpec

OPERATIONS = 1e12


class ClipSpec(QuantizeSpec):
    """Steps of `clip` times those that hold a row's largest weight."""

    method: Literal["clip"] = "clip"
    clip: float = Field(default=0.9, gt=0, le=1)


def refusal(spec: ClipSpec, parent: Parent) -> str | None:
    """A model of anything but text from a prefix, and zeros, for no better reason than to show it."""
    if parent.task != "text-generation":
        return f"{parent.task} + clip: clips decoders only"
    return f"sparse + clip-{spec.grid}: clips no zeros" if parent.sparse else None


def operations(spec: ClipSpec, parameters: int) -> float:
    """More than any of ours."""
    return OPERATIONS


def choose(given: QuantizationInput[ClipSpec]) -> Choice:
    """Round every matrix that has a grid."""
    q, scales = {}, {}
    for name, tensor in given.tensors():
        if grid := given.grids.get(name):
            q[name], scales[name] = grid.quantize(tensor, grid.scales(tensor) * given.spec.clip)
    return Choice(QuantizedWeights({name: given.grids[name] for name in q}, q, scales, given.spec.method), metrics={"clip": 1.0})


CLIP = Quantizer(ClipSpec, choose, libraries=("outside-quantizer",), refusal=refusal, operations=operations)
