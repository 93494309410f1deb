"""SmoothQuant (Xiao et al. 2022) through llm-compressor, before rounding.

The ranges of the activations move into the weights, so that an engine which rounds activations to 8 bits loses less. The
inverse goes into the norms: the function of the model does not change, its norm weights do.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from featherweight.model.architecture import LAYOUTS, PRE_NORM
from featherweight.model.parent import Parent, walking_refusal
from featherweight.quantization import oneshot, rtn
from featherweight.quantization.channels import norm_pairs
from featherweight.quantization.interface import QuantizationInput, Quantizer, calibration_operations
from featherweight.quantization.spec import QuantizeSpec

STRENGTH = 0.5


class SmoothQuantSpec(QuantizeSpec):
    """Ranges of activations moved into the weights on `samples` blocks of calibration text, then every weight to its nearest."""

    method: Literal["smoothquant"] = "smoothquant"


def refusal(spec: QuantizeSpec, parent: Parent) -> str | None:
    """A model whose blocks are not known, or whose norms feed the residual too."""
    if reason := walking_refusal("smoothquant", parent):
        return reason
    if parent.task == "text-generation" or any(name in PRE_NORM for name in parent.model_types):
        return None
    whose = f"a '{parent.model_type}' model" if parent.model_type else "every encoder known here"
    return f"{parent.task} + smoothquant: the norms of {whose} feed the residual too and cannot be scaled; take awq or gptq"


def smooth(given: QuantizationInput[QuantizeSpec]) -> None:
    """Smooth `given.model` in place: input channel j of what reads a norm is scaled by sqrt(max|X_j| / max|W_j|)."""
    known = given.model.config.model_type in LAYOUTS
    mappings = [(pair.readers, pair.source) for pair in norm_pairs(given.model)] if known else None
    oneshot.run(given.model, lambda: [_modifier_class()(smoothing_strength=STRENGTH, mappings=mappings)], given.calibration)


@cache
def _modifier_class() -> Any:
    """llm-compressor's SmoothQuantModifier, by the paper's max|X| where the library takes half of max(X) - min(X).

    Activations are rounded symmetrically, so the larger side of a lopsided channel is the one that counts.
    """
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    class SmoothQuant(SmoothQuantModifier):
        def _apply_smoothing(self, model: Any) -> None:
            for seen in (self.scales_ or {}).values():
                peak = seen.max_channel_vals.maximum(-seen.min_channel_vals)
                seen.max_channel_vals, seen.min_channel_vals = peak, -peak
            super()._apply_smoothing(model)

    return SmoothQuant


TOLERANCE = 0.02
"""Of RTN's loss with float activations: it makes weights harder to round, for activations that only the engine rounds."""

EXPECTED_LOSSES = {"int8": 0.0018, "int8-g32": 0.0002, "int4": 0.0878, "int4-g32": 0.0337}

SMOOTHQUANT = Quantizer(
    SmoothQuantSpec,
    rtn.choose,
    oneshot.LIBRARIES,
    smooth,
    refusal,
    calibration_operations,
    streams=True,
    tolerance=TOLERANCE,
    losses=EXPECTED_LOSSES,
)
