"""Parity: does the served engine compute what the PyTorch model computes? An export that does not fails its variant.

A static engine (one range per layer) is compared with a model that rounds its activations by the same ranges: what the rounding
itself costs is a matter of quality and not of parity. How far apart the two may be: featherweight/runtimes/bounds.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.errors import ParityError
from featherweight.model.architecture import auto_class
from featherweight.progress import Metrics
from featherweight.runtimes.bounds import Bound
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.client import open_worker
from featherweight.store.served_folder import Serving
from featherweight.text.model_inputs import IGNORED, scoring_windows, window_inputs
from featherweight.text.tokens import Window

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOWS = 6
WINDOW_TOKENS = 128


@dataclass(frozen=True)
class Reference:
    """Windows of calibration text and what the PyTorch model says about them: log-probabilities of what is scored in each."""

    windows: list[Window]
    logprobs: list[list[float]]

    @classmethod
    def of(cls, model: PreTrainedModel, source: Path, text: Path) -> Reference:
        """Score a few windows of `text` with `model`, float32 on the CPU; `source` has the tokenizer."""
        length = min(WINDOW_TOKENS, getattr(model.config, "max_position_embeddings", None) or WINDOW_TOKENS)
        windows = scoring_windows(source, model.config, text, length, WINDOWS)
        return cls(windows, [_score(model, window) for window in windows])

    def check(self, served: Path, bound: Bound | None = None) -> Metrics:
        """Compare with the engine that `served` names, started for it.

        bound: by default what the engine's handling of activations allows. Returns `parity_max_abs`, `parity_mean_abs` and
        `parity_bound`, in nats. Raises ParityError above the bound, and for anything that is not a number.
        """
        serving = Serving.read(served)
        longest = max(max(len(window.ids), len(window.source)) for window in self.windows)
        with open_worker(served, threads=1, max_tokens=longest, max_batch=1) as worker:
            found = worker.score(self.windows)
        return self.hold(found, bound or bound_of(serving), f"{serving.engine} ({serving.grid or 'float'})")

    def hold(self, found: list[list[float]], bound: Bound, name: str) -> Metrics:
        """The same for log-probabilities that `name` has computed already."""
        pairs = zip(self.logprobs, found, strict=True)
        differences = [abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)]
        values = {"max": max(differences), "mean": sum(differences) / len(differences)}
        # A NaN is above any bound, but no comparison says so.
        if not all(difference >= 0 for difference in differences) or not values[bound.statistic] <= bound.value:
            raise ParityError(
                f"{name} does not compute what its PyTorch source computes: "
                f"{bound.statistic} |difference| of log-probabilities {values[bound.statistic]:.4g} nats over "
                f"{len(differences)} tokens, bound {bound.value:g} (max {values['max']:.4g}, mean {values['mean']:.4g})"
            )
        return {"parity_max_abs": values["max"], "parity_mean_abs": values["mean"], "parity_bound": bound.value}


def load_reference(source: Path) -> PreTrainedModel:
    """The checkpoint's model, float32, on the CPU."""
    import torch
    from transformers import AutoConfig

    kind = auto_class(AutoConfig.from_pretrained(source, local_files_only=True))
    return kind.from_pretrained(source, dtype=torch.float32, local_files_only=True, use_safetensors=True).eval()


def bound_of(serving: Serving) -> Bound:
    """The bound that an engine is held to, by how it handles activations."""
    return RUNTIMES[serving.engine].bound(serving)


def _score(model: PreTrainedModel, window: Window) -> list[float]:
    import torch

    with torch.inference_mode():
        inputs, labels = window_inputs(model.config, torch.tensor([window.ids]), torch.tensor([window.source]))
        wanted = labels[0] != IGNORED
        logits = model(**inputs).logits[0, wanted].log_softmax(-1)
        return logits.gather(-1, labels[0, wanted, None]).squeeze(-1).tolist()
