"""What transformers and gguf do several times over while a GGUF file is read, done once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any


@contextmanager
def read_once() -> Iterator[None]:
    """A file's header is parsed, and gguf's map of tensor names made, once each.

    transformers 5.17 (modeling_gguf_pytorch_utils.py) makes the map anew for every module of a model, and reads the header for
    the configuration and again for the weights: more than half of the seconds in which a file of 135 M weights loads.
    """
    import gguf

    library: Any = gguf
    theirs = library.get_tensor_name_map, library.GGUFReader
    library.get_tensor_name_map, library.GGUFReader = cache(gguf.get_tensor_name_map), _by_path(gguf.GGUFReader)
    try:
        yield
    finally:
        library.get_tensor_name_map, library.GGUFReader = theirs


def _by_path(reader: Callable[..., Any]) -> Callable[..., Any]:
    """The reader of a path, whether it comes as text or not; nobody here writes into what it maps."""
    once = cache(lambda path: reader(path))

    @wraps(reader)
    def read(path: Any) -> Any:
        return once(str(path))

    return read
