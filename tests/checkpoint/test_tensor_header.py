"""A header that safetensors refuses is told of in the plan, which does not open the file; one that it takes is not."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from featherweight.checkpoint.files import Listing, check_length
from featherweight.checkpoint.tensor_header import BITS
from featherweight.errors import CheckpointError

FILE = "model.safetensors"


def written(folder: Path, **changes: Any) -> Listing:
    """Two tensors of 4 and 6 floats, and what the header says otherwise of the second."""
    save_file({"a": torch.ones(2, 2), "b": torch.ones(2, 3)}, folder / FILE)
    content = (folder / FILE).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["b"] |= changes
    told = json.dumps(header).encode()
    (folder / FILE).write_bytes(struct.pack("<Q", len(told)) + told + content[8 + length :])
    return Listing.of(folder)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"data_offsets": [12, 40]}, "tensor b overlaps with the one before it: from byte 12, not 16"),
        ({"data_offsets": [20, 40]}, "tensor b lies behind bytes that are no tensor's: from byte 20, not 16"),
        ({"shape": [2, 2]}, r"tensor b has the shape \[2, 2\] of F32 in 24 bytes"),
        ({"dtype": "F16"}, r"tensor b has the shape \[2, 3\] of F16 in 24 bytes"),
        ({"dtype": "F33"}, "tensor b is of the type 'F33', which safetensors does not know"),
        ({"data_offsets": [16]}, "has no safetensors header"),
    ],
)
def test_what_safetensors_refuses_is_refused_by_the_header(changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    listing = written(tmp_path, **changes)
    with pytest.raises(SafetensorError), safe_open(tmp_path / FILE, framework="pt"):
        pass
    with pytest.raises(CheckpointError, match=fault):
        check_length(listing, FILE)


def test_every_type_that_torch_stores_has_its_width(tmp_path: Path) -> None:
    types = [torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16]
    types += [torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]
    save_file({str(kind): torch.zeros(3, 5).to(kind) for kind in types} | {"none": torch.zeros(0)}, tmp_path / FILE)
    assert {told["dtype"] for told in check_length(Listing.of(tmp_path), FILE).values()} <= BITS.keys()
