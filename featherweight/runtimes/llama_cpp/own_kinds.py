"""llama.cpp's own kinds of numbers, K-quants and IQ4_NL, as its own quantizer rounds to them, row by row.

They lie on no grid of ours: blocks of K-quants have scales that are integers themselves, IQ4_NL's values are not evenly spaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from featherweight.model.matrices import ends, matrices, rows_of
from featherweight.runtimes.llama_cpp import library
from featherweight.runtimes.llama_cpp.tensors import expert_matrices
from featherweight.store.mapped import give_back, spilled

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

    from featherweight.runtimes.writing import Source

OWN = {"q4_k": "Q4_K", "q5_k": "Q5_K", "q6_k": "Q6_K", "iq4_nl": "IQ4_NL"}
"""ggml's type of the matrices in the blocks, by what a recipe calls it."""
VOCABULARY = "Q6_K"
"""Of embedding and head, as in llama.cpp's own mixtures."""
NARROWER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama.cpp takes where a row is no multiple of a K-quant's 256 weights."""

Stored = Mapping[str, tuple[Any, Callable[[], "ndarray"]]]
"""(ggml's type, what makes uint8 [rows, bytes of a row]) of each matrix, by the parameter's name."""


def round_by_llama_cpp(source: Source, precision: str, importance: Mapping[str, Tensor]) -> Stored:
    """Every matrix as llama.cpp's quantizer stores it; `source` then computes with the weights that those bytes stand for.

    importance: what the errors of each column of a matrix weigh, by the parameter's name; all alike where it has none.
    """
    import torch

    stored: dict[str, tuple[Any, Callable[[], ndarray]]] = {}
    vocabulary, turned = ends(source.model), set[str]()
    for name, parameter, transposed in (*matrices(source.model), *expert_matrices(source.model)):
        turned |= {name} if transposed else set()
        rows = rows_of(parameter, transposed)
        made, kind = rounded_rows(rows, VOCABULARY if id(parameter) in vocabulary else OWN[precision], importance.get(name))
        stored[name] = (kind, spilled(torch.from_numpy(made), source.room).numpy)
        give_back(parameter)
        if not source.streams:
            rows.copy_(_meant(stored[name]))
    if source.streams:
        meant = {name: partial(_meant, one) if name not in turned else partial(_turned, one) for name, one in stored.items()}
        source.change = lambda name, weight: meant[name]() if name in meant else weight
    return stored


def _meant(stored: tuple[Any, Callable[[], ndarray]]) -> Tensor:
    """The weights that the bytes of a matrix stand for."""
    import torch
    from gguf.quants import dequantize

    kind, make = stored
    return torch.from_numpy(dequantize(make(), kind))


def _turned(stored: tuple[Any, Callable[[], ndarray]]) -> Tensor:
    """The same of a matrix that holds a row in each column."""
    return _meant(stored).T


def rounded_rows(rows: Tensor, kind: str, importance: Tensor | None = None) -> tuple[ndarray, Any]:
    """A matrix [rows, columns], or one for each expert, in blocks of `kind`, or of the one that takes its place.

    importance: see round_by_llama_cpp.
    """
    import numpy
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    values = numpy.ascontiguousarray(rows.float().numpy())
    count, columns = values.size // values.shape[-1], values.shape[-1]
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    found = GGMLQuantizationType[NARROWER[kind] if columns % block and kind in NARROWER else kind]
    block, size = GGML_QUANT_SIZES[found]
    stored = numpy.empty((count, columns // block * size), numpy.uint8)
    weighs = None if importance is None else numpy.ascontiguousarray(importance.float().numpy())
    matrix = None if weighs is None else weighs.ctypes.data
    library.library().ggml_quantize_chunk(found.value, values.ctypes.data, stored.ctypes.data, 0, count, columns, matrix)
    return stored.reshape(*values.shape[:-1], -1), found
