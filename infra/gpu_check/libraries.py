"""libcublas of another number, where the machine has no such wheel as CTranslate2 wants: for this check alone, and said."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

WANTED = "libcublas.so.12"


def cublas_in_reach(out: Path) -> list[str]:
    """What was done about it: nothing where it loads, else the next one under its name, on the path of the checks."""
    if _loads(WANTED):
        return []
    other = next((found for folder in sys.path for found in sorted(Path(folder).glob("nvidia/*/lib/libcublas.so.1[3-9]"))), None)
    if other is None:
        return [f"no {WANTED} and none like it: CTranslate2 cannot compute on CUDA here"]
    links = (out / "libraries").absolute()
    links.mkdir(exist_ok=True)
    (links / WANTED).unlink(missing_ok=True)
    (links / WANTED).symlink_to(other)
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([str(links), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    return [f"{other.name} stood in for {WANTED}, which nvidia-cublas-cu12 brings and this machine lacks"]


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
