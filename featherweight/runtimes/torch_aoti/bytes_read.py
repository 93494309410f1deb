"""What the graphs hold while they serve: of a decoder those that its step reads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from featherweight.runtimes.bytes_read import HeldTensor

WIDTH = 4
"""Bytes of a float32."""


def held_tensors(folder: Path) -> Iterator[HeldTensor]:
    """Of tables a token reads a row; all else that the step reads is read whole."""
    told = json.loads((folder / "manifest.json").read_text())
    tables = set(told["tables"])
    for name, view in told["constants"].get("step", {}).items():
        if view is not None:
            size = WIDTH * math.prod(view["shape"])
            yield HeldTensor("row" if name in tables else "step", size, view["shape"][0] if view["shape"] else 1)
