"""Writing the folder that TorchScript serves: its graphs are traced in a process of its own."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint.saving import copy_tokenizer, save_model
from featherweight.errors import StageError
from featherweight.grid import GRIDS
from featherweight.model.matrices import move_to_grid
from featherweight.runtimes.build_process import run_build
from featherweight.runtimes.torch import pack
from featherweight.runtimes.torchscript.build import ROUNDED
from featherweight.store.served_folder import Serving
from featherweight.system.environment import without_secrets

if TYPE_CHECKING:
    from featherweight.runtimes.torchscript.runtime import TorchScriptSpec
    from featherweight.runtimes.writing import Source

FOLDER = "torchscript"


def write(spec: TorchScriptSpec, source: Source, out: Path) -> None:
    """See Runtime.write. Rounded weights go to the trace in the layers of torch-dynamic, as the integers that they are."""
    (out / FOLDER).mkdir()
    with tempfile.TemporaryDirectory(dir=out) as folder:
        _hand_over(spec, source, Path(folder))
        command = [sys.executable, "-m", "featherweight.runtimes.torchscript.build", folder, str(out / FOLDER)]
        error = run_build("TorchScript", "manifest", command, without_secrets() | {"HF_HUB_OFFLINE": "1"}, source.progress)
    if error:
        raise StageError(f"TorchScript cannot trace this checkpoint ({error}); take another engine")
    copy_tokenizer(source.checkpoint, out)
    options = {"rounded": ROUNDED} if source.quantized else {}
    Serving("torchscript", FOLDER, options, source.grid).write(out)


def _hand_over(spec: TorchScriptSpec, source: Source, folder: Path) -> None:
    if spec.precision == "float32":
        save_model(source.model, folder)
        return
    quantized = source.round(GRIDS["int8"], GRIDS["int8"])
    move_to_grid(source.model, quantized)
    pack.write(source.model, quantized, {}, folder)
    copy_tokenizer(source.checkpoint, folder)
    Serving(ROUNDED, grid=quantized.grid).write(folder)
