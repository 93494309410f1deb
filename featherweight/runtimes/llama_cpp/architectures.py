"""How llama.cpp names, orders and describes the models that are written for it, and what of them it would compute otherwise.

Names of tensors and keys are those of the `gguf` library, llama.cpp's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featherweight.errors import StageError
from featherweight.model.positions import head_width, rotary_kinds, sliding_window

if TYPE_CHECKING:
    from gguf import GGUFWriter, TensorNameMap
    from numpy import ndarray
    from transformers import PreTrainedModel

    from featherweight.runtimes.candidate import Candidate

BLOCK = 32
"""Weights that share a scale in Q8_0 and Q4_0."""
ACTIVATIONS = ("silu", "swish")
GELU = "gelu_pytorch_tanh"
"""What ggml reads from a table in float16."""
OTHERS = "take another engine"


@dataclass(frozen=True)
class Architecture:
    """name: llama.cpp's. interleaved: it rotates neighbouring channels, so that rows of queries and keys are put in that order.

    biases: it adds those of queries, keys and values. factors: it reads a factor for each frequency of the rotary embeddings.
    square: its heads together are as wide as the model. norm_offset: what its norms' weights have more than transformers'.
    """

    name: str
    interleaved: bool = False
    biases: bool = False
    factors: bool = False
    square: bool = False
    norm_offset: float = 0.0
    activations: tuple[str, ...] = ACTIVATIONS


LLAMA = Architecture("llama", interleaved=True, biases=True, factors=True)
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture("qwen2", biases=True, square=True),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", norm_offset=1.0, activations=(GELU,)),
}
"""By transformers' model type (SmolLM and SmolLM2 are Llamas)."""


def refusal(model: Candidate) -> str | None:
    """Why a model is not served, in one line; None where it is."""
    config, kind = model.config, model.facts.model_type
    if kind not in ARCHITECTURES:
        return f"GGUF files are written here for {', '.join(ARCHITECTURES)}, not for {kind}; {OTHERS}"
    known = ARCHITECTURES[kind]
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation not in known.activations:
        return f"llama.cpp computes {known.activations[0]} in {known.name} models, not {activation}; {OTHERS}"
    if getattr(config, "attention_bias", False) and not known.biases:
        return f"llama.cpp's {known.name} has no biases of queries, keys and values; {OTHERS}"
    return _rotary_refusal(config, known) or _window_refusal(model) or _width_refusal(config, known)


def _rotary_refusal(config: Any, known: Architecture) -> str | None:
    held = {"default", "linear", *(("llama3",) if known.factors else ())}
    told = getattr(config, "rope_parameters", None) or {}
    if other := rotary_kinds(config) - held:
        return f"rotary embeddings of kind {min(other)} are not written for llama.cpp's {known.name}; {OTHERS}"
    if told.get("partial_rotary_factor", 1.0) != 1.0:
        return f"llama.cpp's {known.name} rotates whole heads, these in part; {OTHERS}"
    return None


def _window_refusal(model: Candidate) -> str | None:
    window = sliding_window(model.config)
    if window is None or model.max_tokens <= window:
        return None
    return (
        f"llama.cpp does not compute {model.facts.model_type}'s sliding window of {window} tokens, and {model.max_tokens} are to "
        f"be served; say max_tokens {window}, or take another engine"
    )


def _width_refusal(config: Any, known: Architecture) -> str | None:
    width = head_width(config) or 0
    if width % 2:
        return f"llama.cpp rotates pairs of channels, and these heads have {width}; {OTHERS}"
    together = width * config.num_attention_heads
    if known.square and together != config.hidden_size:
        return f"llama.cpp's {known.name} wants heads that are {config.hidden_size} wide together, these are {together}; {OTHERS}"
    return None


def block_refusal(config: Any) -> str | None:
    """Why a model's matrices cannot be in blocks: rows are no multiple of them; None where all are."""
    sizes = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
    sizes["the heads together"] = config.num_attention_heads * (head_width(config) or 0)
    odd = next((name for name, size in sizes.items() if size % BLOCK), None)
    return odd and f"Q8_0 and Q4_0 hold whole blocks of {BLOCK} weights, and {odd} is {sizes[odd]}; take precision float16"


def describe(writer: GGUFWriter, config: Any) -> None:
    """The keys by which llama.cpp builds a model."""
    from gguf import RopeScalingType

    width = head_width(config) or 0
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(width)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if rotary_kinds(config) == {"linear"}:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


class Tensors:
    """The tensors of a model under llama.cpp's names, and in its order of rows."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.config = model, model.config
        self.known = ARCHITECTURES[model.config.model_type]
        self._names = _names(self.known, model.config.num_hidden_layers)

    def name(self, parameter: str) -> str:
        """llama.cpp's name of a parameter; raises StageError where it has none."""
        found = self._names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise StageError(f"llama.cpp's {self.known.name} has no place for {parameter}; {OTHERS}")
        return found

    def order(self, parameter: str) -> ndarray | None:
        """Which row comes where; None where the order stays.

        transformers rotates a channel with the one half a head away, llama.cpp's Llama with its neighbour.
        """
        import numpy

        module = parameter.rpartition(".")[0].rpartition(".")[2]
        if not self.known.interleaved or module not in ("q_proj", "k_proj"):
            return None
        heads = self.config.num_attention_heads if module == "q_proj" else self.config.num_key_value_heads
        rows = numpy.arange(heads * (head_width(self.config) or 0))
        return rows.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)

    def vectors(self) -> Iterator[tuple[str, ndarray]]:
        """(name, values) of what is no matrix, float32: norms, biases, factors of the rotary embeddings."""
        for parameter, value in self.model.named_parameters():
            if value.ndim == 1:
                offset = self.known.norm_offset if "norm" in parameter else 0.0
                values, order = value.detach().float().numpy() + offset, self.order(parameter)
                yield self.name(parameter), values if order is None else values[order]
        if rotary_kinds(self.config) == {"llama3"}:
            yield "rope_freqs.weight", self._factors()

    def _factors(self) -> ndarray:
        """By what each frequency is divided, [channels of a head / 2]."""
        import numpy

        width, theta = head_width(self.config) or 0, self.config.rope_parameters["rope_theta"]
        plain = theta ** -(numpy.arange(0, width, 2, dtype=numpy.float64) / width)
        rotary: Any = self.model.get_decoder().rotary_emb
        return (plain / rotary.inv_freq.double().numpy()).astype(numpy.float32)


def _names(known: Architecture, layers: int) -> TensorNameMap:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == known.name)
    return get_tensor_name_map(number, layers)
