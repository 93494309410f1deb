"""stories15M and its text: what the benchmarks of methods train on, and how they score what comes out."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from featherweight.checkpoint import opening
from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.measure.spec import WorkloadSpec
from featherweight.quantization.spec import QuantizeSpec
from featherweight.recipe.plan import SPLITS
from featherweight.recipe.reading import load_recipe
from featherweight.spec import Split
from featherweight.text.spec import TextSpec
from featherweight.text.tokens import Window, token_windows
from tasks.quantize import quantize
from tasks.text import text

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)


def over_seeds(name: str, measure: Callable[[int], float], seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """What `measure` finds with each seed, and the mean; a line of it goes to the terminal."""
    values = [round(measure(seed), 5) for seed in seeds]
    print(f"{name}: {', '.join(f'{value:.4f}' for value in values)}", file=sys.stderr, flush=True)
    return {"values": values, "mean": round(mean(values), 5)}


@dataclass(frozen=True)
class Stories:
    """The checkpoint of recipes/stories15m.yaml, its text by split, and windows of the held-out part."""

    checkpoint: Path
    text: Mapping[Split, Path]
    windows: list[Window]

    @classmethod
    def under(cls, folder: Path) -> Stories:
        """Split the recipe's text into folders below `folder`."""
        recipe = load_recipe(ROOT / "recipes" / "stories15m.yaml")
        checkpoint = ROOT / (recipe.checkpoint.source or "")
        data = recipe.data.model_copy(update={"source": str(ROOT / recipe.data.source)})
        folders = {split: folder / split for split in SPLITS}
        for split in SPLITS:
            text(TextSpec(data=data, split=split), out=folders[split])
        workload = WorkloadSpec()
        windows = token_windows(folders["evaluation"], load_tokenizer(checkpoint), workload.window_tokens, workload.windows)
        return cls(checkpoint, folders, windows)

    def quantized(self, spec: QuantizeSpec, seed: int = 0) -> float:
        """Bits per byte of the checkpoint once it is quantized so, by PyTorch with the weights on their grid."""
        with tempfile.TemporaryDirectory() as folder:
            inputs = {"checkpoint": self.checkpoint, "text": self.text["train"], "calibration": self.text["calibration"]}
            quantize(spec, **inputs, out=Path(folder), seed=seed)
            return self.bits_per_byte(Path(folder))

    def bits_per_byte(self, checkpoint: Path) -> float:
        """Cross-entropy of the windows by PyTorch in float32, each window by itself."""
        import torch

        model = opening.load_model(checkpoint).eval()
        nats = 0.0
        with torch.inference_mode():
            for window in self.windows:
                ids = torch.tensor([window.ids], device=model.device)
                nats += torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
        return nats / math.log(2) / sum(window.text_bytes for window in self.windows)
