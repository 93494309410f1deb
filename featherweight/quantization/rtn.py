"""Round to nearest: every weight to its closest grid point, tensor by tensor, no data."""

from __future__ import annotations

from featherweight.quantization.interface import Choice, QuantizationInput, round_to_nearest


def choose(given: QuantizationInput) -> Choice:
    """Round the checkpoint's weights as they are."""
    return Choice(round_to_nearest(given, given.tensors()))
