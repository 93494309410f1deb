"""The quantization methods: a file and a line each. Another package adds its own through an entry point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from featherweight.catalog import Catalog

if TYPE_CHECKING:
    from featherweight.quantization.interface import Quantizer

DEFAULT = "rtn"
"""The method of a recipe that names none."""
START = "gptq"
"""The rounding that training begins from, likewise."""

QUANTIZERS: Catalog[Quantizer[Any]] = Catalog(
    "quantization method",
    "featherweight.quantizers",
    {
        "rtn": "featherweight.quantization.rtn:RTN",
        "gptq": "featherweight.quantization.gptq:GPTQ",
        "smoothquant": "featherweight.quantization.smoothquant:SMOOTHQUANT",
        "awq": "featherweight.quantization.awq:AWQ",
        "spinquant": "featherweight.quantization.spinquant:SPINQUANT",
        "autoround": "featherweight.quantization.autoround:AUTOROUND",
        "qat": "featherweight.quantization.qat:QAT",
    },
)
