"""SpinQuant's rotations that cost nothing at run time: R1 and R2, by Hadamard matrices as in QuaRot, through llm-compressor.

R1 turns all that the blocks add up, R2 the values of each head: what a weight or an activation has far beyond the others is spread
over all channels. Norms lose their weights to the matrices that read them, rotations are multiplied into the weights on either
side: the function of the model does not change, and every engine serves it as it is.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from featherweight.model.architecture import GATED_DECODERS
from featherweight.model.parent import Parent
from featherweight.quantization import oneshot, rtn
from featherweight.quantization.interface import QuantizationInput, Quantizer
from featherweight.quantization.spec import QuantizeSpec


class SpinQuantSpec(QuantizeSpec):
    """The model rotated, then every weight to its nearest grid point."""

    method: Literal["spinquant"] = "spinquant"


def refusal(spec: QuantizeSpec, parent: Parent) -> str | None:
    """A model whose residual is not known to be read by norms without a mean alone, whose head cannot be turned, or with zeros."""
    if not any(name in GATED_DECODERS for name in parent.model_types):
        what = f"a '{parent.model_type}' model" if parent.model_type else "every model known here"
        known = ", ".join(GATED_DECODERS)
        return f"{parent.task} + spinquant: what reads the residual of {what} is not known to turn with it; known: {known}"
    if parent.facts and getattr(parent.facts.config, "tie_word_embeddings", False):
        return (
            f"{parent.task} + spinquant: the embedding of this {parent.model_type} model is its head too, and the two would be "
            "turned apart; take awq"
        )
    return f"sparse + spinquant-{spec.grid}: a rotation fills the zeros; take rtn" if parent.sparse else None


def smooth(given: QuantizationInput[QuantizeSpec]) -> None:
    """Rotate `given.model` in place. No text is read; the library wants a block of it."""
    oneshot.run(given.model, lambda: [_modifier_class()(transform_type="random-hadamard")], given.calibration[:1])


@cache
def _modifier_class() -> Any:
    """llm-compressor's SpinQuantModifier without its centering of embeddings, which changes what a model of RMS norms computes."""
    from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier

    class SpinQuant(SpinQuantModifier):
        def _center_embeddings(self, model: Any) -> None:
            pass

    return SpinQuant


SPINQUANT = Quantizer(SpinQuantSpec, rtn.choose, oneshot.LIBRARIES, smooth, refusal)
