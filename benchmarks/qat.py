"""How much of the loss of plain 4-bit rounding quantization-aware training recovers on stories15M, over three seeds."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "stories15m.yaml"
GRIDS = ("int4", "int4-g32")
SEEDS = (0, 1, 2)
QAT: dict[str, Any] = {"method": "qat", "steps": 100, "batch": 8, "sequence": 128, "generated_tokens": 100_000}

Tree = dict[str, Any]


def qat() -> Tree:
    """Bits per byte of held-out text after RTN, GPTQ and QAT, embedding and head on the same 4-bit grid, against float."""
    from featherweight.recipe import TextSpec, load_recipe
    from tasks.text import SPLITS, text

    recipe = load_recipe(RECIPE)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {split: Path(scratch) / split for split in SPLITS}
        for split, folder in folders.items():
            text(TextSpec(data=recipe.data, split=split), out=folder)
        checkpoint = ROOT / (recipe.checkpoint.source or "")
        score = _scorer(checkpoint, folders["evaluation"])
        return {"windows": score.windows, "grids": {grid: _grid(grid, checkpoint, folders, score) for grid in GRIDS}}


class _scorer:
    """Relative change of bits per byte against the float checkpoint, over the windows of the recipe's workload."""

    def __init__(self, checkpoint: Path, text: Path) -> None:
        from featherweight.recipe import WorkloadSpec
        from featherweight.text import load_tokenizer, token_windows

        workload = WorkloadSpec()
        self.ids = [one.ids for one in token_windows(text, load_tokenizer(checkpoint), workload.window_tokens, workload.windows)]
        self.windows = len(self.ids)
        self.float_nll = self._nll(checkpoint)

    def __call__(self, folder: Path) -> float:
        return round(self._nll(folder) / self.float_nll - 1, 5)

    def _nll(self, folder: Path) -> float:
        import torch

        from featherweight.surgery import load_model

        model = load_model(folder).eval()
        total = 0.0
        with torch.inference_mode():
            for window in self.ids:
                ids = torch.tensor([window], device=model.device)
                logs = model(ids[:, :-1], use_cache=False).logits.log_softmax(-1)
                total -= logs.gather(-1, ids[:, 1:, None]).double().sum().item()
        return total


def _grid(grid: str, checkpoint: Path, folders: dict[str, Path], score: _scorer) -> Tree:
    place = {"grid": grid, "head": grid}
    rtn, gptq = (_quantized(checkpoint, folders, score, place | {"method": method}) for method in ("rtn", "gptq"))
    runs = [_quantized(checkpoint, folders, score, QAT | place, seed) for seed in SEEDS]
    return {"rtn": rtn, "gptq": gptq, "qat": runs, "recovered": round(1 - statistics.mean(runs) / rtn, 3)}


def _quantized(checkpoint: Path, folders: dict[str, Path], score: _scorer, options: Tree, seed: int = 0) -> float:
    from featherweight.recipe import QuantizeSpec
    from tasks.quantize import quantize

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "quantized"
        out.mkdir()
        inputs = {"checkpoint": checkpoint, "text": folders["train"], "calibration": folders["calibration"]}
        quantize(QuantizeSpec.model_validate(options), **inputs, out=out, seed=seed)
        return score(out)
