"""Pages of files that are only read are given back; nothing else is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from featherweight.store.mapped import give_back, seal


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
