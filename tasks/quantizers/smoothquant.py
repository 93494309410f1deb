"""SmoothQuant (Xiao et al. 2022) through llm-compressor, then round to nearest.

The ranges of the activations move into the weights, so that an engine which rounds activations to 8 bits loses less. The
inverse goes into the norms: the function of the model does not change, its norm weights do.
"""

from __future__ import annotations

from typing import Any

from tasks.quantizers import oneshot
from tasks.quantizers.job import Choice, Job, round_to_nearest

STRENGTH = 0.5


def choose(job: Job) -> Choice:
    """Smooth the model on the calibration text and round the result; norms and smoothed weights come along as changed."""
    oneshot.run(job.model, _modifiers, job.calibration)
    state = job.model.state_dict()
    smoothed = {name: state.get(name, tensor).float().cpu() for name, tensor in job.tensors()}
    return Choice(round_to_nearest(job, smoothed.items()), smoothed)


def _modifiers() -> list[Any]:
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    return [SmoothQuantModifier(smoothing_strength=STRENGTH)]
