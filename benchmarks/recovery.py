"""What recovery training is worth: stories15M made smaller or sparser by each method, and trained again in several ways."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.stories import SEEDS, Stories, over_seeds
from featherweight.pruning.spec import PruneSpec
from featherweight.training.spec import FinetuneSpec
from tasks.finetune import finetune
from tasks.prune import prune

COMMON: dict[str, Any] = {"steps": 60, "batch": 4, "sequence": 128, "learning_rate": 3e-4}
LORA: dict[str, Any] = {"lora": {"rank": 8}, "learning_rate": 1e-3}
PRUNED: dict[str, dict[str, Any]] = {
    "structured 17 %": {"method": "structured", "ratio": 0.17, "samples": 32, "sequence": 128},
    "depth 5 of 6": {"method": "depth", "layers": 5, "samples": 32, "sequence": 128},
    "width 256 of 288": {"method": "width", "hidden": 256, "criterion": "activation", "samples": 32, "sequence": 128},
    "3 of 6 key/value heads": {"method": "attention", "kv_heads": 3},
    "magnitude 50 %": {"method": "sparse", "criterion": "magnitude"},
    "Wanda 50 %": {"method": "sparse", "criterion": "wanda"},
    "SparseGPT 50 %": {"method": "sparse", "criterion": "sparsegpt"},
    "Wanda 2:4": {"method": "sparse", "criterion": "wanda", "pattern": "2:4"},
    "SparseGPT 2:4": {"method": "sparse", "criterion": "sparsegpt", "pattern": "2:4"},
}
WAYS: dict[str, dict[str, Any]] = {
    "no warm-up": {"warmup": 0.0},
    "four parts": {"accumulate": 4},
    "200 steps": {"steps": 200},
    "200 steps, early stop": {"steps": 200, "patience": 2, "evaluate_every": 20},
}
FULL: dict[str, dict[str, Any]] = {"full": {}}
WAYS_OF = {"structured 17 %": FULL | {"LoRA": LORA} | WAYS, "Wanda 50 %": FULL | {"LoRA": LORA}}
"""Ways to train each of them; full training alone where none is named."""


def benchmark() -> dict[str, Any]:
    """Relative change of held-out bits per byte from the whole model's, before and after training, for each seed."""
    with tempfile.TemporaryDirectory() as folder:
        stories = Stories.under(Path(folder))
        whole = stories.bits_per_byte(stories.checkpoint)
        found = {name: _recovered(name, PruneSpec.model_validate(spec), stories, whole) for name, spec in PRUNED.items()}
    return {
        "spec": COMMON,
        "lora": LORA,
        "seeds": SEEDS,
        "windows": len(stories.windows),
        "whole_bits_per_byte": round(whole, 4),
        "change": found,
    }


def _recovered(name: str, spec: PruneSpec, stories: Stories, whole: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        pruned = Path(folder)
        prune(spec, checkpoint=stories.checkpoint, calibration=stories.text["calibration"], out=pruned)
        before = stories.bits_per_byte(pruned) / whole - 1
        after = {
            way: _trained(f"{name} / {way}", options, pruned, stories, whole) for way, options in WAYS_OF.get(name, FULL).items()
        }
    return {"before": round(before, 4), "after": after}


def _trained(name: str, options: Mapping[str, Any], pruned: Path, stories: Stories, whole: float) -> dict[str, Any]:
    """The change that is left after training."""
    spec = FinetuneSpec.model_validate(COMMON | options)

    def one(seed: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            texts = {"text": stories.text["train"], "calibration": stories.text["calibration"]}
            finetune(spec, checkpoint=pruned, out=Path(folder), seed=seed, **texts)
            return stories.bits_per_byte(Path(folder)) / whole - 1

    return over_seeds(name, one)
