"""A checkpoint of 1.54 billion weights through some stages: what each takes of the host's memory and of the GPU's.

Usage: python -m infra.gpu_check.large FOLDER STAGE... (names of benchmarks.memory). Prints a line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.memory import measured


def main(folder: Path, names: list[str]) -> int:
    """0 where all of them ended well."""
    folder.mkdir(parents=True, exist_ok=True)
    peaks = measured(folder, names)
    kinds = {"anonymous": "GiB of memory", "gpu": "GiB on the GPU", "seconds": "s"}
    told = {name: ", ".join(f"{peak[key]} {unit}" for key, unit in kinds.items() if key in peak) for name, peak in peaks.items()}
    found = "; ".join(f"{name}: {said}" for name, said in told.items())
    ended = all(peak["exit"] == 0 for peak in peaks.values())
    print(json.dumps({"state": "ok" if ended else "failed", "found": found, "metrics": peaks}, default=str), flush=True)
    return int(not ended)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2:]))
