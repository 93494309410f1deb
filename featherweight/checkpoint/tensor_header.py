"""Whether a safetensors header says of each tensor what its file can hold, as the library asks of it when it opens one."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

BITS: dict[str, int] = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
"""The width of a number of each type."""


def header_fault(tensors: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What is wrong with the types, shapes or places in a header; None where nothing is.

    tensors: of each its `dtype`, `shape` and `data_offsets`, which lie one behind the other from 0 on.
    """
    end = 0
    for name, told in sorted(tensors.items(), key=lambda item: list(item[1]["data_offsets"])):
        (first, last), shape, bits = told["data_offsets"], told["shape"], BITS.get(str(told.get("dtype")))
        if bits is None:
            return f"tensor {name} is of the type {told.get('dtype')!r}, which safetensors does not know"
        if first != end:
            what = "overlaps with the one before it" if first < end else "lies behind bytes that are no tensor's"
            return f"tensor {name} {what}: from byte {first}, not {end}"
        if any(type(one) is not int or one < 0 for one in shape) or prod(shape) * bits != 8 * (last - first):
            return f"tensor {name} has the shape {list(shape)} of {told['dtype']} in {last - first} bytes"
        end = last
    return None
