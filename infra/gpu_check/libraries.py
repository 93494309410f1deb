"""libcublas of another number, where the machine has no such wheel as CTranslate2 wants: for this check alone, and said."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from featherweight.runtimes.ctranslate2 import cublas


def cublas_in_reach(out: Path) -> list[str]:
    """What was done about it: nothing where there is one, else the next one under its name, on the path of the checks."""
    if cublas.find():
        return []
    other = next((found for folder in sys.path for found in sorted(Path(folder).glob("nvidia/*/lib/libcublas.so.1[3-9]"))), None)
    if other is None:
        return [f"no {cublas.LIBRARY} and none like it: CTranslate2 cannot compute on CUDA here"]
    links = (out / "libraries").absolute()
    links.mkdir(exist_ok=True)
    (links / cublas.LIBRARY).unlink(missing_ok=True)
    (links / cublas.LIBRARY).symlink_to(other)
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([str(links), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    return [f"{other.name} stood in for {cublas.LIBRARY}, which {cublas.WHEEL} brings and this machine lacks"]
