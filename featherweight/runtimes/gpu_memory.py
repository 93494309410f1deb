"""What a serving process takes of the GPUs' memory, asked of the driver around each of its works.

Allocators of engines keep what they have taken, so that the end of a work shows its peak; what a library gives back before the
work ends is not seen (`peak_tensor_bytes` of PyTorch's engines sees that as well).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from featherweight.system import gpu

Result = TypeVar("Result")


class GpuMemory:
    """The peak of one process and its children.

    By the driver's count of that process, where it keeps one. Inside a container it knows processes by other numbers: there it is
    by how much more memory the GPUs hold after a work than before. Served variants work in turns, so that nobody else's
    is counted, as long as the GPU serves nobody else.
    """

    def __init__(self, pid: int) -> None:
        self.pid, self.grown, self.peak = pid, 0, 0
        self.known = True

    @property
    def peak_bytes(self) -> int | None:
        """The most that was held after a work; None where the driver tells nothing."""
        return self.peak if self.known else None

    def around(self, work: Callable[[], Result]) -> Result:
        """Do `work`, and note what the process holds then."""
        before = gpu.memory_in_use_bytes()
        result = work()
        after = gpu.memory_in_use_bytes()
        if before is not None and after is not None:
            self.grown += after - before
        told = gpu.process_memory_bytes(self.pid)
        self.known = told is not None or (before is not None and after is not None)
        self.peak = max(self.peak, self.grown if told is None else told)
        return result
