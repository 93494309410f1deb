"""Tensors written one by one make the very file that safetensors writes of all at once."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from featherweight.store.tensor_file import PYTORCH, write_tensors


def test_the_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors = {
        "b.q": torch.arange(-6, 6, dtype=torch.int8).view(3, 4).T,
        "a.scales": torch.randn(3, 1),
        "a.q": torch.randn(2, 5).to(torch.float8_e4m3fn),
        "é": torch.tensor(1.5),
        "none": torch.empty(0, 7),
        **{f"{kind}": torch.ones(2, 3).to(kind) for kind in (torch.bfloat16, torch.float16, torch.int32, torch.int64)},
    }
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    for metadata in (PYTORCH, {}):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", metadata or None)
        write_tensors(tmp_path / "ours", kinds, tensors.items(), metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert all(torch.equal(tensor.float(), tensors[name].float()) for name, tensor in load_file(tmp_path / "ours").items())
