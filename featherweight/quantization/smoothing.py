"""Smoothing: scale the model's channels against each other before a method rounds them. Its function stays the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from featherweight.checkpoint import opening
from featherweight.quantization.catalog import QUANTIZERS
from featherweight.quantization.interface import QuantizationInput, SpecT
from featherweight.quantization.spec import QuantizeSpec


def smoother(spec: QuantizeSpec) -> Callable[[QuantizationInput[Any]], None] | None:
    """What smooths first: the method itself, where it smooths, or the one that `spec.smooth` names."""
    return next((found for name in spec.methods if (found := QUANTIZERS[name].smooth)), None)


def smoothed(given: QuantizationInput[SpecT]) -> QuantizationInput[SpecT]:
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
