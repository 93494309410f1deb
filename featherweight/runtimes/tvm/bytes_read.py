"""What TVM holds of a compiled model while it serves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from featherweight.runtimes.bytes_read import HeldTensor, headers


def held_tensors(folder: Path) -> Iterator[HeldTensor]:
    """Every parameter as it lies in the file: of tables a token reads a row, and all else is read whole."""
    tables = set(json.loads((folder / "manifest.json").read_text())["tables"])
    for name, shape, _, size in headers(folder):
        yield HeldTensor("row" if name in tables else "step", size, shape[0] if shape else math.prod(shape))
