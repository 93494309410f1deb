"""Variables of a CTranslate2 model that are made when they are written, one at a time.

CTranslate2's own hold all that will be in the file; these hold what the file is made from: tensors of the model, which may lie in
the checkpoint's files, and the places of quantized rows.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from featherweight.runtimes.packing import Packable
from featherweight.store.mapped import give_back

if TYPE_CHECKING:
    from torch import Tensor


def integers(matrix: Packable) -> Any:
    """The int8 variable of a quantized matrix."""
    return _kinds()[0](matrix)


def defer(spec: Any) -> None:
    """Let every tensor of a specification be stored in float32, or in what its converter asks for, without a copy of it before."""
    import torch
    from ctranslate2.specs.model_spec import visit_spec

    def replace(layer: Any, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(layer, name.rpartition("/")[2], _kinds()[1](value.detach(), torch.float32))

    visit_spec(spec, replace)


@cache
def _kinds() -> tuple[Any, Any]:
    """The two classes; CTranslate2's own, which they are kinds of, is imported with the converter."""
    import torch
    from ctranslate2.specs.model_spec import Variable

    class Integers(Variable):
        def __init__(self, matrix: Packable) -> None:
            self.matrix = matrix

        shape = property(lambda self: list(self.matrix.shape))
        dtype = property(lambda self: "int8")

        def numpy(self) -> Any:
            return self.matrix.read()[0].numpy()

        def num_bytes(self) -> int:
            rows, columns = self.matrix.shape
            return rows * columns

        def to_bytes(self) -> Any:
            return self.numpy().data

        def _to(self, dtype: str) -> Any:
            raise TypeError(f"integers are not stored as {dtype}")

        def _equal(self, other: Any) -> bool:
            return self.matrix.shape == other.matrix.shape and self.matrix.digest[0] == other.matrix.digest[0]

    class Floats(Variable):
        def __init__(self, tensor: Tensor, stored_as: torch.dtype) -> None:
            self.tensor, self.stored_as = tensor, stored_as

        shape = property(lambda self: list(self.tensor.shape))
        dtype = property(lambda self: str(self.stored_as).removeprefix("torch."))

        def numpy(self) -> Any:
            return self.tensor.to(self.stored_as).contiguous().numpy()

        def num_bytes(self) -> int:
            return int(self.tensor.numel() * self.stored_as.itemsize)

        def to_bytes(self) -> Any:
            made = self.tensor.to(self.stored_as).contiguous()
            if made.data_ptr() != self.tensor.data_ptr():
                give_back(self.tensor)
            return made.reshape(-1).view(torch.uint8).numpy().data

        def _to(self, dtype: str) -> Any:
            return Floats(self.tensor, getattr(torch, dtype))

        def _equal(self, other: Any) -> bool:
            return self.stored_as == other.stored_as and torch.equal(self.tensor, other.tensor)

    return Integers, Floats
