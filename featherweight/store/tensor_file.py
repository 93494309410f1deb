"""Files of tensors that are written one by one: what a stage makes of a large model never stands in memory as a whole."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.store.mapped import give_back

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kind = tuple["torch.dtype", tuple[int, ...]]
"""Type and shape of a tensor."""

KINDS = {
    "int64": "I64",
    "float32": "F32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
}
"""What safetensors calls what is written here, in the order in which it lays tensors out."""

PYTORCH = {"format": "pt"}
"""What transformers wants said of a checkpoint's weights."""


def write_tensors(
    path: Path, kinds: Mapping[str, Kind], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] = PYTORCH
) -> None:
    """Write a safetensors file tensor by tensor, in any order: byte for byte what safetensors' save_file writes of all at once."""
    import torch

    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    types = {name: str(dtype).removeprefix("torch.") for name, (dtype, _) in kinds.items()}
    ends = 0
    for name in sorted(kinds, key=lambda name: (list(KINDS).index(types[name]), name)):
        dtype, shape = kinds[name]
        begin, ends = ends, ends + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": KINDS[types[name]], "shape": list(shape), "data_offsets": [begin, ends]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + ends)
        for name, tensor in tensors:
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            give_back(tensor)
