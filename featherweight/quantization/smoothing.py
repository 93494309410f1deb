"""Smoothing: scale the model's channels against each other before a method rounds them. Its function stays the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.streamed import is_streamed, kept_weights, open_model
from featherweight.quantization.catalog import QUANTIZERS
from featherweight.quantization.interface import QuantizationInput, SpecT
from featherweight.quantization.spec import QuantizeSpec

if TYPE_CHECKING:
    from torch import Tensor


def smoother(spec: QuantizeSpec) -> Callable[[QuantizationInput[Any]], None] | None:
    """What smooths first: the method itself, where it smooths, or the one that `spec.smooth` names."""
    return next((found for name in spec.methods if (found := QUANTIZERS[name].smooth)), None)


def smoothed(given: QuantizationInput[SpecT]) -> QuantizationInput[SpecT]:
    """The same on the smoothed model and its tensors, or as it is where the spec asks for no smoothing."""
    smooth = smoother(given.spec)
    if smooth is None:
        return given
    given.progress.note("smoothing")
    smooth(given)
    changed = kept_weights(given.model) if is_streamed(given.model) else _changed(given)
    # The library leaves its hooks and scales in a model that it has calibrated.
    return dataclasses.replace(given, model=open_model(given.checkpoint, instead=changed), smoothed=changed)


def _changed(given: QuantizationInput[Any]) -> dict[str, Tensor]:
    """What tensors of the checkpoint have become in the model."""
    import torch

    state, changed = given.model.state_dict(), {}
    for name, before in given.tensors():
        after = state.get(name, before).float().cpu()
        if not torch.equal(after, before.float()):
            changed[name] = after
    return changed
