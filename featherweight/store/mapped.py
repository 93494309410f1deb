"""Memory that is given back at once: pages of mapped files that are only read, and what the heap has free.

The system would take the former when it wants their room; glibc keeps the latter for the next allocations of this process.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

SMALL = 1 << 20
"""Bytes below which it is not worth asking."""
_MADV_DONTNEED = 4


def seal(tensor: Tensor) -> None:
    """Let nobody write to the mapped file in whose memory `tensor` lies: who tries ends with a fault, and does not go unnoticed."""
    begin = tensor.untyped_storage().data_ptr()
    found = _mapping(begin) if sys.platform == "linux" and tensor.numel() else None
    if found and found.of_a_file and found.writable:
        _libc().mprotect(ctypes.c_void_p(found.begin), ctypes.c_size_t(found.end - found.begin), mmap.PROT_READ)


def give_back(tensor: Tensor | numpy.ndarray) -> None:
    """Let go of the pages that a tensor was read from, where it lies in a sealed file: reading it again maps them again.

    Nothing happens to tensors in memory of their own, to what might have been written to, nor on another system than Linux.
    """
    begin, size = _place(tensor)
    if size < SMALL or sys.platform != "linux":
        return
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, (begin + size) // mmap.PAGESIZE * mmap.PAGESIZE
    found = _mapping(first)
    if found and found.of_a_file and not found.writable and last <= found.end:
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)


def give_back_heap() -> None:
    """Let go of what the heap has free, before another process wants the room. Nothing happens without glibc."""
    gc.collect()
    trim = getattr(_libc(), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def spilled(tensor: Tensor, folder: Path | None) -> Tensor:
    """`tensor` in a file of `folder` without a name, mapped and only to be read; itself where it is small, or there is no folder.

    Raises OSError where the disk is full.
    """
    import torch

    if folder is None or tensor.nbytes < SMALL:
        return tensor
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(flat.numpy().data)
        file.flush()
        mapped = torch.from_file(file.name, shared=False, size=len(flat), dtype=torch.uint8)
    found = mapped.view(tensor.dtype).view(tensor.shape)
    seal(found)
    return found


def _place(tensor: Tensor | numpy.ndarray) -> tuple[int, int]:
    """Address and bytes of the memory that it was cut from; (0, 0) on a GPU."""
    if hasattr(tensor, "ctypes"):
        return tensor.ctypes.data, tensor.nbytes
    storage = tensor.untyped_storage()
    return (storage.data_ptr(), storage.nbytes()) if tensor.device.type == "cpu" else (0, 0)


class _Mapping(NamedTuple):
    begin: int
    end: int
    writable: bool
    of_a_file: bool


def _mapping(address: int) -> _Mapping | None:
    """What an address of this process belongs to."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, _, _, inode, *_ = line.split(maxsplit=5)
        begin, end = (int(place, 16) for place in span.split("-"))
        if begin <= address < end:
            return _Mapping(begin, end, "w" in rights, inode != "0")
    return None


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)
