"""Linear layers of PyTorch and torchao around integers and scales that were chosen elsewhere. Nothing is rounded here."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.ao.quantization.fx._decomposed  # registers quantize_per_tensor for ordinary tensors
from torch import Tensor, nn
from torch.nn import functional

from featherweight.grid import Grid
from featherweight.system.device import CPU


@dataclass(frozen=True)
class InputRange:
    """How a static layer rounds its input: to `round(x / scale) + zero_point` in 0 to `most`, one scale for all of it."""

    scale: float
    zero_point: int
    most: int

    @classmethod
    def of(cls, stored: Tensor) -> InputRange:
        """From the three numbers that `stored` gives."""
        scale, zero_point, most = stored.tolist()
        return cls(scale, int(zero_point), int(most))

    def stored(self) -> Tensor:
        """float64 [3]."""
        return torch.tensor([self.scale, self.zero_point, self.most], dtype=torch.float64)


@dataclass(frozen=True)
class Matrix:
    """A layer's weights: `q` int8 [rows, columns] and `scales` float32 [rows, groups] on `grid`; the bias; its input's range."""

    grid: Grid
    q: Tensor
    scales: Tensor
    bias: Tensor | None = None
    input: InputRange | None = None


def saturates() -> bool:
    """Whether this CPU adds pairs of int8 products in int16, so that activations must keep to 7 bits (torch's own rule)."""
    return not torch.cpu._is_vnni_supported()


class TorchaoLinear(nn.Module):
    """F.linear with one of torchao's tensors; `columns` of the input are padded to those of the weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        self.padding = weight.shape[1] - columns

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x, (0, self.padding)) if self.padding else x
        return functional.linear(x, self.weight, self.bias)


def weight_only(matrix: Matrix) -> nn.Module:
    """torchao's weight-only tensors: Int8Tensor at 8 bits, IntxUnpackedToInt8Tensor (one byte each in memory) at 4."""
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    columns, scales = matrix.q.shape[1], matrix.scales
    size = matrix.grid.group_size or columns
    q = functional.pad(matrix.q, (0, -columns % size))
    if matrix.grid.bits == 8:
        return TorchaoLinear(Int8Tensor(q, scales, [1, size], torch.float32), matrix.bias, columns)
    zeros = torch.zeros_like(scales, dtype=torch.int8)
    int4 = torch.int4  # type: ignore[attr-defined]
    tensor = IntxUnpackedToInt8Tensor(q, scales, zeros, int4, (1, size), torch.float32, None)
    return TorchaoLinear(tensor, matrix.bias, columns)


def torchao_dynamic(matrix: Matrix) -> nn.Module:
    """torchao's Int8Tensor with activations rounded to int8 per token, symmetric about zero."""
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor, QuantizeTensorToInt8Kwargs

    activations = QuantizeTensorToInt8Kwargs(granularity=PerRow(), reduce_range=matrix.q.device.type == CPU and saturates())
    block = [1, matrix.q.shape[1]]
    tensor = Int8Tensor(matrix.q, matrix.scales, block, torch.float32, act_quant_kwargs=activations)
    return TorchaoLinear(tensor, matrix.bias, matrix.q.shape[1])


def rounded_by_torchao(x: Tensor) -> Tensor:
    """What the layers of `torchao_dynamic` multiply with in the place of `x`."""
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    return Int8Tensor.from_hp(x, PerRow(), reduce_range=x.device.type == CPU and saturates()).dequantize()


class DynamicLinear(nn.Module):
    """The kernel of `torch.ao.quantization.quantize_dynamic`, given one range per token.

    The kernel itself rounds a whole input to 8 bits by one range (7 bits where it would saturate), so that an outlier in one
    token costs all others their precision, and a result depends on what else is in the batch. As the layer is linear, every
    token is scaled to the same range first, and the result back: W x = |x| W (x / |x|).
    """

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack(_quantized_tensor(matrix), None)
        self.bias = matrix.bias
        self.reduce_range = saturates()

    def weight(self) -> Tensor:
        """The packed weights, a quantized tensor [rows, columns]; a method, as on torch's own quantized layers."""
        return torch.ops.quantized.linear_unpack(self.packed)[0]

    def forward(self, x: Tensor) -> Tensor:
        peak = _peaks(x)
        y = torch.ops.quantized.linear_dynamic(x if peak is None else x / peak, self.packed, self.reduce_range)
        y = y if peak is None else y.mul_(peak)
        return y if self.bias is None else y.add_(self.bias)


def _peaks(x: Tensor) -> Tensor | None:
    """The largest number of each token; None of a single one, which has a range of its own."""
    return None if x.numel() == x.shape[-1] else x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def rounded_by_torch(x: Tensor) -> Tensor:
    """What a `DynamicLinear` multiplies with in the place of `x`."""
    peak = _peaks(x)
    one = x if peak is None else x / peak
    scale, zero_point = torch._choose_qparams_per_tensor(one, saturates())
    rounded = torch.fake_quantize_per_tensor_affine(one, scale, zero_point, 0, 255)
    return rounded if peak is None else rounded * peak


def _quantized_tensor(matrix: Matrix) -> Tensor:
    rows = matrix.q.shape[0]
    scales, zeros = matrix.scales.squeeze(1).double(), torch.zeros(rows, dtype=torch.long)
    with warnings.catch_warnings():  # torch announces that these tensors will go; the kernel takes nothing else
        warnings.simplefilter("ignore", UserWarning)
        return torch._make_per_channel_quantized_tensor(matrix.q, scales, zeros, 0)


class StaticLinear(nn.Module):
    """What torchao's PT2E flow lowers a static int8 Linear to on x86: one rounding of the input, oneDNN's int8 product."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        if matrix.input is None:
            raise ValueError("a static layer needs the range of its input")
        self.input, self.bias = matrix.input, matrix.bias
        self.packed = torch.ops.onednn.qlinear_prepack(matrix.q, None)
        self.scales = matrix.scales.squeeze(1).contiguous()
        self.zeros = torch.zeros(len(self.scales), dtype=torch.long)

    def weight(self) -> Tensor:
        """The packed weights, in oneDNN's own layout; a method, as on torch's own quantized layers."""
        return self.packed

    def forward(self, x: Tensor) -> Tensor:
        here = self.input
        rounded = torch.ops.quantized_decomposed.quantize_per_tensor(x, here.scale, here.zero_point, 0, here.most, torch.uint8)
        return torch.ops.onednn.qlinear_pointwise(
            rounded, here.scale, here.zero_point, self.packed, self.scales, self.zeros,
            self.bias, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip


class RowEmbedding(nn.Embedding):
    """An embedding with one scale per row; only the rows that are looked up become float.

    transformers' own kinds, which do something with what is looked up (Gemma and M2M-100 scale it), look up here: see `of_rows`.
    """

    q: Tensor
    scales: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The scales: whoever asks for weights asks for their type and place."""
        return self.scales

    def forward(self, ids: Tensor) -> Tensor:
        return self.q[ids].float() * self.scales[ids]


def of_rows(embedding: nn.Embedding, matrix: Matrix) -> nn.Embedding:
    """`embedding` itself, of its own kind still, with integers in the place of its weights."""
    del embedding._parameters["weight"]
    kind = type(embedding)
    own = (kind, RowEmbedding) if kind is not nn.Embedding else (RowEmbedding,)
    embedding.__class__ = type(kind.__name__, own, {"weight": RowEmbedding.weight})
    embedding.q, embedding.scales = matrix.q, nn.Parameter(matrix.scales, requires_grad=False)
    return embedding
