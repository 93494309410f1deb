"""Writing the folder that AOTInductor serves: its graphs are compiled in a process of its own."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint.saving import copy_tokenizer, save_model
from featherweight.errors import StageError
from featherweight.runtimes.build_process import run_build
from featherweight.runtimes.code_levels import level
from featherweight.runtimes.torch_aoti.build import CAPABILITIES
from featherweight.store.served_folder import Serving
from featherweight.system.environment import without_secrets
from featherweight.system.machine import describe

if TYPE_CHECKING:
    from featherweight.runtimes.writing import Source

FOLDER = "aoti"


def write(source: Source, out: Path) -> None:
    """See Runtime.write. What Inductor has compiled before is left where it is: a cache that others write to is not served."""
    made_for = level(describe())
    (out / FOLDER).mkdir()
    with tempfile.TemporaryDirectory(dir=out) as folder, tempfile.TemporaryDirectory() as cache:
        save_model(source.model, Path(folder))
        command = [sys.executable, "-m", "featherweight.runtimes.torch_aoti.build", folder, str(out / FOLDER)]
        told = {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": cache, "ATEN_CPU_CAPABILITY": CAPABILITIES[made_for]}
        error = run_build("AOTInductor", "manifest", command, without_secrets() | told, source.progress)
    if error:
        raise StageError(f"AOTInductor cannot compile this checkpoint ({error}); take another engine")
    copy_tokenizer(source.checkpoint, out)
    Serving("torch-aoti", FOLDER, {"made_for": made_for}, source.grid).write(out)
