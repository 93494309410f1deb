"""The memory bandwidth of a GPU, measured: the roof of decoding there (see featherweight/measure/roofline.py).

Measured in a process of its own, so that whoever asks keeps no context on the GPU, and through torch, which must be built for
CUDA. A copy reads and writes every byte, and reaches what a kernel that only reads does within a few percent.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from time import perf_counter

from featherweight.errors import StageError
from featherweight.system.child_process import Channel, ChildProcess

COPIED_BYTES = 2**29
"""Larger than any cache of a GPU (126 MB on a B200), many times over."""
PASSES, COPIES = 8, 8
PATIENCE_S = 120.0


@lru_cache
def gpu_bandwidth_bytes_s(index: int = 0) -> float:
    """Bytes per second that the memory of a GPU, by CUDA's number, moves. Raises StageError where it cannot be measured."""
    child = ChildProcess([sys.executable, "-m", "featherweight.system.gpu_bandwidth", str(index)], os.environ)
    try:
        answer = child.receive(PATIENCE_S)
        if answer is None:
            raise StageError(f"the GPU's memory bandwidth could not be measured; {child.tail()}")
        return float(answer["bytes_per_s"])
    except TimeoutError as error:
        child.kill()
        raise StageError(f"the GPU's memory bandwidth could not be measured: {error}") from error
    finally:
        child.close()


def copy_bandwidth_bytes_s(device: str, most_bytes: int = COPIED_BYTES) -> float:
    """Bytes read and written per second by copies within a device's memory, the best of several passes."""
    import torch

    on_gpu = device.startswith("cuda")
    size = min(most_bytes, torch.cuda.mem_get_info(device)[0] // 4) if on_gpu else most_bytes
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def run(copies: int) -> float:
        began = perf_counter()
        for _ in range(copies):
            target.copy_(source)
        if on_gpu:
            torch.cuda.synchronize(device)
        return perf_counter() - began

    run(1)
    return 2 * COPIES * size / min(run(COPIES) for _ in range(PASSES))


if __name__ == "__main__":
    replies = Channel.claim_stdout()
    replies.send({"bytes_per_s": copy_bandwidth_bytes_s(f"cuda:{sys.argv[1]}")})
