"""ONNX Runtime through Optimum, declared: encoders, encoder-decoders and decoders as graphs, optimized by O1 to O4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from featherweight.runtimes.bounds import EXACT, HALF, Bound
from featherweight.runtimes.interface import Grids, Runtime
from featherweight.runtimes.optimum import known
from featherweight.runtimes.refusals import cuda_package_refusal, float_of_rounded_refusal
from featherweight.runtimes.spec import CompileSpec
from featherweight.store.served_folder import Serving
from featherweight.system.device import CPU, CUDA, Device
from featherweight.system.machine import Machine, describe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from featherweight.runtimes.bytes_read import HeldTensor
    from featherweight.runtimes.candidate import Candidate
    from featherweight.runtimes.offers import Offer
    from featherweight.runtimes.writing import Source

Level = Literal["O1", "O2", "O3", "O4"]
ON_CUDA = "onnxruntime-gpu"
"""The distribution of the same module that has kernels for CUDA."""
O4_IS_CUDAS = "Optimum's O4 computes in float16, on CUDA GPUs alone"


class OptimumSpec(CompileSpec):
    """optimize: Optimum's level. O1 folds constants and removes what is redundant; O2 fuses attention, norms and activations; O3
    approximates GELU besides; O4 computes in float16, on CUDA alone; null leaves the exported graph as it is.
    """

    engine: Literal["onnxruntime"]
    optimize: Level | None = "O2"


class Optimum(Runtime[OptimumSpec]):
    """Everything that is known of it."""

    name = "onnxruntime"
    spec = OptimumSpec
    loads_with = "featherweight.runtimes.optimum.loaded:OptimumModel"
    modules = ("onnxruntime",)
    libraries = ("onnxruntime", "onnxruntime-gpu", "torch", "transformers")
    requirements = ("onnxruntime",)
    writes_with = "optimum"
    writing_s = 40
    weight_s = 1e-7
    devices = (CPU, CUDA)

    def write(self, spec: OptimumSpec, source: Source, out: Path) -> None:
        from featherweight.runtimes.optimum.write import write

        write(spec, source, out)

    def bound(self, serving: Serving) -> Bound:
        """Floats: see bounds; O4 computes in float16."""
        return {"O4": HALF}.get(serving.options.get("optimize", ""), EXACT)

    def held_tensors(self, folder: Path, serving: Serving, config: PreTrainedConfig) -> Iterator[HeldTensor]:
        from featherweight.runtimes.optimum.bytes_read import held_tensors

        return held_tensors(folder)

    def offers(self, device: Device, machine: Machine) -> Iterator[Offer]:
        from featherweight.runtimes.optimum.offers import offers

        return offers(device)

    def grid_refusal(self, grids: Grids, spec: OptimumSpec) -> str | None:
        return None if grids.body is None else float_of_rounded_refusal("float32")

    def machine_refusal(self, spec: OptimumSpec, machine: Machine) -> str | None:
        return f"{O4_IS_CUDAS}, and there is none here; take O3" if spec.optimize == "O4" and not machine.gpus else None

    def device_refusal(self, spec: OptimumSpec, device: Device, machine: Machine) -> str | None:
        if device == CPU:
            return f"{O4_IS_CUDAS}; take O3" if spec.optimize == "O4" else None
        return cuda_package_refusal(self.name, ON_CUDA) if machine == describe() else None

    def model_refusal(self, spec: OptimumSpec, model: Candidate) -> str | None:
        """A model that Optimum does not export, or of which it knows no fusions, by its own lists."""
        return known.refusal(model.facts.model_type, spec.optimize)


OPTIMUM = Optimum()
