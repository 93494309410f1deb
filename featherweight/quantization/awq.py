"""AWQ (Lin et al. 2023) through llm-compressor, before rounding: channels that carry large activations get finer steps.

Each input channel of a layer is scaled up by its mean |activation| to a power that a search on the calibration text finds, and
the layer before it down by as much. The function of the model does not change; what rounding costs it does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from featherweight.model.architecture import LAYOUTS
from featherweight.model.parent import Parent, walking_refusal
from featherweight.quantization import oneshot, patches, rtn
from featherweight.quantization.channels import inner_pairs, norm_pairs
from featherweight.quantization.interface import QuantizationInput, Quantizer, calibration_operations
from featherweight.quantization.spec import QuantizeSpec


class AwqSpec(QuantizeSpec):
    """Channels scaled by a search on `samples` blocks of calibration text, then every weight to its nearest grid point."""

    method: Literal["awq"] = "awq"


def refusal(spec: QuantizeSpec, parent: Parent) -> str | None:
    """A model whose blocks are not known."""
    return walking_refusal("awq", parent)


def smooth(given: QuantizationInput[QuantizeSpec]) -> None:
    """Scale the channels of `given.model` in place, by the search on the grid of the blocks' weights."""
    with patches.without_pinned_memory():
        oneshot.run(given.model, lambda: _modifiers(given), given.calibration)


def _modifiers(given: QuantizationInput[QuantizeSpec]) -> list[Any]:
    """AWQ and, since it asks the model for its schemes, a quantization that it searches with."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier

    known = given.model.config.model_type in LAYOUTS
    pairs = [*norm_pairs(given.model), *inner_pairs(given.model)] if known else []
    mappings = [AWQMapping(pair.source, pair.readers) for pair in pairs] or None
    return [AWQModifier(mappings=mappings), QuantizationModifier(config_groups=_groups(given))]


def _groups(given: QuantizationInput[QuantizeSpec]) -> dict[str, Any]:
    """Schemes of the search. It knows no short last group: a matrix that would need one is searched with one scale per row."""
    groups: dict[str, Any] = {}
    for name, tensor in given.tensors():
        if name in given.grids and name not in given.heads:
            grid = given.grids[name]
            grid = replace(grid, group_size=None) if grid.group_size and tensor.shape[1] % grid.group_size else grid
            group = groups.setdefault(f"{grid.name}-{grid.group_size}", {"targets": [], "weights": oneshot.weights_scheme(grid)})
            group["targets"].append(name.removesuffix(".weight"))
    return groups


EXPECTED_LOSSES = {"int8": 0.0011, "int8-g32": 0.0002, "int4": 0.0776, "int4-g32": 0.0152}

AWQ = Quantizer(
    AwqSpec, rtn.choose, oneshot.LIBRARIES, smooth, refusal, calibration_operations, streams=True, losses=EXPECTED_LOSSES
)
