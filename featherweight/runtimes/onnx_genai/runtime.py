"""ONNX Runtime GenAI, declared: decoders in float32 or MatMulNBits' 2, 4 and 8 bits, on CPUs, and on CUDA by its other package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from featherweight.grid import Grid
from featherweight.model.parent import experts_refusal
from featherweight.model.positions import head_width, rotary_kinds, rotated_channels, rotates_by_layer, sliding_window
from featherweight.progress import Metrics
from featherweight.runtimes.bounds import EXACT, INT8_ACTIVATIONS, Bound
from featherweight.runtimes.interface import Grids, Runtime
from featherweight.runtimes.known_models import names_in
from featherweight.runtimes.refusals import cuda_package_refusal, float_of_rounded_refusal
from featherweight.runtimes.spec import CompileSpec
from featherweight.spec import Task
from featherweight.store.served_folder import Serving
from featherweight.system.device import CPU, CUDA, Device
from featherweight.system.machine import Machine, describe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from featherweight.runtimes.bytes_read import HeldTensor
    from featherweight.runtimes.candidate import Candidate
    from featherweight.runtimes.offers import Offer
    from featherweight.runtimes.writing import Source

BITS = {"int8": 8, "int4": 4, "int2": 2}
TWO_BITS_ON = "avx512bw"
"""ONNX Runtime 1.31 multiplies 2-bit blocks as integers with AVX-512 alone; elsewhere it unpacks them to floats at each product."""
BLOCKS = (16, 32, 64, 128, 256)
HEAD_MULTIPLE = ROTATED_MULTIPLE = 16
ON_CUDA = "onnxruntime-genai-cuda"
"""The distribution of the same module that has kernels for CUDA."""
HEADED = ("ForCausalLM", "LMHeadModel")
PLAIN_INT2 = "plain rounding to 2 bits leaves no model; give a quantize stage: {method: qat, grid: int2-g128, head: int8}"


class GenaiSpec(CompileSpec):
    """`precision` rounds here only where no quantize stage chose the weights, and never to int2.

    accuracy_level: what MatMulNBits multiplies rounded weights with: 4, activations that it rounds to int8 block by block, which is
    2 to 50 times as fast; 1, activations in float32, by which nothing is lost but what the weights have lost.
    """

    engine: Literal["onnxruntime-genai"]
    precision: Literal["float32", "int8", "int4", "int2"] = "float32"
    accuracy_level: Literal[1, 4] = 4

    @property
    def unread(self) -> dict[str, str]:
        return super().unread | ({"accuracy_level": "with precision float32"} if self.precision == "float32" else {})

    @property
    def rounds_activations(self) -> bool:
        """Whether products of rounded weights are made of integers."""
        return self.precision != "float32" and self.accuracy_level == 4


class OnnxruntimeGenai(Runtime[GenaiSpec]):
    """Everything that is known of it. Metrics of rounded weights also have `parity_weights_max_abs`, with activations in float."""

    name = "onnxruntime-genai"
    spec = GenaiSpec
    loads_with = "featherweight.runtimes.onnx_genai.loaded:GenaiModel"
    modules = ("onnxruntime_genai",)
    libraries = ("onnxruntime-genai", ON_CUDA, "onnxruntime", "onnx", "onnx-ir", "torch", "transformers")
    requirements = ("onnxruntime-genai",)
    writing_s = 6
    weight_s = 5e-7
    streams = True
    fewest_bits = 2
    devices = (CPU, CUDA)

    def write(self, spec: GenaiSpec, source: Source, out: Path) -> None:
        from featherweight.runtimes.onnx_genai.write import write

        write(spec, source, out)

    def check(self, spec: GenaiSpec, source: Source, served: Path) -> Metrics:
        from featherweight.runtimes.onnx_genai.write import check_weights

        reference = source.reference()
        source.release()
        weights = check_weights(reference, served) if spec.rounds_activations else {}
        return {**weights, **reference.check(served)}

    def bound(self, serving: Serving) -> Bound:
        """Rounded weights have activations rounded per block: 0.42 nats at most, 0.032 on average; floats 0.00006 at most."""
        return EXACT if serving.grid is None or "activations" in serving.options else INT8_ACTIVATIONS

    def held_tensors(self, folder: Path, serving: Serving, config: PreTrainedConfig) -> Iterator[HeldTensor]:
        from featherweight.runtimes.onnx.bytes_read import graph_tensors

        return graph_tensors(folder / "model.onnx")

    def offers(self, device: Device, machine: Machine) -> Iterator[Offer]:
        from featherweight.runtimes.onnx_genai.offers import offers

        return offers(device, machine)

    def task_refusal(self, task: Task) -> str | None:
        if task == "text2text-generation":
            return "its model builder knows decoders only; take another engine"
        return None if task == "text-generation" else "its model builder knows decoders only; take another engine"

    def grid_refusal(self, grids: Grids, spec: GenaiSpec) -> str | None:
        body = grids.body
        if body is None:
            return PLAIN_INT2 if spec.precision == "int2" else None
        if spec.precision == "float32":
            return float_of_rounded_refusal("float32")
        if body.kind == "int" and BITS[spec.precision] != body.bits:
            return f"the weights are on a {body.bits}-bit grid, and precision {spec.precision} would round them again"
        if grids.head and grids.head.bits < min(body.bits, 4):
            return f"a head on {grids.head.name} beside finer blocks loses most and saves least; take head: int8"
        every = (body, grids.head, grids.finer)
        return next((reason for grid in every if grid and (reason := _blocks_refusal(grid))), None)

    def machine_refusal(self, spec: GenaiSpec, machine: Machine) -> str | None:
        if spec.precision != "int2" or TWO_BITS_ON in machine.cpu_features:
            return None
        return "int2 needs a CPU with AVX-512: ONNX Runtime has no other product of 2-bit integers; take int4"

    def device_refusal(self, spec: GenaiSpec, device: Device, machine: Machine) -> str | None:
        if device == CUDA and spec.precision == "int2":
            return "onnxruntime-genai serves 2 bits from CPUs alone here; take int4"
        return None if device == CPU or machine != describe() else cuda_package_refusal(self.name, ON_CUDA)

    def model_refusal(self, spec: GenaiSpec, model: Candidate) -> str | None:
        """Heads that ONNX Runtime's attention kernel would refuse, which it does only when it runs; windows that it overlooks."""
        if reason := _unknown_refusal(model.config):
            return reason
        if spec.precision != "float32" and (reason := experts_refusal(model.facts)):
            return reason
        if reason := _rotary_refusal(model) or _function_refusal(model):
            return reason
        window, kind = sliding_window(model.config), model.config.model_type
        if window and model.max_tokens > window and getattr(model.config, "layer_types", None) is None:
            return (
                f"onnxruntime-genai's model builder overlooks {kind}'s sliding window of {window} tokens, and {model.max_tokens} "
                f"are to be served; say max_tokens {window}, or take another engine"
            )
        width = head_width(model.config)
        if not width or not width % HEAD_MULTIPLE:
            return None
        return (
            f"onnxruntime-genai wants attention heads of a multiple of {HEAD_MULTIPLE} channels, these have {width}; "
            "take another engine"
        )


def _unknown_refusal(config: Any) -> str | None:
    """Why its model builder cannot take an architecture: it names those that it knows."""
    named = (config.architectures or [""])[0]
    known = names_in("onnxruntime_genai", "models/builder.py", r'architectures\[0\] == "(\w+)"')
    if not known or named in known or not named.endswith(HEADED):
        return None
    return f"onnxruntime-genai's model builder does not know {named}; take another engine"


ROTARY: dict[str, frozenset[str]] = {
    **dict.fromkeys(("llama", "nemotron", "smollm3"), frozenset({"default", "dynamic", "llama3"})),
    "hunyuan_v1_dense": frozenset({"default", "dynamic"}),
}
"""The kinds of rotary embeddings that its builder makes of a model type; of the others the plain kind alone."""
ROTATED_IN_PART = ("nemotron", "phi", "phi3", "phimoe")
"""Model types whose share of rotated channels transformers takes from the configuration; the builder does so for all."""


def _rotary_refusal(model: Candidate) -> str | None:
    """Rotary embeddings that its builder computes otherwise, leaves out without a word, or has no place for."""
    kind, width = model.facts.model_type, head_width(model.config)
    scaled, rotated = rotary_kinds(model.config) - ROTARY.get(kind, {"default"}), rotated_channels(model.config)
    reason = ""
    if scaled:
        reason = f"cannot take this {kind}'s rotary embeddings ({min(scaled)})"
    elif kind == "hunyuan_v1_dense" and "dynamic" in rotary_kinds(model.config) and not model.config.rope_parameters.get("alpha"):
        reason = f"wants the alpha of a {kind}'s rotary embeddings (dynamic), and this one has none"
    elif rotates_by_layer(model.config):
        reason = f"takes one kind of rotary embeddings for all layers, and {kind} has several"
    elif kind == "phi3" and model.config.max_position_embeddings != model.config.original_max_position_embeddings:
        reason = "takes a phi3 for one with longrope where its two context lengths differ, and this one has none"
    elif rotated != width and kind not in ROTATED_IN_PART:
        reason = f"rotates {rotated} of {width} channels as config.json says, and transformers all channels of a {kind}"
    elif rotated and rotated != width and rotated % ROTATED_MULTIPLE:
        reason = f"wants a multiple of {ROTATED_MULTIPLE} rotary channels in each head, these have {rotated} of {width}"
    return f"onnxruntime-genai's model builder {reason}; take another engine" if reason else None


def _function_refusal(model: Candidate) -> str | None:
    """What a configuration asks to be computed and the builder leaves out without a word, or stops at."""
    kind = model.facts.model_type
    if getattr(model.config, "qk_layernorm", False) or getattr(model.config, "clip_qkv", None):
        return f"onnxruntime-genai's model builder overlooks what {kind} does to queries and keys; take another engine"
    if "linear_attention" in (getattr(model.config, "layer_types", None) or ()):
        why = f"makes no layers of linear attention (Mamba), which this {kind} has"
        return f"onnxruntime-genai's model builder {why}; take another engine"
    names = (getattr(model.config, entry, None) for entry in ("hidden_activation", "hidden_act", "activation_function"))
    if (told := next(filter(None, names), None)) and told not in ACTIVATIONS:
        return f"onnxruntime-genai's model builder makes no {told}, which is this {kind}'s activation; take another engine"
    return None


ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2")
"""Of transformers' names those that its builder makes (make_activation)."""


def _blocks_refusal(grid: Grid) -> str | None:
    """ONNX Runtime's MatMulNBits: 2, 4 or 8 bits, symmetric about zero, one scale per block (a row's scale can be repeated)."""
    if grid.kind == "int" and (grid.group_size is None or grid.group_size in BLOCKS):
        return None
    return f"MatMulNBits holds 2, 4 and 8 bits in groups of {BLOCKS[0]} to {BLOCKS[-1]} or per row, not {grid.name}"


ONNXRUNTIME_GENAI = OnnxruntimeGenai()
