"""What llama.cpp offers, and how fast it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from featherweight.runtimes.offers import MIB, Offer, Reach

_FLOAT = Reach(0.45, 0.20, 2e-5)
_EIGHT = Reach(0.42, 0.40, 2e-5, source="benchmarks/advice.md: llama.cpp Q8_0", prompt=0.55)
_FOUR = Reach(0.38, 0.50, 2e-5, source="benchmarks/advice.md: llama.cpp Q4_0", prompt=0.60)


def offers() -> Iterator[Offer]:
    """Rounded weights have activations rounded to int8 block by block; keys and values are kept in float16."""
    base = 60 * MIB
    yield Offer(_FLOAT, {"precision": "float32"}, base=base, batching="continuous")
    half = Offer(_FLOAT, {"precision": "float16"}, width=2, cache=2, base=base, batching="continuous", loss=0.0005)
    yield half
    eight = replace(
        half, reach=_EIGHT, keys={"precision": "int8"}, grid="int8-g32", head="int8-g32", numbers="int8", scale=2, loss=0.001
    )
    yield eight
    yield replace(eight, reach=_FOUR, keys={"precision": "int4"}, grid="int4-g32")
