"""How much of the loss of plain 4-bit rounding quantization-aware training recovers on stories15M, over three seeds."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.stories import SEEDS, Stories
from featherweight.quantization.spec import QuantizeSpec

PLACES = {"int4": {"scale": "absmax"}, "int4-g32": {"scale": "mse"}}
"""The grids, per row and in GenAI's blocks of 32, embedding and head on the same one; and the scales that GPTQ begins with."""
TRAINING = {"method": "qat", "steps": 80, "learning_rate": 3e-5, "generated_tokens": 50_000}


def benchmark() -> dict[str, Any]:
    """Relative change of held-out bits per byte by RTN, GPTQ and QAT (from GPTQ, the teacher's logits as target)."""
    with tempfile.TemporaryDirectory() as folder:
        stories = Stories.under(Path(folder))
        whole = stories.bits_per_byte(stories.checkpoint)
        grids = {grid: _grid(grid, options, stories, whole) for grid, options in PLACES.items()}
    return {
        "spec": TRAINING,
        "seeds": SEEDS,
        "windows": len(stories.windows),
        "float_bits_per_byte": round(whole, 4),
        "grids": grids,
    }


def _grid(grid: str, options: dict[str, Any], stories: Stories, whole: float) -> dict[str, Any]:
    """`recovered` is the share of RTN's loss that QAT makes good, for each seed."""
    place = {"grid": grid, "head": grid}
    rtn = _change(place | {"method": "rtn"}, stories, whole)
    gptq = _change(place | {"method": "gptq"} | options, stories, whole)
    trained = [_change(place | TRAINING | options, stories, whole, seed) for seed in SEEDS]
    return {
        "rtn": rtn,
        "gptq": gptq,
        "qat": trained,
        "qat_mean": round(mean(trained), 5),
        "recovered": [round(1 - change / rtn, 3) for change in trained],
    }


def _change(options: dict[str, Any], stories: Stories, whole: float, seed: int = 0) -> float:
    """Relative change of bits per byte of the checkpoint quantized so."""
    return round(stories.quantized(QuantizeSpec.model_validate(options), seed) / whole - 1, 5)
