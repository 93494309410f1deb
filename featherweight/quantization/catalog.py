"""Quantization methods, one file each: `choose(given) -> Choice`. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable

from featherweight.quantization import gptq, qat, rtn
from featherweight.quantization.interface import Choice, QuantizationInput

METHODS: dict[str, Callable[[QuantizationInput], Choice]] = {
    "rtn": rtn.choose,
    "gptq": gptq.choose,
    "smoothquant": rtn.choose,  # after smoothing, see smoothing.py
    "awq": rtn.choose,
    "qat": qat.choose,
}
