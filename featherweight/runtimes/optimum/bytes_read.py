"""What ONNX Runtime holds of Optimum's graphs while it serves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from featherweight.runtimes.bytes_read import HeldTensor
from featherweight.runtimes.onnx.bytes_read import graph_tensors

ONCE, STEP = ("encoder_model.onnx", "decoder_model.onnx"), "decoder_with_past_model.onnx"


def held_tensors(folder: Path) -> Iterator[HeldTensor]:
    """Of a decoder's one graph; or of an encoder and of the decoder's first pass, read once, and of the graph of all others."""
    alone = folder / "model.onnx"
    yield from graph_tensors(alone if alone.is_file() else folder / STEP)
    for name in ONCE:
        if (folder / name).is_file():
            yield from (replace(one, role="once") for one in graph_tensors(folder / name) if one.role != "row")
