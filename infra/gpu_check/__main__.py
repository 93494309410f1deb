"""Check this machine: python -m infra.gpu_check [--out FOLDER] [--minutes 9] [--without-speed]. See the package's own text."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from infra.gpu_check.checks import Check, checks
from infra.gpu_check.libraries import cublas_in_reach
from infra.gpu_check.page import page
from infra.gpu_check.running import Result, Runner


def main() -> int:
    """0 where no check failed. The table goes to the terminal and to table.md, the figures to results.json."""
    options = _options()
    out, began = options.out, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    card, notes = _card(), cublas_in_reach(out)
    results: list[Result] = []

    def told(result: Result) -> None:
        results.append(result)
        print(f"{time.monotonic() - began:6.1f}s  {result.state:7}  {result.name}  {result.found[:200]}", flush=True)
        _write(out, card, notes, results)

    # Without a GPU stages run one a core; with one they share it.
    runner = Runner(out / "logs", max(2, (os.cpu_count() or 1) // 2), options.minutes * 60 - 10, told)
    runner.run(chosen(checks(out / "work", bool(card), not options.without_speed), options.only))
    failed = [result.name for result in results if result.state == "failed"]
    print(f"{card or 'no CUDA'}: {len(results)} checks, {len(failed)} failed, {(time.monotonic() - began) / 60:.1f} minutes")
    return int(bool(failed))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m infra.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="where tables, figures and logs go")
    parser.add_argument("--minutes", type=float, default=9.5, help="what is not done then is told as not run")
    parser.add_argument("--without-speed", action="store_true", help="measure nothing")
    parser.add_argument("--only", nargs="+", default=[], help="checks whose name has one of these in it, and what they need")
    return parser.parse_args()


def chosen(every: list[Check], only: list[str]) -> list[Check]:
    """Those whose name has one of `only` in it, and what they need; all where none is named."""
    names = {one.name for one in every if not only or any(part in one.name for part in only)}
    for one in reversed(every):
        names |= set(one.after) if one.name in names else set()
    return [one for one in every if one.name in names]


def _card() -> str | None:
    """The GPU's name where CUDA computes here."""
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}"


def _write(out: Path, card: str | None, notes: list[str], results: list[Result]) -> None:
    figures = {"card": card, "notes": notes, "checks": [result.to_json() for result in results]}
    (out / "results.json").write_text(json.dumps(figures, indent=1, default=str))
    (out / "table.md").write_text(page(card, notes, results))


if __name__ == "__main__":
    raise SystemExit(main())
