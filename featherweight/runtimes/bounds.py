"""How far an engine's log-probabilities may be from PyTorch's: what rounding at run time explains, and nothing more.

How the bounds were found: log-probabilities in nats of 6 windows of up to 128 tokens, engine against float32 PyTorch with the
same weights, on random Llama, Mistral (heads pruned), Qwen2 and GPT-2 models of 2 layers, stories260K and stories15M. What each
engine showed stands with its Runtime.

    activations                                       max |difference|   mean          bound
    float, weights of any grid                            0.00006        0.000006      max 0.001
    float, GELU by another formula                        0.0016                       max 0.005
    float, GELU from a table in float16                   0.0056           0.0002      max 0.02
    int8, per token or per block                          0.42 to 0.91   0.03 to 0.07  mean 0.15
    int8, products saturating in int16                    3.6            0.21          mean 0.4
    fp8, per token                                        0.92           0.060         mean 0.15
    fp8 keys and values                                   0.18           0.034         mean 0.15
    float16, on weights of any grid                       0.025          0.0026        max 0.1
    bfloat16                                              0.26           0.019         mean 0.05
    (one matrix of the model with its scales doubled)     0.6 to 5.2     0.085 to 0.6
    (one row of one matrix with its scale doubled)        0.03 to 1.4    0.005 to 0.05

What int8 activations hide, a wrong row say, the exact bound finds: the packed weights are held to it too, in a twin of what is
served that computes with float activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Bound:
    """The largest difference of log-probabilities, in nats, that rounding explains: of any token (max), or on average."""

    statistic: Literal["max", "mean"]
    value: float


EXACT = Bound("max", 1e-3)
"""Float activations: only the order of float32 additions differs."""
APPROXIMATED = Bound("max", 5e-3)
"""GELU by another formula: ONNX Runtime's O3 by tanh (MiniLM 0.0016), vLLM's BLOOM without it (0.0011)."""
TABLE = Bound("max", 0.02)
"""GELU from a table in float16, ggml's: 0.0009 to 0.003 with 2 layers, 0.0037 with 46, 0.0056 in Gemma 3 270M. PyTorch with the
same table in that model moves by 0.0023 to 0.0057, as inputs, moved by 1e-6, fall on this or that side of what float16 tells apart.
"""
HALF = Bound("max", 0.1)
"""Float16 throughout, embedding and head included."""
BRAIN = Bound("mean", 0.05)
"""Bfloat16 throughout, 8 bits of mantissa: single tokens may move, the average hardly."""
FP8 = Bound("mean", 0.15)
"""Activations, or keys and values, rounded to 8-bit floats (e4m3) at run time."""
INT8_ACTIVATIONS = Bound("mean", 0.15)
"""Activations rounded to int8 at run time: single tokens may move far, the average may not."""
SATURATING = Bound("mean", 0.4)
"""The same where pairs of 8-bit products are added in int16, which cuts off what does not fit."""


def loosest(*bounds: Bound) -> Bound:
    """The one that allows most; a mean allows single tokens what no max does."""
    return max(bounds, key=lambda bound: (bound.statistic == "mean", bound.value))


def sixteen_bits(name: str) -> Bound | None:
    """The bound of computing in a float of 16 bits; None for another name."""
    return {"float16": HALF, "bfloat16": BRAIN}.get(name)
