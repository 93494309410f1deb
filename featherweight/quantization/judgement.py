"""The judgement of a method: what it made against plain rounding to nearest (RTN), on the same text, window by window.

RTN looks at no data and has nothing that could go wrong. Whatever is worse computes something else than it should, as a kernel
did that took signed scales for positive ones; the weights alone do not show it, since good methods move them further than RTN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.streamed import Change, is_large, streamed_model
from featherweight.errors import StageError
from featherweight.grid import Grid
from featherweight.model.quantized_weights import dequantized
from featherweight.quantization.catalog import QUANTIZERS
from featherweight.quantization.interface import QuantizationInput, rounded
from featherweight.quantization.spec import IMATRIX, PLAIN, QuantizeSpec
from featherweight.training.losses import block_answers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SIGMAS = 3.0
"""Standard errors of the paired difference that are noise."""
FEWEST = 8
"""Windows whose spread says what the noise is."""
LARGEST = 0.1
"""What passes for noise at most, as a share of RTN's loss: damage spreads too. It is what fewer windows are allowed."""

FARTHER = 3.0
"""How much farther than RTN's a result's answers may be from the checkpoint's."""
STRANGE = 1.0
"""The distance beyond which answers have little to do with the checkpoint's, however far RTN's are."""
NOTED = 0.5
"""The distance from which on it is said, of RTN too, which nothing is held to."""

Answers = tuple["Tensor", "Tensor", "Tensor"]
"""Nats and predicted tokens of each window, and a sample of what is answered (see training.losses.block_answers)."""


@dataclass(frozen=True)
class Judgement:
    """Mean losses of a result and of RTN, nats per predicted token, and by how much the result's may be the larger one."""

    loss: float
    rtn_loss: float
    allowed: float

    @classmethod
    def of(cls, result: Answers, rtn: Answers, tolerance: float) -> Judgement:
        """tolerance: a share of RTN's loss, or of 1 nat where that is less; what passes for noise comes on top, likewise."""
        tokens = rtn[1].sum().item()
        loss, rtn_loss = (one[0].sum().item() / tokens for one in (result, rtn))
        unit = max(rtn_loss, 1.0)
        return cls(loss, rtn_loss, min(SIGMAS * _noise(result, rtn), LARGEST * unit) + tolerance * unit)

    def require(self, what: str) -> None:
        """Raise StageError for a result that is worse than RTN, or no number."""
        if not self.loss - self.rtn_loss <= self.allowed:
            raise StageError(
                f"{what}: the loss on the calibration text is {self.loss:.4g} nats where rounding to nearest has "
                f"{self.rtn_loss:.4g} ({self.allowed:.2g} more would pass for noise), so it did not compute what it should; "
                "do not use it: take rtn, milder settings of the method, or another device"
            )


def _noise(result: Answers, rtn: Answers) -> float:
    """Standard error of the difference of the two means: a ratio of sums over windows, which are drawn together."""
    count, tokens = len(rtn[0]), rtn[1].sum()
    if count < FEWEST:
        return math.inf
    nats = result[0] - rtn[0]
    beside = nats - nats.sum() / tokens * rtn[1]
    return ((beside.square().sum() * count / (count - 1)).sqrt() / tokens).item()


def distance(one: Answers, checkpoint: Answers) -> float:
    """Squared difference of the answers, as a share of the square of the checkpoint's own."""
    return ((one[2] - checkpoint[2]).square().sum() / checkpoint[2].square().sum().clamp_min(1e-30)).item()


def require_alike(what: str, result: Answers, rtn: Answers, checkpoint: Answers, far: float) -> None:
    """Raise StageError where a result answers something else than the checkpoint and RTN do, whatever the text makes of it.

    The loss on a text that the checkpoint cannot predict is as bad for destroyed weights as it was before. far: see Quantizer.
    """
    found, plain = distance(result, checkpoint), distance(rtn, checkpoint)
    if not found <= max(far, min(FARTHER * plain, max(STRANGE, plain))):
        raise StageError(
            f"{what}: its answers on the calibration text are {found:.2g} from the checkpoint's, as a share of their square, where "
            f"those of rounding to nearest are {plain:.2g}, so it did not compute what it should; do not use it: take rtn, milder "
            "settings of the method, or another device"
        )


def judged(
    given: QuantizationInput[Any], saved: PreTrainedModel, grids: Mapping[str, Grid], blocks: Tensor, checkpoint: Answers
) -> Mapping[str, float]:
    """`loss_after` of the result `saved`, and `rtn_loss` of RTN on the same `grids`, over windows of the calibration text.

    checkpoint: what the checkpoint itself answers to those. The recipe's text it is for every method, also for one that trains on
    what the checkpoint itself writes. `saved` is used up: RTN takes its place, tensor by tensor, unless it is read from files that
    are too large for memory; then RTN is computed as it is needed. RTN itself is not compared. Raises StageError for what is
    worse, answers something else, or is no number.
    """
    result, what = block_answers(saved, blocks), f"{' behind '.join(given.spec.methods)} on {given.spec.grid}"
    loss = (result[0].sum() / result[1].sum()).item()
    if not math.isfinite(loss):
        raise StageError(f"{what}: the quantized checkpoint's loss is {loss}; do not use it")
    if (moved := distance(result, checkpoint)) > NOTED:
        given.progress.note(
            f"{what}: the answers are {moved:.2g} from the checkpoint's, as a share of their square; see what it is worth"
        )
    if not given.spec.calibrated:
        return {"loss_after": loss}
    plain = (streamed_model(given.checkpoint, _rounding(given, grids)) if is_large(given.checkpoint) else None) or saved
    if plain is saved:
        round_in_place(saved, given, grids)
    rtn = block_answers(plain, blocks)
    judgement = Judgement.of(result, rtn, tolerance(given.spec))
    judgement.require(what)
    if (far := QUANTIZERS[given.spec.method].far(given.spec)) is not None:
        require_alike(what, result, rtn, checkpoint, far)
    return {"loss_after": loss, "rtn_loss": judgement.rtn_loss}


def tolerance(spec: QuantizeSpec) -> float:
    """That of the most tolerated of its methods."""
    return max(QUANTIZERS[name].tolerance for name in spec.methods)


def round_in_place(model: PreTrainedModel, given: QuantizationInput[Any], grids: Mapping[str, Grid]) -> None:
    """Give `model` the checkpoint's own weights, those that have one of `grids` rounded to it."""
    import torch

    state, change = model.state_dict(), _rounding(given, grids)
    with torch.no_grad():
        for name, tensor in ((given.read_as(stored), tensor) for _, stored, tensor in given.stored()):
            if name in state:
                state[name].copy_(change(name, tensor))


def _rounding(given: QuantizationInput[Any], grids: Mapping[str, Grid]) -> Change:
    """What RTN makes of a stored tensor."""

    def change(name: str, tensor: Tensor) -> Tensor:
        if name not in grids:
            return tensor
        grid, transposed = grids[name], name in given.transposed
        rows = tensor.T if transposed else tensor
        weight = dequantized(grid, *rounded(grid, rows, PLAIN if given.spec.scale == IMATRIX else given.spec.scale))
        return weight.T if transposed else weight

    return change
