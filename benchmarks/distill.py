"""What distillation is worth: a 3-layer student of stories15M, taught, and the same student trained on the labels alone."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from featherweight import surgery
from featherweight.recipe import DataSpec, DistillSpec, load_recipe
from featherweight.text import Window, load_tokenizer, token_windows, write_documents
from tasks.distill import distill
from tasks.text import split_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)
TAUGHT = DistillSpec(layers=3, steps=60, batch=4, sequence=128, learning_rate=1e-3, kl_weight=0.9, temperature=2.0)
ARMS = {"labels": TAUGHT.model_copy(update={"kl_weight": 0.0}), "distilled": TAUGHT}
"""Equal but for the loss: the same layers to begin with, the same text in the same order, the same steps and rate."""


def benchmark() -> dict[str, Any]:
    """Held-out bits per byte of both students, for each seed, and of the teacher."""
    recipe = load_recipe(ROOT / "recipes" / "stories15m.yaml")
    teacher = Path(recipe.checkpoint.source or "")
    with tempfile.TemporaryDirectory() as folder:
        text, windows = _text(recipe.data, teacher, Path(folder))
        found = {arm: [_student(spec, teacher, text, seed, windows) for seed in SEEDS] for arm, spec in ARMS.items()}
    pairs = zip(found["labels"], found["distilled"], strict=True)
    return {
        "spec": TAUGHT.model_dump(exclude_defaults=True, mode="json"),
        "seeds": SEEDS,
        "windows": len(windows),
        "teacher_bits_per_byte": _bits_per_byte(surgery.load_model(teacher), windows),
        "bits_per_byte": found,
        "mean": {arm: round(mean(values), 4) for arm, values in found.items()},
        "gain_percent": [round(100 * (1 - distilled / labels), 2) for labels, distilled in pairs],
    }


def _text(data: DataSpec, teacher: Path, folder: Path) -> tuple[Path, list[Window]]:
    """The recipe's training text, and windows of its held-out documents."""
    splits = split_text(data)
    for name in ("train", "evaluation"):
        write_documents(folder / name, getattr(splits, name))
    return folder / "train", token_windows(folder / "evaluation", load_tokenizer(teacher), 256, 40)


def _student(spec: DistillSpec, teacher: Path, text: Path, seed: int, windows: list[Window]) -> float:
    """Bits per byte of one student."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        distill(spec, checkpoint=teacher, text=text, out=out, seed=seed)
        return _bits_per_byte(surgery.load_model(out), windows)


def _bits_per_byte(model: PreTrainedModel, windows: list[Window]) -> float:
    """Cross-entropy of the windows, each by itself."""
    import torch

    nats = 0.0
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor([window.ids])
            nats += torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
    return round(nats / math.log(2) / sum(window.text_bytes for window in windows), 4)
