"""Pages of files that are only read are given back; nothing else is."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from featherweight.store.mapped import SMALL, give_back, give_back_heap, seal, spilled


def in_files() -> int:
    """Bytes of mapped files that this process holds."""
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "RssFile" in line)


@pytest.fixture
def mapped(tmp_path: Path) -> torch.Tensor:
    save_file({"a": torch.arange(8 << 20, dtype=torch.float32)}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        return file.get_tensor("a")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives pages back")
def test_pages_of_a_sealed_file_are_given_back_and_read_again(mapped: torch.Tensor) -> None:
    seal(mapped)
    assert mapped.sum() > 0
    held = in_files()
    give_back(mapped)
    assert held - in_files() > 24 << 20
    assert torch.equal(mapped, torch.arange(8 << 20, dtype=torch.float32))


def test_what_may_have_been_written_to_is_kept(mapped: torch.Tensor) -> None:
    own = torch.ones(1 << 20)
    mapped.fill_(3)
    for tensor in (mapped, own):
        give_back(tensor)
    assert (mapped == 3).all() and (own == 1).all()


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux alone")
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float32])
def test_a_spilled_tensor_lies_in_a_file_without_a_name(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.arange(SMALL + 100).view(-1, 4).remainder(100).to(dtype)
    found = spilled(tensor.T, tmp_path)
    assert found.dtype == dtype
    assert found.shape == tensor.T.shape
    assert torch.equal(found.float(), tensor.T.float())
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    give_back(found)
    assert torch.equal(found.float(), tensor.T.float())
    assert spilled(tensor, None) is tensor
    assert spilled(tensor[:5], tmp_path).untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="no glibc")
def test_what_the_heap_has_free_is_given_back() -> None:
    blocks = [bytearray(b"x") * 50_000 for _ in range(3000)]
    last = blocks[-1]  # what lies behind the others is not given back by itself
    blocks.clear()
    held = anonymous_kib()
    give_back_heap()
    assert held - anonymous_kib() > 50_000 and len(last) == 50_000


def anonymous_kib() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
