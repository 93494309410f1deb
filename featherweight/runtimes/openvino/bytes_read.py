"""What OpenVINO holds while it serves, by its graph's description; the weights' own file is not opened."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from featherweight.runtimes.bytes_read import ROLES, HeldTensor, Role

BITS = {"f32": 32, "f16": 16, "bf16": 16, "i8": 8, "u8": 8, "i4": 4, "u4": 4}
"""Of a number of each type that weights are stored in; others describe shapes."""
VIEWS = ("Convert", "Multiply", "Subtract", "Reshape", "Transpose")
"""Operations between integers and the floats that they stand for."""


def graph_tensors(path: Path) -> Iterator[HeldTensor]:
    """What reads a constant, directly or behind its scales, tells its role."""
    root = ElementTree.parse(path).getroot()
    layers = {layer.attrib["id"]: layer for layer in root.iterfind("layers/layer")}
    readers: dict[str, list[str]] = {}
    for edge in root.iterfind("edges/edge"):
        readers.setdefault(edge.attrib["from-layer"], []).append(edge.attrib["to-layer"])
    kinds = {name: layer.attrib["type"] for name, layer in layers.items()}
    for name, layer in layers.items():
        data = layer.find("data")
        if kinds[name] != "Const" or data is None or data.attrib["element_type"] not in BITS:
            continue
        shape = [int(size) for size in data.attrib["shape"].split(",") if size.strip()]
        role: Role = max(_roles(name, kinds, readers, 0), key=ROLES.index, default="step")
        yield HeldTensor(role, math.prod(shape) * BITS[data.attrib["element_type"]] / 8, shape[0] if shape else 0)


def _roles(name: str, kinds: dict[str, str], readers: dict[str, list[str]], depth: int) -> Iterator[Role]:
    """A table's rows are gathered; all else is multiplied or added. Integers and floats are a few views apart."""
    for reader in readers.get(name, ()):
        if kinds[reader] in VIEWS and depth < len(VIEWS):
            yield from _roles(reader, kinds, readers, depth + 1)
        else:
            yield "row" if kinds[reader] == "Gather" else "step"
