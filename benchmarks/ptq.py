"""What each way of rounding after training costs stories15M: every method on grids of 8 and 4 bits, two on fp8; weights alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.stories import SEEDS, Stories, over_seeds
from featherweight.quantization.spec import QuantizeSpec

METHODS: dict[str, dict[str, str]] = {
    "RTN": {"method": "rtn"},
    "RTN, least squared error": {"method": "rtn", "scale": "mse"},
    "GPTQ": {"method": "gptq"},
    "GPTQ, least squared error": {"method": "gptq", "scale": "mse"},
    "RTN, imatrix": {"method": "rtn", "scale": "imatrix"},
    "GPTQ, imatrix": {"method": "gptq", "scale": "imatrix"},
    "AutoRound": {"method": "autoround"},
    "AWQ": {"method": "awq"},
    "AWQ, then GPTQ": {"method": "gptq", "smooth": "awq"},
    "SmoothQuant": {"method": "smoothquant"},
    "SmoothQuant, then GPTQ": {"method": "gptq", "smooth": "smoothquant"},
}
PLACES = {"int8": "int8", "int8-g32": "int8-g32", "int4": "int8", "int4-g32": "int8", "fp8": "fp8"}
"""Grids of the matrices, and of the embedding and head beside them."""
METHODS_OF = {"fp8": ("RTN", "GPTQ")}
"""Smoothing moves exponents, which floats have many of."""


def benchmark() -> dict[str, Any]:
    """Relative change of held-out bits per byte; the seeds choose the calibration text of the methods that read any."""
    with tempfile.TemporaryDirectory() as folder:
        stories = Stories.under(Path(folder))
        whole = stories.bits_per_byte(stories.checkpoint)
        change = {
            grid: {name: _change(name, grid, stories, whole) for name in METHODS_OF.get(grid, tuple(METHODS))} for grid in PLACES
        }
    return {"seeds": SEEDS, "windows": len(stories.windows), "float_bits_per_byte": round(whole, 4), "change": change}


def _change(name: str, grid: str, stories: Stories, whole: float) -> dict[str, Any]:
    spec = QuantizeSpec.model_validate(METHODS[name] | {"grid": grid, "head": PLACES[grid]})
    seeds = SEEDS if spec.calibrated else SEEDS[:1]
    return over_seeds(f"{grid} / {name}", lambda seed: stories.quantized(spec, seed) / whole - 1, seeds)
