"""What ONNX Runtime holds while it serves, by a decoder's graph."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from featherweight.runtimes.bytes_read import ROLES, HeldTensor, Role

LOOKED_UP = ("Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding")
"""Operators that read rows of a constant: of an embedding, or of the cosines and sines of positions."""
VIEWS = ("Reshape", "Transpose", "Identity")


def graph_tensors(path: Path) -> Iterator[HeldTensor]:
    """A decoder's graph: what reads a constant tells its role. The weights' own file is not opened."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    behind = {one.name: one.name for one in graph.initializer}
    roles: dict[str, Role] = {}
    for node in graph.node:
        if node.op_type in VIEWS and node.input[0] in behind:
            behind[node.output[0]] = behind[node.input[0]]
            continue
        role: Role = "row" if node.op_type in LOOKED_UP else "step"
        for name in {behind[value] for value in node.input if value in behind}:
            roles[name] = max(role, roles.get(name, role), key=ROLES.index)
    for one in graph.initializer:
        if one.name in roles:
            size = math.prod(one.dims) * onnx.helper.tensor_dtype_to_np_dtype(one.data_type).itemsize
            yield HeldTensor(roles[one.name], size, one.dims[0] if one.dims else 0)
