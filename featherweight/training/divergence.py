"""When a training run has run away: the bounds, and the error that tells of it."""

from __future__ import annotations

import math

from featherweight.errors import DivergenceError


def check_step(losses: list[float], norm: float) -> None:
    """Refuse to go on when the loss or the gradient is not finite, or the loss stands far above where it began.

    From step 20 on that is a mean of ten losses above 1.5 times the first one plus 1. The offset is in nats, and leaves room for a
    loss that begins near zero, as the KL to a copy's own teacher; so does the one at the end. norm: the gradient's.
    """
    recent = losses[-10:]
    average = sum(recent) / len(recent)
    if not math.isfinite(losses[-1]) or not math.isfinite(norm):
        raise _diverged(losses, f"loss {losses[-1]:.4g}, gradient norm {norm:.4g}")
    if len(losses) >= 20 and average > 1.5 * losses[0] + 1:
        raise _diverged(losses, f"the loss has run away from {losses[0]:.4g} to {average:.4g}")


def check_end(losses: list[float], again: float) -> None:
    """Refuse weights that do far worse on the first batch than at first. again: its loss now, free of other batches' noise."""
    if not again <= 1.5 * losses[0] + 2:
        raise _diverged(losses, f"the first batch's loss has run away from {losses[0]:.4g} to {again:.4g}")


def _diverged(losses: list[float], problem: str) -> DivergenceError:
    last = ", ".join(f"{loss:.4g}" for loss in losses[-5:])
    return DivergenceError(
        f"training diverged at step {len(losses)}: {problem} (last losses: {last}); lower learning_rate, or check the "
        "checkpoint and the text",
        tuple(losses),
    )
