"""Round to nearest: every weight to its closest grid point, tensor by tensor, no data."""

from __future__ import annotations

from featherweight.quantization.job import Choice, Job, round_to_nearest


def choose(job: Job) -> Choice:
    """Round the checkpoint's weights as they are."""
    return Choice(round_to_nearest(job, job.tensors()))
