"""The tensors of a model under llama.cpp's names, and in its order of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from featherweight.errors import StageError
from featherweight.model.matrices import matrices
from featherweight.model.positions import head_width, rotary_kinds, rotated_channels
from featherweight.runtimes.llama_cpp.answers import head_parameters
from featherweight.runtimes.llama_cpp.architectures import ARCHITECTURES, Architecture
from featherweight.runtimes.llama_cpp.refusals import OTHERS
from featherweight.runtimes.llama_cpp.shapes import attention_scale, key_heads

if TYPE_CHECKING:
    from gguf import TensorNameMap
    from numpy import ndarray
    from torch import Tensor, nn
    from transformers import PreTrainedModel

GATE_UP = "gate_up_proj"
"""What transformers calls the two matrices of each expert that read the same."""


class Tensors:
    """Names and order of a model's parameters, and those of them that are no matrices of one layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.config = model, model.config
        self.known = ARCHITECTURES[model.config.model_type]
        self._names = _names(self.known, model.config.num_hidden_layers)

    def name(self, parameter: str) -> str:
        """llama.cpp's name of a parameter; raises StageError where it has none."""
        known = parameter
        for theirs, other in self.known.names.items():
            known = known.replace(theirs, other)
        names = (known, known.removeprefix("transformer."), f"{self.model.base_model_prefix}.{known}")
        found = next((one for name in names if (one := self._names.get_name(name, try_suffixes=(".weight", ".bias")))), None)
        if found is None:
            raise StageError(f"llama.cpp's {self.known.name} has no place for {parameter}; {OTHERS}")
        return found

    def order(self, parameter: str) -> ndarray | None:
        """Which row comes where; None where the order stays.

        transformers rotates a channel with the one half a head away, llama.cpp's Llama with its neighbour. Where one matrix makes
        all, a key and a value lie behind the queries of each group, and llama.cpp wants all queries, all keys, all values.
        """
        import numpy

        heads, keys, width = self.config.num_attention_heads, key_heads(self.config), head_width(self.config) or 0
        module = parameter.rpartition(".")[0].rpartition(".")[2]
        if self.known.interleaved and module in ("q_proj", "k_proj"):
            count = heads if module == "q_proj" else keys
            return numpy.arange(count * width).reshape(count, 2, -1).swapaxes(1, 2).reshape(-1)
        if not self.known.grouped or module != "query_key_value":
            return None
        rows = numpy.arange((heads + 2 * keys) * width).reshape(keys, -1, width)
        parts = numpy.split(rows, [heads // keys, heads // keys + 1], axis=1)
        return numpy.concatenate([part.reshape(-1) for part in parts])

    def vectors(self) -> Iterator[tuple[str, ndarray]]:
        """(name, values) of what is kept in float32: norms, biases, routers, tables of positions, factors of rotary embeddings."""
        of_matrices = {id(parameter) for _, parameter, _ in (*matrices(self.model), *expert_matrices(self.model))}
        of_matrices |= {id(parameter) for parameter in head_parameters(self.model).values()}
        for parameter, value in self.model.named_parameters():
            if id(value) not in of_matrices:
                values, order = self._shifted(parameter, value), self.order(parameter)
                yield self.name(parameter), values if order is None else values[order]
        yield from self._factors()

    def experts(self) -> Iterator[tuple[str, str, nn.Parameter, slice]]:
        """(llama.cpp's name, parameter's name, parameter [experts, rows, columns], which rows) of the matrices of all experts."""
        for name, value, _ in expert_matrices(self.model):
            layer, _, kind = name.rpartition(".")
            half = value.shape[1] // 2
            parts = {"gate_proj": slice(half), "up_proj": slice(half, None)} if kind == GATE_UP else {kind: slice(None)}
            for part, rows in parts.items():
                yield self.name(f"{layer}.{part}.weight"), name, value, rows

    def _shifted(self, parameter: str, value: Tensor) -> ndarray:
        """A parameter as llama.cpp computes with it; norms of queries make up for its own scale of attention."""
        values: ndarray = value.detach().float().numpy()
        values = values.squeeze(1) if values.ndim == 3 else values  # a convolution of each channel by itself
        module, _, kind = parameter.rpartition(".")
        if self.known.norm_offset and "norm" in module and kind == "weight":
            values = values + self.known.norm_offset
        return values * attention_scale(self.config, self.known.deep) if module.endswith(".q_norm") else values

    def _factors(self) -> Iterator[tuple[str, ndarray]]:
        """By what each frequency is divided, [rotated channels / 2], where that is not the same for all."""
        kinds = rotary_kinds(self.config)
        names = ("rope_factors_long", "rope_factors_short") if "longrope" in kinds else ("rope_freqs",) if "llama3" in kinds else ()
        for name in names:
            yield f"{name}.weight", self._divisors()

    def _divisors(self) -> ndarray:
        import numpy

        width, theta = rotated_channels(self.config) or 0, self.config.rope_parameters["rope_theta"]
        plain = theta ** -(numpy.arange(0, width, 2, dtype=numpy.float64) / width)
        rotary: Any = self.model.get_decoder().rotary_emb
        return (plain / rotary.inv_freq.double().numpy()).astype(numpy.float32)


def expert_matrices(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """What `matrices` tells, of parameters [experts, rows, columns]: the matrices of all experts of a layer."""
    return ((name, value, False) for name, value in model.named_parameters() if value.ndim == 3 and ".experts." in name)


def _names(known: Architecture, layers: int) -> TensorNameMap:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == known.name)
    return get_tensor_name_map(number, layers)
