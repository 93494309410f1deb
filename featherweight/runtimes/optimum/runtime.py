"""ONNX Runtime through Optimum, declared: encoders, encoder-decoders and decoders as fused graphs, in 32, 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from featherweight.grid import GRIDS, Grid
from featherweight.progress import Metrics
from featherweight.runtimes.bounds import APPROXIMATED, EXACT, HALF, INT8_ACTIVATIONS, Bound
from featherweight.runtimes.interface import Grids, Runtime
from featherweight.runtimes.optimum import known
from featherweight.runtimes.refusals import cuda_package_refusal, float_of_rounded_refusal, fp8_refusal
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
Activations = Literal["blocks", "dynamic", "static"]
BITS = {"int8": 8, "int4": 4}
ON_CUDA = "onnxruntime-gpu"
"""The distribution of the same module that has kernels for CUDA."""
O4_IS_CUDAS = "Optimum's O4 computes in float16, on CUDA GPUs alone"


class OptimumSpec(CompileSpec):
    """optimize: Optimum's level. O1 folds constants and removes what is redundant; O2 fuses attention, norms and activations; O3
    approximates GELU besides; O4 computes in float16, on CUDA alone; null leaves the exported graph as it is. Attention whose
    weights are rounded is not fused.
    precision: rounds here only where no quantize stage chose the weights.
    activations: what rounded weights are multiplied with is rounded to int8 too: in blocks of a row (MatMulNBits), or by one range
    for all that a layer is given: dynamic, the range of a batch, or static, that of the calibration text.
    """

    engine: Literal["onnxruntime"]
    optimize: Level | None = "O2"
    precision: Literal["float32", "int8", "int4"] = "float32"
    activations: Activations = "blocks"


class Optimum(Runtime[OptimumSpec]):
    """Everything that is known of it."""

    name = "onnxruntime"
    spec = OptimumSpec
    loads_with = "featherweight.runtimes.optimum.loaded:OptimumModel"
    modules = ("onnxruntime",)
    libraries = ("onnxruntime", "onnxruntime-gpu", "onnx", "onnx-ir", "torch", "transformers")
    requirements = ("onnxruntime",)
    writes_with = "optimum"
    toolchain_libraries = ("optimum", "optimum-onnx", "onnxruntime", "torch", "transformers")
    writing_s = 40
    weight_s = 1e-7
    devices = (CPU, CUDA)

    def write(self, spec: OptimumSpec, source: Source, out: Path) -> None:
        from featherweight.runtimes.optimum.write import write

        write(spec, source, out)

    def check(self, spec: OptimumSpec, source: Source, served: Path) -> Metrics:
        from featherweight.runtimes.optimum.pack import check_rounded

        return super().check(spec, source, served) if source.quantized is None else check_rounded(source, served)

    def bound(self, serving: Serving) -> Bound:
        """Floats: see bounds; O3 approximates GELU, O4 computes in float16."""
        if serving.grid is not None:
            return INT8_ACTIVATIONS
        return {"O3": APPROXIMATED, "O4": HALF}.get(serving.options.get("optimize", ""), EXACT)

    def served_note(self, serving: Serving) -> str | None:
        kernels = serving.options.get("kernels")
        return f"integers laid out for {kernels}" if kernels else None

    def held_tensors(self, folder: Path, serving: Serving, config: PreTrainedConfig) -> Iterator[HeldTensor]:
        from featherweight.runtimes.optimum.bytes_read import held_tensors

        return held_tensors(folder)

    def offers(self, device: Device, machine: Machine) -> Iterator[Offer]:
        from featherweight.runtimes.optimum.offers import offers

        return offers(device)

    def grid_refusal(self, grids: Grids, spec: OptimumSpec) -> str | None:
        body = grids.body
        if spec.precision == "float32":
            return None if body is None else float_of_rounded_refusal("float32")
        if spec.optimize == "O4":
            return "O4 computes in float16, and rounded weights are multiplied as integers; take O2"
        if body is None:
            return _by_row_refusal(spec, GRIDS["int4-g32"]) if spec.precision == "int4" else None
        every = [grid for grid in (body, grids.head, grids.finer) if grid]
        if any(grid.kind == "float" for grid in every):
            return fp8_refusal()
        if BITS[spec.precision] != body.bits:
            return f"the weights are on a {body.bits}-bit grid, and precision {spec.precision} would round them again"
        return next((reason for grid in every if (reason := _by_row_refusal(spec, grid))), None)

    def machine_refusal(self, spec: OptimumSpec, machine: Machine) -> str | None:
        return f"{O4_IS_CUDAS}, and there is none here; take O3" if spec.optimize == "O4" and not machine.gpus else None

    def device_refusal(self, spec: OptimumSpec, device: Device, machine: Machine) -> str | None:
        if device == CPU:
            return f"{O4_IS_CUDAS}; take O3" if spec.optimize == "O4" else None
        return cuda_package_refusal(self.name, ON_CUDA) if machine == describe() else None

    def model_refusal(self, spec: OptimumSpec, model: Candidate) -> str | None:
        """A model that Optimum does not export, or of which it knows no fusions, by its own lists, or whose graph is another."""
        refused = known.vectors_refusal(model.config) or known.refusal(model.facts.model_type, spec.optimize)
        return refused or known.left_out_refusal(model.config)


def _by_row_refusal(spec: OptimumSpec, grid: Grid) -> str | None:
    """Why a grid is not multiplied as `spec` says."""
    if spec.activations == "blocks" or (grid.bits == 8 and grid.group_size is None):
        return None
    return f"activations: {spec.activations} multiplies 8-bit weights of one scale per row, not {grid.name}; take blocks"


OPTIMUM = Optimum()
