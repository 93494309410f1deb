"""The conformance matrix: every family that transformers opens, in tiny, through every engine that is here.

Each checkpoint is loaded, quantized to int8 and served by each engine; log-probabilities to the full served length and texts of 64
tokens after three prompts are held to transformers' eager float32. Each cell is exact, within the grid's bound, or refused with its
reason; anything else is a defect, and the exit code is 1, as where a cell used up its seconds. What was found with the same code is
not run again.

Usage: python -m conformance [--family NAME ...] [--engine NAME ...] [--page FILE] [--redo]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import monotonic

from conformance.cell import LOAD, QUANTIZE, columns
from conformance.outcome import ROOT, Matrix
from conformance.page import page
from conformance.run import Run
from conformance.tiny import Case, cases
from featherweight.runtimes.catalog import RUNTIMES

CELLS = ROOT / "docs" / "runtimes.json"
WORK = ROOT / "build" / "conformance"
LAST = ("onnxruntime", "openvino", "vllm", "torch-compile", "torch-aoti", "tvm")
"""The engines that take longest, behind all others."""


def main() -> int:
    """Run the cells that were asked for, write the page where one was asked for; 1 where a cell is a defect, or was not done."""
    options = _options()
    matrix = Matrix.open(options.cells)
    chosen = [case for case in cases() if not options.family or {case.name, case.model_type} & set(options.family)]
    wanted = sorted((column for column in columns() if _asked(column, options.engine)), key=_last)
    began = monotonic()
    Run(matrix, options.work, options.limit, options.redo).all(chosen, wanted)
    print(f"{len(chosen)} checkpoints, {len(wanted)} columns, {(monotonic() - began) / 60:.1f} minutes")
    if options.page:
        options.page.write_text(page(matrix, cases(), columns()))
    return int(_defects(matrix, chosen, wanted))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m conformance", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--family", nargs="+", default=[], help="model types, or names of rows")
    parser.add_argument("--engine", nargs="+", default=[], choices=[*RUNTIMES], help="engines; all where none is named")
    parser.add_argument("--limit", type=float, default=150.0, help="CPU seconds that a cell may take")
    parser.add_argument("--work", type=Path, default=WORK, help="where the checkpoints are kept")
    parser.add_argument("--cells", type=Path, default=CELLS, help="where what was found is kept")
    parser.add_argument("--page", type=Path, help="write the matrix as a page")
    parser.add_argument("--redo", action="store_true", help="run again what this code has found already")
    return parser.parse_args()


def _asked(column: str, engines: list[str]) -> bool:
    return column in (LOAD, QUANTIZE) or not engines or column.rpartition(" ")[0] in engines


def _last(column: str) -> int:
    engine = column.rpartition(" ")[0]
    return LAST.index(engine) + 1 if engine in LAST else 0


def _defects(matrix: Matrix, chosen: list[Case], wanted: list[str]) -> bool:
    outcomes = (matrix.get(case.name, column) for case in chosen for column in wanted)
    return any(outcome is None or outcome.kind == "defect" or outcome.moment == "at its limit" for outcome in outcomes)


if __name__ == "__main__":
    raise SystemExit(main())
