"""Writing the folder that ONNX Runtime serves: Optimum's toolchain makes the graphs, and is not needed to serve them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint.saving import copy_tokenizer, save_model
from featherweight.errors import StageError
from featherweight.grid import GRIDS
from featherweight.model.architecture import task_of
from featherweight.model.matrices import round_to_nearest
from featherweight.progress import Progress
from featherweight.runtimes.build_process import LIMIT_S, other_python, run_build
from featherweight.runtimes.onnx.pack import Products
from featherweight.runtimes.optimum import build, mends
from featherweight.runtimes.optimum.pack import pack_graphs
from featherweight.runtimes.packing import QuantizedRows
from featherweight.spec import Task
from featherweight.store.served_folder import Serving
from featherweight.system.machine import describe
from featherweight.system.toolchains import python

if TYPE_CHECKING:
    from featherweight.runtimes.optimum.runtime import OptimumSpec
    from featherweight.runtimes.torch.linear import InputRange
    from featherweight.runtimes.writing import Source

FOLDER = "onnx"
KERNELS = {True: "exact int8 products (VNNI or Arm's dot product)", False: "AVX2"}
"""By whether the CPU sums int8 products exactly: what it multiplies integers with, for the report."""


def write(spec: OptimumSpec, source: Source, out: Path) -> None:
    """See Runtime.write. The graphs are made of the checkpoint's own floats, so their rows are sought, and rounded after that."""
    if source.quantized is None and spec.precision != "float32":
        body, head = (GRIDS[name] for name in rounded_here(spec))
        source.quantized = round_to_nearest(source.model, body, head, source.room)
    rows = QuantizedRows.of(source.model, source.quantized) if source.quantized else None
    signed = describe().int8_dot_product
    with tempfile.TemporaryDirectory(dir=out) as folder:
        checkpoint, built = Path(folder) / "checkpoint", Path(folder) / "graphs"
        save_model(source.model, checkpoint)
        mends.mend_config(checkpoint)
        task = task_of(source.config)
        build_graphs(checkpoint, built, task, spec.optimize, source.progress, keep_matrices=rows is not None)
        if source.quantized:
            source.move_to_grid()
        ranges = _ranges(source) if rows is not None and spec.activations == "static" else {}
        pack_graphs(built, out / FOLDER, rows, Products(spec.activations, signed=signed, ranges=ranges))
    copy_tokenizer(source.checkpoint, out)
    options: dict[str, str] = {"optimize": spec.optimize} if spec.optimize else {}
    if source.quantized:
        options |= {"activations": spec.activations, "kernels": KERNELS[signed]}
    Serving("onnxruntime", FOLDER, options, source.grid).write(out)


def _ranges(source: Source) -> Mapping[str, InputRange]:
    """Of the inputs of every layer in the blocks, on the calibration text."""
    from featherweight.runtimes.torch.static_ranges import input_ranges

    assert source.quantized
    source.progress.note("finding the ranges of activations")
    return input_ranges(source.model, source.quantized.body, source.checkpoint, source.calibration, source.seed)


def rounded_here(spec: OptimumSpec) -> tuple[str, str]:
    """Grids of the blocks and of embedding and head where no quantize stage chose them."""
    return ("int4-g32", "int8-g32") if spec.precision == "int4" else ("int8", "int8")


def build_graphs(
    checkpoint: Path,
    out: Path,
    task: Task,
    optimize: str | None,
    progress: Progress = Progress(),
    *,
    keep_matrices: bool = False,
    limit_s: float = LIMIT_S,
) -> None:
    """Graphs of a mended checkpoint in `out`, by Optimum. Raises ToolchainError where it is absent, StageError where it fails."""
    past = "-with-past" if task in ("text-generation", "text2text-generation") else ""
    command = [str(python("optimum")), str(Path(build.__file__).resolve()), str(checkpoint), str(out), "--task", task + past]
    command += [*(["--optimize", optimize] if optimize else []), *(["--keep-matrices"] if keep_matrices else [])]
    if error := run_build("Optimum", "graphs", command, other_python(), progress, limit_s):
        shutil.rmtree(out, ignore_errors=True)
        raise StageError(f"Optimum cannot export this checkpoint to ONNX ({error}); take another engine")
