"""Smoothing: scale the model's channels against each other before a method rounds them. Its function stays the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from featherweight.checkpoint import opening
from featherweight.quantization import awq, smoothquant
from featherweight.quantization.interface import QuantizationInput
from featherweight.quantization.spec import QuantizeSpec

SMOOTHERS: dict[str, Callable[[QuantizationInput], None]] = {"smoothquant": smoothquant.smooth, "awq": awq.smooth}


def smoother(spec: QuantizeSpec) -> Callable[[QuantizationInput], None] | None:
    """What smooths first: the method itself, where it is one of smoothing and rounding to nearest, else `spec.smooth`."""
    return SMOOTHERS.get(spec.method) or SMOOTHERS.get(spec.smooth)


def smoothed(given: QuantizationInput) -> QuantizationInput:
    """The same on the smoothed model and its tensors, or as it is where the spec asks for no smoothing."""
    import torch

    smooth = smoother(given.spec)
    if smooth is None:
        return given
    given.progress.note("smoothing")
    smooth(given)
    state = given.model.state_dict()
    changed = {}
    for name, before in given.tensors():
        after = state.get(name, before).float().cpu()
        if not torch.equal(after, before.float()):
            changed[name] = after
    # The library leaves its hooks and scales in a model that it has calibrated.
    model = opening.load_model(given.checkpoint)
    model.load_state_dict(changed, strict=False)
    return dataclasses.replace(given, model=model, smoothed=changed)
