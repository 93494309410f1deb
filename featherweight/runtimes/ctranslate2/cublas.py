"""cuBLAS 12, which CTranslate2 opens by name when it first computes on CUDA, and which a torch for CUDA 13 does not bring.

NVIDIA's wheel puts it where no loader looks; a library of that name which the process has loaded already is taken instead.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from featherweight.errors import ToolchainError

LIBRARY = "libcublas.so.12"
"""By the strings in ctranslate2 4.8.5's own library."""
WHEEL = "nvidia-cublas-cu12"
IN_WHEEL = Path("nvidia", "cublas", "lib")
TOOLKITS = "/usr/local/cuda*/lib64"


def find(folders: Sequence[str] | None = None) -> Path | None:
    """cuBLAS 12 in the wheel, on LD_LIBRARY_PATH, among the system's libraries or in a CUDA toolkit; None where it is nowhere.

    folders: where packages are installed, by default those of this Python.
    """
    return next((file for file in _candidates(sys.path if folders is None else folders) if file.is_file()), None)


def refusal() -> str | None:
    """Why CTranslate2 cannot compute on CUDA here; None where it can, or where another system names its libraries otherwise."""
    if sys.platform != "linux" or find():
        return None
    return (
        f"CTranslate2 needs {LIBRARY} on CUDA, which is not installed; pip install {WHEEL} (or `make setup`, by the extra 'cuda')"
    )


@cache
def load() -> None:
    """Load it for this process; nothing happens where it is already, or on another system. Raises ToolchainError without it."""
    if reason := refusal():
        raise ToolchainError(reason)
    if sys.platform == "linux" and (file := find()):
        # Where it lies itself, beside the library that it needs in turn; behind a link the loader would not look there.
        ctypes.CDLL(str(file.resolve()), mode=ctypes.RTLD_GLOBAL)


def _candidates(folders: Sequence[str]) -> Iterator[Path]:
    yield from (Path(folder) / IN_WHEEL / LIBRARY for folder in folders)
    yield from (Path(folder) / LIBRARY for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder)
    yield from _of_the_system()
    yield from (folder / LIBRARY for folder in sorted(Path("/").glob(TOOLKITS.lstrip("/")), reverse=True))


@cache
def _of_the_system() -> tuple[Path, ...]:
    """What the loader's cache has under that name."""
    try:
        listed = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(map(Path, re.findall(rf"^\s*{re.escape(LIBRARY)} .*=> (\S+)$", listed, re.MULTILINE)))
