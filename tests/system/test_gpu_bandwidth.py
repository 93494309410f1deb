"""The bandwidth of a GPU: by the same copies on any device; without one the reason comes back."""

import pytest

from featherweight.errors import StageError
from featherweight.system.gpu_bandwidth import copy_bandwidth_bytes_s, gpu_bandwidth_bytes_s


@pytest.mark.slow
def test_copies_are_counted_as_read_and_written():
    # A DDR3 stick moves some GB/s, the fastest GPU of today 8 TB/s; small buffers stay in a CPU's caches.
    assert 1e7 < copy_bandwidth_bytes_s("cpu", 2**26) < 3e13


@pytest.mark.slow
def test_a_gpu_is_measured_where_there_is_one():
    import torch

    if torch.cuda.is_available():
        assert 5e10 < gpu_bandwidth_bytes_s() < 3e13
        return
    with pytest.raises(StageError, match="could not be measured"):
        gpu_bandwidth_bytes_s()
