"""How each of PyTorch's quantized engines computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from featherweight.runtimes.torch.linear import Matrix


@dataclass(frozen=True)
class Format:
    """How one of the engines computes.

    body, head: grids that float weights are rounded to. activations: how inputs of a layer are rounded.
    vocabulary: the embedding and the output head stay integers in memory, as torch's own kernels, which CPUs alone have, hold them;
    else they become float as they are loaded, because torchao would turn the whole matrix into float at every token.
    """

    body: str
    head: str
    activations: Literal["float", "dynamic", "static"]
    vocabulary: bool

    @property
    def by_row(self) -> bool:
        """It multiplies int8 by int8, and so wants one scale per row."""
        return self.activations != "float"

    def layer(self) -> Callable[[Matrix], nn.Module]:
        """What makes one Linear layer."""
        from featherweight.runtimes.torch import linear

        if self.vocabulary:
            return linear.StaticLinear if self.activations == "static" else linear.DynamicLinear
        return linear.torchao_dynamic if self.activations == "dynamic" else linear.weight_only

    def rounding(self) -> Callable[[Tensor], Tensor]:
        """What rounds the inputs of a layer of `dynamic` activations as that layer does."""
        from featherweight.runtimes.torch import linear

        return linear.rounded_by_torch if self.vocabulary else linear.rounded_by_torchao


FORMATS = {
    "torch-dynamic": Format("int8", "int8", "dynamic", vocabulary=True),
    "torch-static": Format("int8", "int8", "static", vocabulary=True),
    "torchao-int8": Format("int8", "int8", "float", vocabulary=False),
    "torchao-int4": Format("int4-g32", "int8", "float", vocabulary=False),
    "torchao-int8-dynamic": Format("int8", "int8", "dynamic", vocabulary=False),
}
WEIGHT_ONLY = "torchao-int8"
"""The engine that computes with float activations whatever lies in a folder."""
