"""Writing the folder that TVM serves: its library is compiled in a process of its own."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint.saving import copy_tokenizer, save_model
from featherweight.errors import StageError
from featherweight.grid import GRIDS
from featherweight.runtimes.build_process import run_build
from featherweight.runtimes.code_levels import level
from featherweight.store.served_folder import Serving
from featherweight.system.environment import without_secrets
from featherweight.system.machine import describe

if TYPE_CHECKING:
    from featherweight.runtimes.tvm.runtime import TvmSpec
    from featherweight.runtimes.writing import Source

FOLDER = "tvm"


def write(spec: TvmSpec, source: Source, out: Path) -> None:
    """See Runtime.write. Rounded weights go to the compiler as the integers that they are."""
    if spec.precision == "int8":
        source.round(GRIDS["int8"], GRIDS["int8"])
    (out / FOLDER).mkdir()
    with tempfile.TemporaryDirectory(dir=out) as folder:
        save_model(source.model, Path(folder))
        if source.quantized:
            source.quantized.write(Path(folder))
        command = [sys.executable, "-m", "featherweight.runtimes.tvm.build", folder, str(out / FOLDER)]
        error = run_build("TVM", "library", command, without_secrets() | {"HF_HUB_OFFLINE": "1"}, source.progress)
    if error:
        raise StageError(f"TVM cannot compile this checkpoint ({error}); take another engine")
    copy_tokenizer(source.checkpoint, out)
    Serving("tvm", FOLDER, {"made_for": level(describe())}, source.grid).write(out)
