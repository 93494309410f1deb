"""The one training loop: pre-training, distillation, recovery after pruning, quantization-aware training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from featherweight.errors import StageError
from featherweight.examples import IGNORED, inputs_and_labels
from featherweight.muon import Muon
from featherweight.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

LossFunction = Callable[["Tensor"], "Tensor"]


def train_loop(
    model: nn.Module,
    blocks: Tensor,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    loss_fn: LossFunction | None = None,
    warmup: float = 0.05,
    final_share: float = 0.1,
    weight_decay: float = 0.1,
    grad_clip: float = 1.0,
    muon: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """Train `model` in place for `steps` steps of AdamW, and return the loss of every step.

    blocks: token ids, int64 [blocks, length] (see featherweight.examples); each step reads `batch` of them, in a new random
    order every epoch.
    loss_fn: token ids [batch, length] -> scalar loss; by default the cross-entropy of what is to be predicted (nats per token).
    warmup: share of the steps over which the rate rises linearly; after it a cosine falls to `final_share` of the peak.
    weight_decay: for matrices only, never for norms and biases.
    muon: update the decoder's matrices by Muon, which learns from nothing in far fewer steps (see featherweight.muon).

    The same seed gives the same weights on the same machine and thread count. Raises StageError, with the step and the
    last losses, as soon as the loss or the gradient is not finite or the loss has run away.
    """
    import torch

    loss_fn = loss_fn or (lambda ids: token_loss(model, ids))
    progress = progress or Progress()
    optimizer = (Muon if muon else adamw)(model, learning_rate, weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    device = trained[0].device
    losses: list[float] = []
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # dropout, where a model has it
            for step, rows in enumerate(batch_order(len(blocks), batch, steps, seed)):
                set_rates(optimizer, peaks, rate_share(step, steps, warmup, final_share))
                loss = loss_fn(blocks[rows].to(device))
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip)
                losses.append(loss.item())
                _check(losses, norm.item())
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                progress.step(step + 1, steps, loss=losses[-1])
    finally:
        model.train(was_training)
    return losses


def timed_loop(model: nn.Module, blocks: Tensor, *, steps: int, batch: int, **options: Any) -> dict[str, float]:
    """`train_loop`, and its metrics: `loss_first` and `loss_last` (means over a tenth of the steps), `tokens_per_s` ..."""
    start = time.perf_counter()
    losses = train_loop(model, blocks, steps=steps, batch=batch, **options)
    seconds = time.perf_counter() - start
    tenth = max(1, len(losses) // 10)
    tokens = steps * batch * blocks.shape[1]
    return {
        "loss_first": sum(losses[:tenth]) / tenth,
        "loss_last": sum(losses[-tenth:]) / tenth,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
    }


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    """AdamW over the trainable weights, decaying matrices only."""
    import torch

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": weight_decay},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def set_rates(optimizer: Optimizer | Muon, peaks: list[float], share: float) -> None:
    """Set the learning rate of every group to a share of its peak."""
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = share * peak


def rate_share(step: int, steps: int, warmup: float, final_share: float) -> float:
    """Share of the peak learning rate at `step` of `steps` (from 0): linear warm-up, then a cosine to `final_share`."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - 1 - rising)
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * done))


def batch_order(blocks: int, batch: int, steps: int, seed: int) -> Tensor:
    """Rows to read at each step, int64 [steps, batch]: whole shuffled epochs, one after another."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch // blocks)
    order = torch.cat([torch.randperm(blocks, generator=generator) for _ in range(epochs)])
    return order[: steps * batch].view(steps, batch)


def token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of what `model` has to predict of the blocks `ids` (see featherweight.examples), in nats per token."""
    import torch

    # The labels are shifted rather than the logits: a slice of the logits would copy the largest tensor there is.
    inputs, labels = inputs_and_labels(model.config, ids)
    logits = model(**inputs).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def mean_loss(model: nn.Module, blocks: Tensor, batch: int = 8) -> float:
    """Mean cross-entropy over all `blocks`, in nats per predicted token, without gradients."""
    import torch

    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    try:
        with torch.inference_mode():
            for part in blocks.split(batch):
                count = int((inputs_and_labels(model.config, part)[1] != IGNORED).sum())
                total += token_loss(model, part.to(device)).item() * count
                tokens += count
    finally:
        model.train(was_training)
    return total / tokens


def _check(losses: list[float], norm: float) -> None:
    """Refuse to go on when the loss or the gradient is not finite, or the loss stands far above where it began."""
    recent = losses[-10:]
    average = sum(recent) / len(recent)
    if not math.isfinite(losses[-1]) or not math.isfinite(norm):
        problem = f"loss {losses[-1]:.4g}, gradient norm {norm:.4g}"
    elif len(losses) >= 20 and average > 1.5 * losses[0] + 1:
        problem = f"the loss has run away from {losses[0]:.4g} to {average:.4g}"
    else:
        return
    last = ", ".join(f"{loss:.4g}" for loss in losses[-5:])
    raise StageError(
        f"training diverged at step {len(losses)}: {problem} (last losses: {last}); lower learning_rate, or check the "
        "checkpoint and the text"
    )
