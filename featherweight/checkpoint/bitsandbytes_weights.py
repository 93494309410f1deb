"""Weights that bitsandbytes has packed, as transformers saves them with `load_in_4bit` or `load_in_8bit`.

8 bits (LLM.int8): `weight` int8 [rows, columns] and `SCB`, the largest value of each row, which 127 stands for. 4 bits (NF4, FP4):
`weight` two numbers a byte, the first in the high half, each a place in `weight.quant_map`, times its block's `weight.absmax`;
of weights that are quantized twice absmax is a place in `nested_quant_map` in turn. What else is to be known of a weight, its shape
among it, stands as JSON in `weight.quant_state.bitsandbytes__nf4`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.packed_layers import Found, Layer

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "bitsandbytes"
LARGEST = 127
ROWS, STATE = ".SCB", ".weight.quant_state."
PARTS = (".SCB", ".absmax")
BESIDE = r"SCB|weight_format|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)"
"""Names, behind a module's, of what stands for a weight, and has no place in a float model."""


def bits_of(settings: Mapping[str, Any]) -> int | None:
    """4 or 8; None where the settings say neither."""
    told = {4: "load_in_4bit", 8: "load_in_8bit"}
    return next((bits for bits, key in told.items() if settings.get(key) or settings.get(f"_{key}")), None)


def read(_: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Found:
    """Every packed weight: of 8 bits as integers, of 4 bits as floats, whose steps are not even."""
    found = Found()
    for name in sorted(tensors):
        if name.endswith(ROWS):
            module = name.removesuffix(ROWS)
            _require_rows(tensors.get(f"{module}.weight_format"), module)
            found.layers[f"{module}.weight"] = _rows(tensors[f"{module}.weight"], tensors[name])
        elif STATE in name:
            module = name.partition(STATE)[0]
            found.floats[f"{module}.weight"] = _blocks(f"{module}.weight", tensors, tensors[name])
    return found


def _require_rows(form: Tensor | None, module: str) -> None:
    """Raise ValueError for integers in one of the tiled orders that bitsandbytes once had for some GPUs (all but 0)."""
    if form is not None and bool(form.any()):
        raise ValueError(f"{module}.weight_format is {int(form.max())}, an order that bitsandbytes reads no more")


def _rows(q: Tensor, largest: Tensor) -> Layer:
    if tuple(largest.shape) != (q.shape[0],):
        raise ValueError(f"{list(largest.shape)} scales of {list(q.shape)} integers")
    return Layer(8, q, (largest.float() / LARGEST)[:, None], q.shape[1])


def _blocks(name: str, tensors: Mapping[str, Tensor], state: Tensor) -> Tensor:
    """The weight, float32."""
    import torch

    told = json.loads(bytes(state.tolist()))
    packed = tensors[name].contiguous().view(torch.uint8).flatten()
    places = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: math.prod(told["shape"])]
    largest = tensors[f"{name}.absmax"]
    if "nested_offset" in told:
        outer = _spread(tensors[f"{name}.nested_absmax"].float(), told["nested_blocksize"], largest.numel())
        largest = tensors[f"{name}.nested_quant_map"].float()[largest.flatten().long()] * outer + told["nested_offset"]
    scales = _spread(largest.float(), told["blocksize"], places.numel())
    return (tensors[f"{name}.quant_map"].float()[places.long()] * scales).reshape(told["shape"])


def _spread(scales: Tensor, size: int, count: int) -> Tensor:
    """For each of `count` numbers the scale of its block; raises ValueError where there are not as many as the blocks."""
    if scales.numel() != -(-count // size):
        raise ValueError(f"{scales.numel()} scales of {count} numbers in blocks of {size}")
    return scales.flatten().repeat_interleave(size)[:count]
