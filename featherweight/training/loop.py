"""The one training loop: pre-training, distillation, recovery after pruning, quantization-aware training."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import DivergenceError
from featherweight.progress import Progress
from featherweight.store.artifact import content_digest
from featherweight.text.model_inputs import IGNORED, inputs_and_labels
from featherweight.training.muon import Muon
from featherweight.training.processes import Team, all_cores
from featherweight.training.state import SAVE_EVERY_S, Record, Saver, TrainingState

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

LossFunction = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True)
class HeldOut:
    """Text that training does not see, token ids [blocks, length], and when to measure the loss on it.

    every: steps between two measurements; one more is taken before the first step and one after the last.
    patience: stop after so many measurements in a row above the best one; None never stops.
    """

    blocks: Tensor
    every: int
    patience: int | None = None

    def due(self, step: int, steps: int) -> bool:
        """Whether to measure after `step` of `steps`."""
        return step % self.every == 0 or step == steps


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
    accumulate: int = 1,
    held_out: HeldOut | None = None,
    scratch: Path | None = None,
    save_every_s: float = SAVE_EVERY_S,
    seed: int = 0,
    progress: Progress | None = None,
    record: Record | None = None,
) -> list[float]:
    """Train `model` in place for `steps` steps of AdamW, and return the loss of every step.

    blocks: token ids, int64 [blocks, length] (see text.model_inputs); each step reads `batch` of them, in a new random
    order every epoch.
    loss_fn: token ids [batch, length] -> scalar loss; by default the cross-entropy of what is to be predicted (nats per token).
    warmup: share of the steps over which the rate rises linearly; after it a cosine falls to `final_share` of the peak.
    weight_decay: for matrices only, never for norms and biases.
    muon: update the decoder's matrices by Muon, which learns from nothing in far fewer steps (see featherweight.muon).
    accumulate: parts that a batch is computed in, one after the other: less memory, the same step.
    held_out: text to measure on while training. The weights of the best measurement are kept, not the last ones.
    scratch: folder in which the run is saved every `save_every_s` seconds, and from which a killed one goes on with the
        same bits; the caller deletes it when the run's result is safe.
    record: filled with what the run saw, for a caller who wants more than the losses.

    Where several processes were launched (see featherweight.team), each computes its part of every batch.
    The same seed gives the same weights on the same machine and thread count. Raises DivergenceError, with the step and the
    losses, as soon as the loss or the gradient is not finite or the loss has run away: from step 20 on a mean of ten losses above
    1.5 times the first one plus 1; and at the end, whatever the number of steps, the first batch's own loss above 1.5 times what
    it was plus 2. These offsets are nats, and leave room for a loss that begins near zero, as the KL to a copy's own teacher.
    """
    import torch

    loss_fn = loss_fn or (lambda ids: token_loss(model, ids))
    progress, record, team = progress or Progress(), record or Record(), Team()
    team.place(model)
    optimizer = (Muon if muon else adamw)(model, learning_rate, weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    plan = [steps, batch, learning_rate, warmup, final_share, weight_decay, grad_clip, muon, accumulate, seed, team.size]
    state = TrainingState(model, optimizer, record, _identity(plan, blocks, held_out))
    order, saver = batch_order(len(blocks), batch, steps, seed), Saver(save_every_s)
    with all_cores(), _training(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + team.rank)  # dropout, where a model has it
        _resume(state, scratch, team, steps, progress)
        if held_out and not record.held_out:
            _measure(model, state, held_out, team)
        while record.step < steps and not record.stalled(held_out.patience if held_out else None):
            step = record.step
            set_rates(optimizer, peaks, rate_share(step, steps, warmup, final_share))
            loss = _batch_loss(model, loss_fn, blocks[order[step]], accumulate, team)
            team.add_gradients(trained)
            norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip)
            loss, due = team.add(loss, scratch is not None and team.rank == 0 and saver.due())
            record.losses.append(loss)
            _check(record.losses, norm.item())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            values = {"loss": loss}
            if held_out and held_out.due(step + 1, steps):
                values["held_out_loss"] = _measure(model, state, held_out, team)
            progress.step(step + 1, steps, **values)
            if scratch is not None and due:
                _save(state, scratch, team)
                saver.done()
        state.restore_best()
        (again,) = team.add(_batch_loss(model, loss_fn, blocks[order[0]], accumulate, team, learn=False))
        _check_end(record.losses, again)
    return record.losses


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """The model in training mode, none of its layers skipped at random: adapters and matched states need them all."""
    before = model.training
    skipping: list[Any] = [module for module in model.modules() if hasattr(module, "layerdrop")]
    rates = [module.layerdrop for module in skipping]
    model.train()
    try:
        for module in skipping:
            module.layerdrop = 0.0
        yield
    finally:
        model.train(before)
        for module, rate in zip(skipping, rates, strict=True):
            module.layerdrop = rate


def _identity(plan: list[float], blocks: Tensor, held_out: HeldOut | None) -> str:
    """Digest of what makes a run this run and no other."""
    texts = [hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest() for ids in (blocks, *([held_out.blocks] if held_out else []))]
    return content_digest([plan, texts, [held_out.every, held_out.patience] if held_out else None])


def _batch_loss(model: nn.Module, loss_fn: LossFunction, ids: Tensor, accumulate: int, team: Team, *, learn: bool = True) -> float:
    """The mean loss over the batch `ids`, as far as this process computes it; where it is to `learn`, its gradient is added.

    Parts count by the tokens that they predict: in padded or masked text their number differs.
    """
    import torch

    device = next(model.parameters()).device
    parts = team.share(ids).tensor_split(accumulate)
    whole = predicted_tokens(model, ids) if len(parts) * team.size > 1 else None
    total = 0.0
    for part in parts:
        share = predicted_tokens(model, part) / whole if whole else 1.0
        with torch.set_grad_enabled(learn):
            loss = loss_fn(part.to(device))
        if learn:
            (loss * share).backward()
        total += loss.item() * share
    return total


def _measure(model: nn.Module, state: TrainingState, held_out: HeldOut, team: Team) -> float:
    """Measure the held-out loss, note it, and keep the weights where it is the lowest so far."""
    part = team.share(held_out.blocks)
    tokens = predicted_tokens(model, part) if len(part) else 0
    total, all_tokens = team.add(mean_loss(model, part) * tokens if tokens else 0.0, tokens)
    record = state.record
    record.held_out[record.step] = total / all_tokens
    if record.best_step == record.step:
        state.keep_best()
    return record.held_out[record.step]


def _save(state: TrainingState, scratch: Path, team: Team) -> None:
    """Save the run, by the first process, with the random number generators of all."""
    import torch

    noise = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]
    rows = team.gather(torch.cat(noise))
    if team.rank == 0:
        state.save(scratch, rows)


def _resume(state: TrainingState, scratch: Path | None, team: Team, steps: int, progress: Progress) -> None:
    """Go on from a saved run where there is one; its losses are told again, so that the curve is whole."""
    import torch

    noise = state.load(scratch) if scratch else None
    if noise is None:
        return
    size = len(torch.get_rng_state())
    own = noise[team.rank].clone()  # torch reads a generator's state from the start of the memory that the tensor lies in
    torch.set_rng_state(own[:size])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(own[size:].clone())
    for step, loss in enumerate(state.record.losses, 1):
        held_out = {"held_out_loss": state.record.held_out[step]} if step in state.record.held_out else {}
        progress.step(step, steps, loss=loss, **held_out)
    progress.note(f"resuming at step {state.record.step}")


def timed_loop(model: nn.Module, blocks: Tensor, *, steps: int, batch: int, **options: Any) -> dict[str, float]:
    """`train_loop`, and its metrics: `loss_first` and `loss_last` (means over a tenth of the steps), `tokens_per_s` ...

    `tokens` are those of the steps done, a resumed run's earlier ones included; the speed is of this process's own steps.
    With held-out text also `held_out_first`, `held_out_loss` (of the weights that were kept) and their `best_step`.
    """
    record = Record()
    start = time.perf_counter()
    losses = train_loop(model, blocks, steps=steps, batch=batch, record=record, **options)
    seconds = time.perf_counter() - start
    tenth = max(1, len(losses) // 10)
    metrics = {
        "loss_first": sum(losses[:tenth]) / tenth,
        "loss_last": sum(losses[-tenth:]) / tenth,
        "steps": record.step,
        "tokens": record.step * batch * blocks.shape[1],
        "tokens_per_s": (record.step - record.resumed_at) * batch * blocks.shape[1] / seconds,
    }
    best = record.best_step
    if best is None:
        return metrics
    return metrics | {"held_out_first": record.held_out[0], "held_out_loss": record.held_out[best], "best_step": best}


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
    """Mean cross-entropy of what `model` has to predict of the blocks `ids` (see text.model_inputs), in nats per token."""
    import torch

    # The labels are shifted rather than the logits: a slice of the logits would copy the largest tensor there is.
    inputs, labels = inputs_and_labels(model.config, ids)
    logits = model(**inputs).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def predicted_tokens(model: nn.Module, blocks: Tensor) -> int:
    """How many tokens of the `blocks` the model has to predict."""
    return int((inputs_and_labels(model.config, blocks)[1] != IGNORED).sum())


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
                count = predicted_tokens(model, part)
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
        raise _diverged(losses, f"loss {losses[-1]:.4g}, gradient norm {norm:.4g}")
    if len(losses) >= 20 and average > 1.5 * losses[0] + 1:
        raise _diverged(losses, f"the loss has run away from {losses[0]:.4g} to {average:.4g}")


def _check_end(losses: list[float], again: float) -> None:
    """Refuse weights that do far worse on the first batch than at first. again: its loss now, free of other batches' noise."""
    if not again <= 1.5 * losses[0] + 2:
        raise _diverged(losses, f"the first batch's loss has run away from {losses[0]:.4g} to {again:.4g}")


def _diverged(losses: list[float], problem: str) -> DivergenceError:
    last = ", ".join(f"{loss:.4g}" for loss in losses[-5:])
    return DivergenceError(
        f"training diverged at step {len(losses)}: {problem} (last losses: {last}); lower learning_rate, or check the "
        "checkpoint and the text",
        tuple(losses),
    )
