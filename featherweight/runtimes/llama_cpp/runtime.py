"""llama.cpp, declared: decoders in one GGUF file, in floats or in blocks of 4 and 8 bits, on CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from featherweight.model.positions import head_width
from featherweight.progress import Metrics
from featherweight.runtimes.bounds import EXACT, INT8_ACTIVATIONS, TABLE, Bound, sixteen_bits
from featherweight.runtimes.interface import Grids, Runtime
from featherweight.runtimes.llama_cpp import library, refusals
from featherweight.runtimes.llama_cpp.blocks import KIND_OF
from featherweight.runtimes.llama_cpp.own_kinds import OWN
from featherweight.runtimes.refusals import float_of_rounded_refusal
from featherweight.runtimes.spec import ExportSpec
from featherweight.spec import HEADED, Task
from featherweight.store.served_folder import Serving
from featherweight.system import toolchains
from featherweight.system.device import Device
from featherweight.system.machine import Machine, describe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from featherweight.runtimes.bytes_read import HeldTensor
    from featherweight.runtimes.candidate import Candidate
    from featherweight.runtimes.offers import Offer
    from featherweight.runtimes.writing import Source

BITS = {"int8": 8, "int4": 4}
FASTER = ("avx512_vnni", "avx_vnni")
"""Instructions that the wheel was not compiled for."""


class LlamaCppSpec(ExportSpec):
    """precision: what the file's matrices are; int8 is Q8_0 and int4 Q4_0, whose activations are rounded to int8 at run time.
    They round here only where no quantize stage chose the weights (embedding and head to int8). q4_k to iq4_nl are llama.cpp's own
    kinds, to which its own quantizer rounds float weights (embedding and head to Q6_K). kv_cache: q8_0 keeps keys and values in
    8 bits, a scale for each 32 of them: half of the cache's memory. imatrix: the own kinds' errors are weighed by what each column
    carries on the calibration text.
    """

    quiet = ExportSpec.quiet | {"imatrix"}

    engine: Literal["llama.cpp"]
    precision: Literal["float32", "float16", "int8", "int4", "q4_k", "q5_k", "q6_k", "iq4_nl"] = "float32"
    kv_cache: Literal["q8_0"] | None = None
    imatrix: bool = False

    @property
    def unread(self) -> dict[str, str]:
        return super().unread | ({} if self.precision in OWN else {"imatrix": f"with precision {self.precision}"})


class LlamaCpp(Runtime[LlamaCppSpec]):
    """Everything that is known of it. Metrics of rounded weights also have `parity_weights_max_abs`, of a twin in float32."""

    name = "llama.cpp"
    spec = LlamaCppSpec
    loads_with = "featherweight.runtimes.llama_cpp.loaded:LlamaCppModel"
    gains_by = library.NATIVE
    toolchain_libraries = ("llama-cpp-native",)
    libraries = (library.MODULE, "gguf", "torch", "transformers")
    requirements = (library.MODULE,)
    writing_s = 4
    weight_s = 1e-7
    streams = True
    joins = True
    speculates = ("ngram", "draft")

    def write(self, spec: LlamaCppSpec, source: Source, out: Path) -> None:
        from featherweight.runtimes.llama_cpp.write import write

        write(spec, source, out)

    def check(self, spec: LlamaCppSpec, source: Source, served: Path) -> Metrics:
        from featherweight.runtimes.llama_cpp.write import check_weights

        rounded = source.quantized is not None or spec.precision in OWN or spec.kv_cache is not None
        reference = source.reference()
        source.release()
        weights = check_weights(reference, served) if rounded else {}
        return {**weights, **reference.check(served)}

    def bound(self, serving: Serving) -> Bound:
        """Rounded weights have activations rounded per block: 0.33 nats at most, 0.059 on average (stories15M); float16 0.014 at
        most, float32 0.00005, and with ggml's table of GELU 0.0056 (Gemma 3 270M).
        """
        if serving.grid is not None or "rounded" in serving.options or "kv_cache" in serving.options:
            return INT8_ACTIVATIONS
        return sixteen_bits(serving.options.get("dtype", "")) or (TABLE if "gelu" in serving.options else EXACT)

    def held_tensors(self, folder: Path, serving: Serving, config: PreTrainedConfig) -> Iterator[HeldTensor]:
        from featherweight.runtimes.llama_cpp.bytes_read import file_tensors
        from featherweight.runtimes.llama_cpp.write import MODEL

        return file_tensors(folder, MODEL, config)

    def offers(self, device: Device, machine: Machine) -> Iterator[Offer]:
        from featherweight.runtimes.llama_cpp.offers import offers

        return offers()

    def task_refusal(self, task: Task) -> str | None:
        return None if task == "text-generation" or task in HEADED else "it is written for decoders only; take another engine"

    def grid_refusal(self, grids: Grids, spec: LlamaCppSpec) -> str | None:
        body = grids.body
        if body is None:
            return None
        if spec.precision in OWN:
            return f"llama.cpp's own quantizer would round weights on {body.name} again; take int8 or int4"
        if spec.precision not in BITS:
            return float_of_rounded_refusal(spec.precision)
        for grid in (body, grids.head, grids.finer):
            if grid is not None and grid.name not in KIND_OF:
                return f"llama.cpp's Q8_0 and Q4_0 hold {' and '.join(KIND_OF)}, not {grid.name}"
        if BITS[spec.precision] != body.bits:
            return f"the weights are on a {body.bits}-bit grid, and precision {spec.precision} would round them again"
        return None

    def adapters_refusal(self, spec: LlamaCppSpec) -> str | None:
        return None

    def model_refusal(self, spec: LlamaCppSpec, model: Candidate) -> str | None:
        reason = refusals.refusal(model) or _cache_refusal(spec, model)
        if spec.precision in BITS:
            reason = reason or refusals.experts_refusal(model)
        if spec.speculation:
            reason = reason or refusals.speculation_refusal(model.config)
        return reason or (refusals.block_refusal(model.config) if spec.precision in (*BITS, *OWN) else None)

    def missing(self) -> str | None:
        return library.missing()

    def machine_note(self, machine: Machine) -> tuple[str, str] | None:
        more = [name for name in FASTER if name in machine.cpu_features]
        if not more:  # most often, and the library need not be opened for it
            return None
        compiled = library.built_with() if machine == describe() and library.file() else "AVX2"
        unused = [name for name in more if name.upper() not in compiled.split(", ")]
        if not unused:
            return None
        reason = f"it is compiled with {compiled}, and this machine has {unused[0]} too"
        return (
            reason,
            f"compile it for this CPU (eight minutes of a core): {toolchains.remedy(library.NATIVE)}; or take another engine",
        )

    def served_note(self, serving: Serving) -> str | None:
        own = (
            ""
            if serving.options.get("tokenizer") == "same"
            else "; its file's own tokenizer cuts some texts otherwise: hand it ids"
        )
        return f"llama.cpp built with {serving.options['built_with']}{own}" if "built_with" in serving.options else None


def _cache_refusal(spec: LlamaCppSpec, model: Candidate) -> str | None:
    width = head_width(model.config) or 0
    if spec.kv_cache is None or width % refusals.BLOCK == 0:
        return None
    return f"kv_cache: q8_0 holds whole blocks of {refusals.BLOCK}, and these heads are {width} wide; leave it out"


LLAMA_CPP = LlamaCpp()
