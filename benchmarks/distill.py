"""What distillation is worth: a 3-layer student of stories15M, taught, and the same student trained on the labels alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.stories import Stories
from featherweight.recipe import DistillSpec
from tasks.distill import distill

SEEDS = (0, 1, 2)
TAUGHT = DistillSpec(layers=3, steps=60, batch=4, sequence=128, learning_rate=1e-3, kl_weight=0.9, temperature=2.0)
ARMS = {"labels": TAUGHT.model_copy(update={"kl_weight": 0.0}), "distilled": TAUGHT}
"""Equal but for the loss: the same layers to begin with, the same text in the same order, the same steps and rate."""


def benchmark() -> dict[str, Any]:
    """Held-out bits per byte of both students, for each seed, and of the teacher."""
    with tempfile.TemporaryDirectory() as folder:
        stories = Stories.under(Path(folder))
        found = {arm: [_student(spec, stories, seed) for seed in SEEDS] for arm, spec in ARMS.items()}
        teacher = round(stories.bits_per_byte(stories.checkpoint), 4)
    pairs = zip(found["labels"], found["distilled"], strict=True)
    return {
        "spec": TAUGHT.model_dump(exclude_defaults=True, mode="json"),
        "seeds": SEEDS,
        "windows": len(stories.windows),
        "teacher_bits_per_byte": teacher,
        "bits_per_byte": found,
        "mean": {arm: round(mean(values), 4) for arm, values in found.items()},
        "gain_percent": [round(100 * (1 - distilled / labels), 2) for labels, distilled in pairs],
    }


def _student(spec: DistillSpec, stories: Stories, seed: int) -> float:
    """Bits per byte of one student."""
    with tempfile.TemporaryDirectory() as folder:
        distill(spec, checkpoint=stories.checkpoint, text=stories.text["train"], out=Path(folder), seed=seed)
        return round(stories.bits_per_byte(Path(folder)), 4)
