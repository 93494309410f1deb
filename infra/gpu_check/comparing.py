"""What a stage made on CUDA beside what it made on the CPU of the same inputs, each held to a stated bound."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.recipe.plan import Node
from infra.gpu_check.plans import folder_of

if TYPE_CHECKING:
    from torch import Tensor

WINDOWS, TOKENS = 24, 128


@dataclass(frozen=True)
class Bound:
    """How far a stage's result on CUDA may be: relative difference of the held-out loss, share of weights that may differ."""

    loss: float
    weights: float | None
    why: str


EQUAL = Bound(1e-6, 0.0, "nothing is computed that rounds differently")
BOUNDS = {
    "rtn": EQUAL,
    "gptq": Bound(0.005, 0.05, "sums of the Hessian in another order move a weight that lies half way between two steps"),
    "awq": Bound(0.005, None, "the search may take the neighbour of a flat minimum"),
    "smoothquant": Bound(0.005, None, "ranges are sums and maxima of activations"),
    "qat": Bound(0.02, None, "steps of training, each from the last one's rounding"),
    "structured": Bound(0.01, None, "units of like importance may change places"),
    "width": Bound(0.01, None, "units of like importance may change places"),
    "depth": EQUAL,
    "attention": Bound(1e-5, None, "means of heads"),
    "sparse": Bound(0.01, 0.02, "weights of like importance may change places"),
}
TRAINED = Bound(0.02, None, "steps of training, each from the last one's rounding")


def compared(node: Node, work: Path) -> tuple[str, str, dict[str, Any]]:
    """State, one line, and figures."""
    cpu, cuda = (folder_of(work, device, node.id) for device in ("cpu", "cuda"))
    if node.stage == "generate":
        return _texts(cpu, cuda)
    if node.stage == "sensitivity":
        return _scans(cpu, cuda)
    return _checkpoints(bound_of(node), cpu, cuda, folder_of(work, "cpu", "text/evaluation"))


def bound_of(node: Node) -> Bound:
    """The bound of a node, by its method where that says more than its stage."""
    method = "smoothquant" if getattr(node.spec, "smooth", "none") not in ("none", None) else getattr(node.spec, "method", "")
    return BOUNDS.get(method, TRAINED)


def _checkpoints(bound: Bound, cpu: Path, cuda: Path, text: Path) -> tuple[str, str, dict[str, Any]]:
    ours, theirs = loss_of(cuda, text), loss_of(cpu, text)
    differ, furthest = weights_apart(cpu, cuda)
    apart = abs(ours - theirs) / theirs
    good = apart <= bound.loss and (bound.weights is None or differ <= bound.weights)
    allowed = f"{bound.loss:.2g}" + ("" if bound.weights is None else f", weights {bound.weights:.2g}")
    found = f"loss {ours:.4f}, on the CPU {theirs:.4f}: {apart:.2g} apart; {differ:.2%} of the weights differ (allowed {allowed})"
    figures = {"loss_cuda": ours, "loss_cpu": theirs, "weights_differ": differ, "weights_furthest": furthest}
    return "ok" if good else "failed", found, figures


def loss_of(checkpoint: Path, text: Path) -> float:
    """Nats a token of held-out windows, by transformers in float32 on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    from featherweight.checkpoint.tokenizer import load_tokenizer
    from featherweight.text.tokens import token_windows

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True).eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for window in token_windows(text, load_tokenizer(checkpoint), TOKENS, WINDOWS):
            ids = torch.tensor([window.ids])
            total += torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    return total / count


def weights_apart(one: Path, other: Path) -> tuple[float, float]:
    """The share of weights that differ by more than rounding of their sums, and the largest difference over the tensor's largest
    weight; 1 and infinity where shapes differ."""
    first, second = _weights(one), _weights(other)
    if {k: v.shape for k, v in first.items()} != {k: v.shape for k, v in second.items()}:
        return 1.0, float("inf")
    differing, total, furthest = 0, 0, 0.0
    for name, weight in first.items():
        apart, largest = (weight.float() - second[name].float()).abs(), weight.float().abs().max().item()
        differing += int((apart > 1e-5 * largest).sum())
        total += weight.numel()
        furthest = max(furthest, apart.max().item() / (largest or 1.0))
    return differing / max(total, 1), furthest


def _weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: weight for file in sorted(folder.glob("*.safetensors")) for name, weight in load_file(file).items()}


def _texts(cpu: Path, cuda: Path) -> tuple[str, str, dict[str, Any]]:
    """Greedy texts: rounding may turn one between two likeliest tokens, and all behind it."""
    ours, theirs = (_lines(folder) for folder in (cuda, cpu))
    same = sum(one in set(theirs) for one in ours) / max(len(ours), 1)
    found = f"{len(ours)} texts, {same:.0%} of them the CPU's word for word (at least 80 %)"
    return "ok" if ours and same >= 0.8 else "failed", found, {"texts": len(ours), "same": same}


def _lines(folder: Path) -> list[str]:
    return [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def _scans(cpu: Path, cuda: Path) -> tuple[str, str, dict[str, Any]]:
    """The losses that a scan found for each matrix."""
    ours, theirs = (dict(_numbers(json.loads(file.read_text()))) for file in (_scan(cuda), _scan(cpu)))
    differences = [abs(ours.get(key, math.inf) - value) / max(abs(value), 1.0) for key, value in theirs.items()]
    apart = max(differences, default=math.inf)
    # One by one: a figure that is no number would hide in a maximum.
    good = ours.keys() == theirs.keys() and bool(differences) and all(difference <= 0.005 for difference in differences)
    return "ok" if good else "failed", f"{len(ours)} figures, {apart:.2g} apart at most (allowed 0.005)", {"apart": apart}


def _scan(folder: Path) -> Path:
    return next(file for file in sorted(folder.glob("*.json")) if file.name != "manifest.json")


def _numbers(tree: Any, path: str = "") -> list[tuple[str, float]]:
    if isinstance(tree, dict):
        return [pair for key, value in tree.items() for pair in _numbers(value, f"{path}/{key}")]
    if isinstance(tree, list):
        return [pair for key, value in enumerate(tree) for pair in _numbers(value, f"{path}/{key}")]
    return [(path, float(tree))] if isinstance(tree, int | float) and not isinstance(tree, bool) else []
