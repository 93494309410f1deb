"""PyTorch with quantized Linear layers, declared: torch's own int8 kernels and torchao's, any transformers model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.model.parent import experts_refusal
from featherweight.model.positions import rotary_switch
from featherweight.progress import Metrics
from featherweight.runtimes.bounds import EXACT, INT8_ACTIVATIONS, Bound
from featherweight.runtimes.interface import Grids, Runtime
from featherweight.runtimes.refusals import cache_refusal, fp8_refusal
from featherweight.runtimes.spec import ExportSpec
from featherweight.runtimes.torch.formats import FORMATS
from featherweight.store.served_folder import Serving
from featherweight.system.device import CPU, CUDA, Device
from featherweight.system.machine import Machine

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from featherweight.runtimes.bytes_read import HeldTensor
    from featherweight.runtimes.candidate import Candidate
    from featherweight.runtimes.offers import Offer
    from featherweight.runtimes.writing import Source


READ_HEADS = ("mobilebert",)
"""Model types of transformers that read the weights of their head, in place of calling it."""
READ_WEIGHTS = ("mamba", "falcon_mamba", "jamba", "deepseek_v4")
"""The same of their layers' weights, which nothing that is packed has as numbers."""
READ_TYPES = ("mamba2", "xlstm", "axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4")
"""Those that ask a layer for the type of its weights, of which torch's own packed layers know nothing."""
ENLARGING = {"hrm_text": "passes through its layers again and again", "mobilebert": "norms nothing between its layers"}
"""Those that enlarge small differences. torchao rounds the largest number of a token at a tie (127.5 steps), which the order of a
sum decides: 0.1 to 0.3 nats on average between two runs of the same rounding.
"""
NO_LINEAR = ("ibert", "squeezebert")
"""Those whose blocks are made of other layers than torch.nn's Linear, which alone are packed."""


class QuantizedTorchSpec(ExportSpec):
    """The engine's name says all: its format, to which float weights are rounded."""


class QuantizedTorch(Runtime[QuantizedTorchSpec]):
    """One of featherweight.runtimes.torch.formats. Metrics of rounded activations also have `parity_weights_max_abs`."""

    spec = QuantizedTorchSpec
    loads_with = "featherweight.runtimes.torch.quantized:QuantizedTorchModel"
    libraries = ("torch", "torchao", "transformers", "accelerate")
    requirements = ("torch", "torchao", "accelerate")

    def __init__(self, name: str, modules: tuple[str, ...] = ("torchao",)) -> None:
        self.name, self.format, self.modules = name, FORMATS[name], modules
        self.devices = (CPU,) if self.format.vocabulary else (CPU, CUDA)

    def write(self, spec: QuantizedTorchSpec, source: Source, out: Path) -> None:
        from featherweight.runtimes.torch.write import write

        write(self.name, self.format, source, out)

    def check(self, spec: QuantizedTorchSpec, source: Source, served: Path) -> Metrics:
        from featherweight.runtimes.torch.write import check_rounded

        if self.format.activations == "float":
            return super().check(spec, source, served)
        return check_rounded(source, served)

    def bound(self, serving: Serving) -> Bound:
        """Against the same rounding: per token 0.51 nats at most and 0.091 on average, by torchao, which rounds at ties, 0.63 and
        0.080; by one range 0.91 and 0.058.
        """
        return EXACT if self.format.activations == "float" else INT8_ACTIVATIONS

    def held_tensors(self, folder: Path, serving: Serving, config: PreTrainedConfig) -> Iterator[HeldTensor]:
        from featherweight.runtimes.torch.bytes_read import packed_tensors

        return packed_tensors(folder, self.format, config)

    def offers(self, device: Device, machine: Machine) -> Iterator[Offer]:
        from featherweight.runtimes.torch.offers import quantized

        return quantized(self.name, device, machine)

    def grid_refusal(self, grids: Grids, spec: QuantizedTorchSpec) -> str | None:
        if grids.body is None or spec.kv_cache:
            return cache_refusal(self.name, spec)
        every = [grid for grid in (grids.body, grids.head, grids.finer) if grid is not None]
        if any(grid.kind == "float" for grid in every):
            return fp8_refusal()
        bits = 4 if self.format.body.startswith("int4") else 8
        if grids.body.bits != bits:
            return f"it holds {bits}-bit integers, and would round the {grids.body.bits}-bit grid again; take another engine"
        odd = [grid for grid in every if grid.bits != 8 or grid.group_size is not None]
        if self.format.by_row and odd:
            return f"its int8 product has one scale per row of 8-bit weights, not {odd[0].name}; take another engine"
        return None

    def device_refusal(self, spec: QuantizedTorchSpec, device: Device, machine: Machine) -> str | None:
        reason = super().device_refusal(spec, device, machine)
        return reason and f"{reason}: torch's own int8 kernels know no CUDA; take another engine there"

    def model_refusal(self, spec: QuantizedTorchSpec, model: Candidate) -> str | None:
        """Experts, which are no Linear; a head whose weights are read, where it holds integers; texts that are read anew midway."""
        kind = model.facts.model_type
        if self.format.activations == "dynamic" and _is_read_anew(model):
            return (
                f"it rounds activations by what is read together, and this {kind} is read anew behind "
                f"{rotary_switch(model.config)} tokens: its texts would depend on how they are read; take another engine"
            )
        if self.name == "torchao-int8-dynamic" and kind in ENLARGING:
            return (
                f"{self.name} rounds the largest number of a token at a tie, and a {kind} {ENLARGING[kind]}, "
                "so that what comes of it grows; take torchao-int8"
            )
        if self.format.vocabulary and kind in READ_HEADS:
            return f"the head of a {kind} model is joined with other weights, and {self.name}'s is packed; take another engine"
        if kind in READ_WEIGHTS or (self.name in ("torch-dynamic", "torch-static") and kind in READ_TYPES):
            return f"transformers reads the weights of a {kind} model's layers itself, and {self.name}'s are packed; take another"
        if kind in NO_LINEAR:
            return f"the blocks of a {kind} model have layers of their own, and {self.name} packs Linear alone; take another engine"
        return experts_refusal(model.facts)


def _is_read_anew(model: Candidate) -> bool:
    switch = rotary_switch(model.config)
    return switch is not None and switch < model.max_tokens


TORCH_DYNAMIC = QuantizedTorch("torch-dynamic", modules=("torch",))
TORCH_STATIC = QuantizedTorch("torch-static")
TORCHAO_INT8 = QuantizedTorch("torchao-int8")
TORCHAO_INT4 = QuantizedTorch("torchao-int4")
TORCHAO_INT8_DYNAMIC = QuantizedTorch("torchao-int8-dynamic")
