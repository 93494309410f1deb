"""CTranslate2's results as numpy arrays, wherever and in whatever float they were computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from featherweight.system.device import CPU

if TYPE_CHECKING:
    from numpy import ndarray


def in_memory(view: Any) -> ndarray:
    """A StorageView as float32 in main memory: numpy reads no GPU's memory, and knows no bfloat16."""
    import ctranslate2
    import numpy

    if view.device != CPU:
        view = view.to_device(ctranslate2.Device.cpu)
    if view.dtype != ctranslate2.DataType.float32:
        view = view.to(ctranslate2.DataType.float32)
    return numpy.asarray(view)
