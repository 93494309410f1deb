"""Writing the folder that ONNX Runtime serves: Optimum's toolchain makes the graphs, and is not needed to serve them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint.saving import copy_tokenizer, save_model
from featherweight.errors import StageError
from featherweight.model.architecture import task_of
from featherweight.runtimes.optimum import build, mends
from featherweight.spec import Task
from featherweight.store.served_folder import Serving
from featherweight.system.processes import end_with_parent
from featherweight.system.toolchains import python

if TYPE_CHECKING:
    from featherweight.runtimes.optimum.runtime import OptimumSpec
    from featherweight.runtimes.writing import Source

FOLDER = "onnx"
TIMEOUT_S = 3600.0


def write(spec: OptimumSpec, source: Source, out: Path) -> None:
    """See Runtime.write."""
    with tempfile.TemporaryDirectory(dir=out) as folder:
        checkpoint = Path(folder)
        save_model(source.model, checkpoint)
        mends.mend_config(checkpoint)
        build_graphs(checkpoint, out / FOLDER, task_of(source.config), spec.optimize)
    copy_tokenizer(source.checkpoint, out)
    Serving("onnxruntime", FOLDER, {"optimize": spec.optimize} if spec.optimize else {}).write(out)


def build_graphs(checkpoint: Path, out: Path, task: Task, optimize: str | None) -> None:
    """Graphs of a mended checkpoint in `out`, by Optimum. Raises ToolchainError where it is absent, StageError where it fails."""
    past = "-with-past" if task in ("text-generation", "text2text-generation") else ""
    command = [str(python("optimum")), str(Path(build.__file__).resolve()), str(checkpoint), str(out)]
    command += ["--task", task + past, *(["--optimize", optimize] if optimize else [])]
    offline = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=offline, preexec_fn=end_with_parent())
    try:
        told = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        told = {"error": f"it ended with {done.returncode}: {done.stderr.strip()[-300:]}"}
    if "error" in told:
        shutil.rmtree(out, ignore_errors=True)
        raise StageError(f"Optimum cannot export this checkpoint to ONNX ({told['error']}); take torch or ctranslate2")
