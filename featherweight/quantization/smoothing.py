"""Smoothing: scale the model's channels against each other before a method rounds them. Its function stays the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from featherweight.checkpoint import opening
from featherweight.quantization import awq, smoothquant
from featherweight.quantization.job import Job
from featherweight.quantization.spec import QuantizeSpec

SMOOTHERS: dict[str, Callable[[Job], None]] = {"smoothquant": smoothquant.smooth, "awq": awq.smooth}


def smoother(spec: QuantizeSpec) -> Callable[[Job], None] | None:
    """What smooths first: the method itself, where it is one of smoothing and rounding to nearest, else `spec.smooth`."""
    return SMOOTHERS.get(spec.method) or SMOOTHERS.get(spec.smooth)


def smoothed(job: Job) -> Job:
    """The same job on the smoothed model and its tensors, or as it is where the spec asks for no smoothing."""
    import torch

    smooth = smoother(job.spec)
    if smooth is None:
        return job
    job.progress.note("smoothing")
    smooth(job)
    state = job.model.state_dict()
    changed = {}
    for name, before in job.tensors():
        after = state.get(name, before).float().cpu()
        if not torch.equal(after, before.float()):
            changed[name] = after
    # The library leaves its hooks and scales in a model that it has calibrated.
    model = opening.load_model(job.checkpoint)
    model.load_state_dict(changed, strict=False)
    return dataclasses.replace(job, model=model, smoothed=changed)
