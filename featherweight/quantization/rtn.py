"""Round to nearest: every weight to its closest grid point, tensor by tensor, no data."""

from __future__ import annotations

from typing import Literal

from featherweight.quantization.interface import Choice, QuantizationInput, Quantizer, round_to_nearest
from featherweight.quantization.spec import QuantizeSpec


class RtnSpec(QuantizeSpec):
    """Every weight to its nearest grid point."""

    method: Literal["rtn"] = "rtn"


def choose(given: QuantizationInput[QuantizeSpec]) -> Choice:
    """Round the checkpoint's weights as they are."""
    return Choice(round_to_nearest(given, given.tensors()))


EXPECTED_LOSSES = {"int8": 0.0015, "int8-g32": 0.0014, "int4": 0.0952, "int4-g32": 0.0306, "fp8": 0.0028}

RTN = Quantizer(RtnSpec, choose, starts_training=True, streams=True, losses=EXPECTED_LOSSES)
