"""Graphs of one model, whose constants lie in one file: what several of them hold is stored once, and mapped once."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

DATA = "weights.data"
# Shape inference reads small tensors such as the target of a Reshape, and cannot when they lie in the data file.
SMALL_BYTES = 1024
PAGE, WORD = 4096, 64
LARGE_BYTES = 1 << 16
"""From here on a constant begins on a page of its own, so that ONNX Runtime maps it; smaller ones it may copy."""


def save_together(models: Mapping[str, ir.Model], out: Path) -> None:
    """Write graphs by their names to the folder `out`, and their large constants to one file, equal ones once."""
    known: dict[bytes, tuple[int, int]] = {}
    with (out / DATA).open("wb") as file:
        for model in models.values():
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < SMALL_BYTES:
                    continue
                content = tensor.tobytes()
                key = blake2b(content).digest()
                if key not in known:
                    file.write(bytes(-file.tell() % (PAGE if len(content) >= LARGE_BYTES else WORD)))
                    known[key] = file.tell(), len(content)
                    file.write(content)
                value.const_value = _lying(value, out, *known[key])
    for name, model in models.items():
        _save(model, out / name)


def _lying(value: ir.Value, out: Path, offset: int, length: int) -> ir.ExternalTensor:
    """A constant whose numbers lie in the file."""
    import onnx_ir

    tensor = value.const_value
    assert tensor is not None and value.name is not None
    shape = onnx_ir.Shape(tensor.shape.numpy())
    return onnx_ir.ExternalTensor(DATA, offset, length, tensor.dtype, shape=shape, name=value.name, base_dir=out)


def _save(model: ir.Model, path: Path) -> None:
    import onnx_ir

    onnx_ir.save(model, path)
