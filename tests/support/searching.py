"""A recipe that searches among its variants, and made-up figures of them."""

from __future__ import annotations

from typing import Any

from featherweight.progress import Metrics

SPACE = {
    "quantize": {"method": ["rtn", "gptq"], "grid": ["int8", "int4-g32"], "head": ["int8", None]},
    "export": [{"engine": "ctranslate2", "compute_type": ["float32", "int8"]}, {"engine": "torch-dynamic"}],
}
TREE: dict[str, Any] = {
    "name": "searched",
    "checkpoint": {"train": {}},
    "data": {"source": "python-stdlib"},
    "search": {"budget": "5m", "space": SPACE},
    "promote": {"model": "searched"},
}


def figures(speed: float, loss: float, spread: float) -> Metrics:
    """A made-up measurement, and its intervals."""
    return {
        **{"speedup_1": speed, "speedup_1_low": speed * (1 - spread), "speedup_1_high": speed * (1 + spread)},
        **{"quality_change": loss, "quality_change_low": loss - spread / 50, "quality_change_high": loss + spread / 50},
    }
