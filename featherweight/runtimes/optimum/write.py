"""Writing the folder that ONNX Runtime serves: Optimum's toolchain makes the graphs, and is not needed to serve them."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from featherweight.checkpoint.saving import copy_tokenizer, save_model
from featherweight.errors import StageError
from featherweight.model.architecture import task_of
from featherweight.progress import Progress
from featherweight.runtimes.optimum import build, mends
from featherweight.spec import Task
from featherweight.store.served_folder import Serving
from featherweight.system.child_process import ChildProcess
from featherweight.system.toolchains import python

if TYPE_CHECKING:
    from featherweight.runtimes.optimum.runtime import OptimumSpec
    from featherweight.runtimes.writing import Source

FOLDER = "onnx"
LIMIT_S = 3600.0
"""Time that Optimum's exporter has."""


def write(spec: OptimumSpec, source: Source, out: Path) -> None:
    """See Runtime.write."""
    with tempfile.TemporaryDirectory(dir=out) as folder:
        checkpoint = Path(folder)
        save_model(source.model, checkpoint)
        mends.mend_config(checkpoint)
        build_graphs(checkpoint, out / FOLDER, task_of(source.config), spec.optimize, source.progress)
    copy_tokenizer(source.checkpoint, out)
    Serving("onnxruntime", FOLDER, {"optimize": spec.optimize} if spec.optimize else {}).write(out)


def build_graphs(
    checkpoint: Path,
    out: Path,
    task: Task,
    optimize: str | None,
    progress: Progress = Progress(),
    *,
    keep_attention: bool = False,
    limit_s: float = LIMIT_S,
) -> None:
    """Graphs of a mended checkpoint in `out`, by Optimum. Raises ToolchainError where it is absent, StageError where it fails."""
    past = "-with-past" if task in ("text-generation", "text2text-generation") else ""
    command = [str(python("optimum")), str(Path(build.__file__).resolve()), str(checkpoint), str(out), "--task", task + past]
    command += [*(["--optimize", optimize] if optimize else []), *(["--keep-attention"] if keep_attention else [])]
    if error := run_build(command, progress, limit_s):
        shutil.rmtree(out, ignore_errors=True)
        raise StageError(f"Optimum cannot export this checkpoint to ONNX ({error}); take torch or ctranslate2")


def run_build(command: list[str], progress: Progress, limit_s: float) -> str | None:
    """Run build.py and pass on what it says it does; None where it is done, else in one line what became of it."""
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}
    child, doing, deadline = ChildProcess(command, surroundings, dies_with_parent=True), "starting", monotonic() + limit_s
    try:
        while told := child.receive(max(0.0, deadline - monotonic())):
            if "graphs" in told:
                return None
            if "error" in told:
                return str(told["error"])
            doing = told["note"]
            progress.note(f"Optimum: {doing}")
        return _ending(child, doing)
    except TimeoutError:
        return f"it was ended after its limit of {limit_s:g} s while {doing}"
    finally:
        child.kill()
        child.close()


def _ending(child: ChildProcess, doing: str) -> str:
    """How it ended without a word of graphs or an error."""
    memory = ", which Linux does when memory runs out" if child.process.wait() == -signal.SIGKILL else ""
    return f"it ended with {child.ending()}{memory} while {doing}; {child.tail()}"
