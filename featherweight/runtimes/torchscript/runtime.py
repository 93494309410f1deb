"""TorchScript, declared: encoders and decoders as traced graphs, in float32 or with torch's own int8 layers, on CPUs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from featherweight.model.parent import experts_refusal
from featherweight.progress import Metrics
from featherweight.runtimes.bounds import EXACT, INT8_ACTIVATIONS, Bound
from featherweight.runtimes.interface import Grids, Runtime
from featherweight.runtimes.known_models import Otherwise, otherwise_refusal
from featherweight.runtimes.refusals import (
    both_stacks_refusal,
    float_of_rounded_refusal,
    keys_and_values_refusal,
    other_layers_refusal,
    own_attention_refusal,
    rotary_length_refusal,
    rows_of_8_bits_refusal,
)
from featherweight.runtimes.spec import CompileSpec
from featherweight.spec import Task
from featherweight.store.served_folder import Serving
from featherweight.system.device import Device
from featherweight.system.machine import Machine

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from featherweight.runtimes.bytes_read import HeldTensor
    from featherweight.runtimes.candidate import Candidate
    from featherweight.runtimes.offers import Offer
    from featherweight.runtimes.writing import Source


class TorchScriptSpec(CompileSpec):
    """precision: int8 is 8-bit weights of one scale per row, as torch-dynamic has them; it rounds here only where no quantize stage
    chose the weights.
    """

    engine: Literal["torchscript"]
    precision: Literal["float32", "int8"] = "float32"


class TorchScript(Runtime[TorchScriptSpec]):
    """Everything that is known of it."""

    name = "torchscript"
    spec = TorchScriptSpec
    loads_with = "featherweight.runtimes.torchscript.loaded:TorchScriptModel"
    modules = ("torch",)
    libraries = ("torch", "transformers")
    requirements = ("torch",)
    writing_s = 12
    weight_s = 1e-7

    def write(self, spec: TorchScriptSpec, source: Source, out: Path) -> None:
        from featherweight.runtimes.torchscript.write import write

        write(spec, source, out)

    def check(self, spec: TorchScriptSpec, source: Source, served: Path) -> Metrics:
        """Rounded activations are compared with the same rounding: what it costs is a matter of quality."""
        if "rounded" not in Serving.read(served).options:
            return super().check(spec, source, served)
        from featherweight.runtimes.torch.formats import FORMATS
        from featherweight.runtimes.torch.static_ranges import simulated_by_token

        assert source.quantized, "what is rounded was rounded by a stage, or as it was written"
        with simulated_by_token(source.model, set(source.quantized.q), FORMATS["torch-dynamic"].rounding()):
            reference = source.reference()
        source.release()
        return reference.check(served)

    def bound(self, serving: Serving) -> Bound:
        return INT8_ACTIVATIONS if "rounded" in serving.options else EXACT

    def held_tensors(self, folder: Path, serving: Serving, config: PreTrainedConfig) -> Iterator[HeldTensor]:
        from featherweight.runtimes.bytes_read import HeldTensor

        return (HeldTensor(**one) for one in json.loads((folder / "manifest.json").read_text())["held"])

    def offers(self, device: Device, machine: Machine) -> Iterator[Offer]:
        from featherweight.runtimes.torchscript.offers import offers

        return offers(device, machine)

    def task_refusal(self, task: Task) -> str | None:
        return both_stacks_refusal("TorchScript", task)

    def grid_refusal(self, grids: Grids, spec: TorchScriptSpec) -> str | None:
        if grids.body is None:
            return None
        if spec.precision == "float32":
            return float_of_rounded_refusal("float32")
        return rows_of_8_bits_refusal("its int8 product has one scale per row of 8-bit weights", grids)

    def model_refusal(self, spec: TorchScriptSpec, model: Candidate) -> str | None:
        """What a static cache does not hold, what a trace would freeze, and what torch-dynamic's layers are not put into."""
        config = model.config
        reason = (
            keys_and_values_refusal(self.name, config)
            or other_layers_refusal(self.name, config)
            or own_attention_refusal(self.name, config)
            or rotary_length_refusal(self.name, config)
            or otherwise_refusal(KNOWN, config.model_type, config)
        )
        if spec.precision == "float32":
            return reason
        return reason or _layers_refusal(model) or experts_refusal(model.facts)


_UNTRACED = {
    "its Python decides by the text, which a trace would freeze": (
        "big_bird",
        "dbrx",
        "jetmoe",
        "longcat_flash",
        "longformer",
        "tapas",
    ),
    "it has operations that no trace holds": ("funnel", "reformer", "yoso"),
    "it asks a cache for more than keys and values": ("blt",),
}
"""Why no trace is right for every text of these model types, as the conformance matrix found it."""
KNOWN = {
    kind: Otherwise(f"torchscript cannot trace a {{kind}} model: {why}; take another engine")
    for why, kinds in _UNTRACED.items()
    for kind in kinds
}


def _layers_refusal(model: Candidate) -> str | None:
    """What torch-dynamic refuses, whose layers these are."""
    from featherweight.runtimes.torch.quantized_runtime import TORCH_DYNAMIC

    spec = TORCH_DYNAMIC.spec.model_validate({"engine": TORCH_DYNAMIC.name, "max_tokens": model.max_tokens})
    return TORCH_DYNAMIC.model_refusal(spec, model)


TORCHSCRIPT = TorchScript()
