"""What an engine has to offer for a checkpoint, and how near it comes to a machine's roofs: what advice is made of.

Each engine's stand in its own folder, beside where they were measured. Nothing here shapes a result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from featherweight.spec import GridName
from featherweight.system.device import CPU, Device

Numbers = Literal["float32", "float16", "int8", "fp8"]
"""What matrix products are computed in; bfloat16 is as fast as float16."""
ASSUMED = "assumed, not measured here"
MIB = 2.0**20


@dataclass(frozen=True)
class Reach:
    """How near an engine comes to a machine's roofs, and what each of its passes takes beside.

    memory: share of the bandwidth at which it reads weights. arithmetic: on a CPU share of the speed of a large float32 product
    (above 1 where int8 is faster than that), on a GPU of its data sheet. layer_s, step_s: seconds of a pass for each layer, and
    once. source: where that comes from. prompt: share of the arithmetic while a prompt, or an encoder's text, is read, whose many
    rows are other products than those of a few sequences; 0 where it is the same.
    """

    memory: float
    arithmetic: float
    layer_s: float
    step_s: float = 0.0
    source: str = ASSUMED
    prompt: float = 0.0

    @property
    def reading(self) -> float:
        """Share of the arithmetic while a prompt is read."""
        return self.prompt or self.arithmetic


@dataclass(frozen=True)
class Offer:
    """One way of an engine's to serve, as a recipe says it.

    keys: of the last stage, beside `engine`. grid, head: of the quantize stage before it, None for float. mixed: the most sensitive
    matrices lie on this grid instead. width, cache: bytes of a weight that is in float, and of a number of the key-value cache.
    scale: bytes of a scale. body_bytes, head_bytes: of a weight in memory, where that is not what its grid takes. base: bytes of
    its process beside what a model takes. loss: what it adds to the loss of rounded weights, as a share of bits per byte.
    parts: GPUs that share every layer.
    """

    reach: Reach
    keys: Mapping[str, Any] = field(default_factory=dict)
    grid: GridName | None = None
    head: GridName | None = None
    mixed: GridName | None = None
    numbers: Numbers = "float32"
    width: float = 4
    cache: float = 4
    scale: float = 4
    body_bytes: float | None = None
    head_bytes: float | None = None
    base: float = 500 * MIB
    loss: float = 0.0
    parts: int = 1
    device: Device = CPU
    batching: Literal["static", "continuous"] = "static"
