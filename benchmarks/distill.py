"""What distillation is worth: small students of stories15M, taught in several ways, beside the same trained on the labels alone.

Within a student all arms are equal but for the loss and what is read: the same layers to begin with, the same steps and rate.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.stories import SEEDS, Stories, over_seeds
from featherweight.distillation.spec import DistillSpec
from featherweight.pruning.spec import PruneSpec
from tasks.distill import distill
from tasks.generate import generate
from tasks.prune import prune

COMMON: dict[str, Any] = {"steps": 60, "batch": 4, "sequence": 128, "learning_rate": 1e-3}
EVEN = "even layers"
STUDENTS: dict[str, dict[str, Any]] = {
    EVEN: {"layers": 3},
    "telling layers": {"layers": 3, "choose": "block_influence"},
    "narrower": {"prune": {"method": "structured", "ratio": 0.5, "finetune": None}},
    "given": {"student": "made in `_made`"},
}
"""`given` is the teacher pruned to 3 layers of most influence, loaded as a checkpoint that came from elsewhere."""
LABELS: dict[str, Any] = {"kl_weight": 0.0}
TAUGHT: dict[str, Any] = {"kl_weight": 0.9, "temperature": 2.0}
WAYS: dict[str, dict[str, Any]] = {
    "reverse KL": TAUGHT | {"divergence": "reverse_kl"},
    "Jensen-Shannon": TAUGHT | {"divergence": "jensen_shannon"},
    "hidden states": TAUGHT | {"hidden_weight": 1.0},
    "attention maps": TAUGHT | {"attention_weight": 1.0},
    "both": TAUGHT | {"hidden_weight": 1.0, "attention_weight": 1.0},
    "teacher's text": TAUGHT | {"sequence_level": {"samples": 256, "temperature": 1.0, "share": 0.5}},
    "teacher's text, labels alone": LABELS | {"sequence_level": {"samples": 256, "temperature": 1.0, "share": 0.5}},
    "kept answers": TAUGHT | {"teacher_cache": "top_k"},
}
"""Other ways to teach the student of even layers."""
ARMS = {
    **{(name, "labels"): student | LABELS for name, student in STUDENTS.items()},
    **{(name, "forward KL"): student | TAUGHT for name, student in STUDENTS.items()},
    **{(EVEN, way): STUDENTS[EVEN] | loss for way, loss in WAYS.items()},
}


def benchmark() -> dict[str, Any]:
    """Held-out bits per byte of every student, for each seed, and of the teacher."""
    with tempfile.TemporaryDirectory() as folder:
        stories = Stories.under(Path(folder))
        teacher = stories.bits_per_byte(stories.checkpoint)
        found = {arm: over_seeds(" / ".join(arm), lambda seed, arm=arm: _student(ARMS[arm], stories, seed)) for arm in ARMS}
    return {
        "spec": COMMON,
        "seeds": SEEDS,
        "windows": len(stories.windows),
        "teacher_bits_per_byte": round(teacher, 4),
        "students": {student: _against_labels(student, found) for student in STUDENTS},
    }


def _against_labels(student: str, found: Mapping[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """Each way's bits per byte, and its gain on the labels alone, seed by seed, in percent."""
    labels = found[student, "labels"]["values"]
    told: dict[str, Any] = {}
    for (of, way), figures in found.items():
        if of == student:
            gains = [round(100 * (1 - value / alone), 2) for value, alone in zip(figures["values"], labels, strict=True)]
            told[way] = figures if way == "labels" else figures | {"gain_percent": gains}
    return told


def _student(options: Mapping[str, Any], stories: Stories, seed: int) -> float:
    """Bits per byte of one student."""
    spec = DistillSpec.model_validate(COMMON | options)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        inputs = {"calibration": stories.text["calibration"], "student": _made(spec, stories, Path(folder), seed)}
        if spec.generate:
            inputs["generated"] = Path(folder) / "generated"
            generate(spec.generate, checkpoint=stories.checkpoint, text=stories.text["train"], out=inputs["generated"], seed=seed)
        distill(spec, checkpoint=stories.checkpoint, text=stories.text["train"], out=out, seed=seed, **inputs)
        return stories.bits_per_byte(out)


def _made(spec: DistillSpec, stories: Stories, folder: Path, seed: int) -> Path | None:
    """The student that is not made of the teacher's layers by the distillation itself."""
    how = spec.prune or (PruneSpec.of(method="depth", layers=3) if spec.student else None)
    if how is None:
        return None
    prune(how, checkpoint=stories.checkpoint, calibration=stories.text["calibration"], out=folder / "student", seed=seed)
    return folder / "student"
