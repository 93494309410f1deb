"""The one training loop: pre-training, distillation, recovery after pruning, quantization-aware training."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from featherweight.progress import Progress
from featherweight.store.artifact import content_digest
from featherweight.system import device
from featherweight.training.data_parallel import DataParallelGroup
from featherweight.training.divergence import check_end, check_step
from featherweight.training.losses import block_losses, predicted_tokens, token_loss
from featherweight.training.optimizer import ScheduledOptimizer
from featherweight.training.plan import TrainingPlan
from featherweight.training.state import Record, Saver, TrainingState
from featherweight.training.threads import all_cores

if TYPE_CHECKING:
    from torch import Tensor, nn

LossFunction = Callable[["Tensor"], "Tensor"]


def train_loop(
    model: nn.Module,
    blocks: Tensor,
    plan: TrainingPlan,
    *,
    loss_fn: LossFunction | None = None,
    progress: Progress | None = None,
    record: Record | None = None,
) -> list[float]:
    """Train `model` in place as the plan says, and return the loss of every step.

    blocks: token ids, int64 [blocks, length] (see text.model_inputs); each step reads a batch of them, in a new random
    order every epoch.
    loss_fn: token ids [batch, length] -> scalar loss; by default the cross-entropy of what is to be predicted (nats per token).
    record: filled with what the run saw, for a caller who wants more than the losses.

    Where several processes were launched (see training.data_parallel), each computes its part of every batch.
    The same seed gives the same weights on the same machine and thread count. Raises DivergenceError, with the step and the
    losses, as soon as the loss or the gradient is not finite or the loss has run away (see training.divergence).
    """
    import torch

    run = _Run(model, blocks, plan, loss_fn or (lambda ids: token_loss(model, ids)), progress or Progress(), record or Record())
    with all_cores(), _training(model), torch.random.fork_rng(devices=[]):
        return run.losses()


def timed_loop(
    model: nn.Module,
    blocks: Tensor,
    plan: TrainingPlan,
    *,
    loss_fn: LossFunction | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """`train_loop`, and its metrics: `loss_first` and `loss_last` (means over a tenth of the steps), `tokens_per_s` ...

    `tokens` are those of the steps done, a resumed run's earlier ones included; the speed is of this process's own steps.
    With held-out text also `held_out_first`, `held_out_loss` (of the weights that were kept) and their `best_step`.
    """
    record = Record()
    start = time.perf_counter()
    losses = train_loop(model, blocks, plan, loss_fn=loss_fn, progress=progress, record=record)
    seconds = time.perf_counter() - start
    tenth, tokens = max(1, len(losses) // 10), plan.batch * blocks.shape[1]
    metrics = {
        "loss_first": sum(losses[:tenth]) / tenth,
        "loss_last": sum(losses[-tenth:]) / tenth,
        "steps": record.step,
        "tokens": record.step * tokens,
        "tokens_per_s": (record.step - record.resumed_at) * tokens / seconds,
    }
    best = record.best_step
    if best is None:
        return metrics
    return metrics | {"held_out_first": record.held_out[0], "held_out_loss": record.held_out[best], "best_step": best}


def batch_order(blocks: int, batch: int, steps: int, seed: int) -> Tensor:
    """Rows to read at each step, int64 [steps, batch]: whole shuffled epochs, one after another."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch // blocks)
    order = torch.cat([torch.randperm(blocks, generator=generator) for _ in range(epochs)])
    return order[: steps * batch].view(steps, batch)


class _Run:
    """One run of a plan in this process, one of those that train together."""

    def __init__(
        self, model: nn.Module, blocks: Tensor, plan: TrainingPlan, loss_fn: LossFunction, progress: Progress, record: Record
    ) -> None:
        self.model, self.blocks, self.plan, self.loss_fn = model, blocks, plan, loss_fn
        self.progress, self.record, self.group = progress, record, DataParallelGroup(plan.sharded)
        self.group.place(model)
        self.where = next(model.parameters()).device
        self.optimizer = ScheduledOptimizer(model, plan)
        identity = _identity(plan, blocks, self.group.size)
        self.state = TrainingState(model, self.optimizer.inner, record, identity, self.group)
        self.order = batch_order(len(blocks), plan.batch, plan.steps, plan.seed)
        self.saver = Saver(plan.save_every_s)

    def losses(self) -> list[float]:
        """The loss of every step; the model is left with the weights to keep."""
        import torch

        torch.manual_seed(self.plan.seed + self.group.rank)  # dropout, where a model has it
        self._resume()
        if self.plan.held_out and not self.record.held_out:
            self._measure()
        while self.record.step < self.plan.steps and not self.record.stalled(self.plan.patience):
            self._step(self.record.step)
        self.state.restore_best()
        (again,) = self.group.add(self._batch_loss(self.blocks[self.order[0]], learn=False))
        check_end(self.record.losses, again)
        self.group.gather()
        return self.record.losses

    def _step(self, step: int) -> None:
        """One step of the optimizer, and what is due after it. What the processes decide together goes in one sum."""
        loss = self._batch_loss(self.blocks[self.order[step]])
        self.group.add_gradients(self.optimizer.weights)
        norm = self.optimizer.clip(self.group)
        save = self.plan.scratch is not None and self.group.rank == 0 and self.saver.due()
        loss, due = self.group.add(loss, save)
        self.record.losses.append(loss)
        check_step(self.record.losses, norm)
        self.optimizer.step(step)
        values = {"loss": loss}
        if self.plan.held_out and self.plan.held_out.due(step + 1, self.plan.steps):
            values["held_out_loss"] = self._measure()
        self.progress.step(step + 1, self.plan.steps, **values)
        if due:
            self._save()
            self.saver.done()

    def _batch_loss(self, ids: Tensor, *, learn: bool = True) -> float:
        """The mean loss over the batch `ids`, as far as this process computes it; where it is to `learn`, its gradient is added.

        Parts count by the tokens that they predict: in padded or masked text their number differs.
        """
        import torch

        parts = self.group.share(ids).tensor_split(self.plan.accumulate)
        whole = predicted_tokens(self.model, ids) if len(parts) * self.group.size > 1 else None
        total = 0.0
        for part in parts:
            share = predicted_tokens(self.model, part) / whole if whole else 1.0
            with torch.set_grad_enabled(learn):
                loss = self.loss_fn(part.to(self.where))
            if learn:
                (loss * share).backward()
            total += loss.item() * share
        return total

    def _measure(self) -> float:
        """Measure the held-out loss, note it, and keep the weights where it is the lowest so far."""
        assert self.plan.held_out
        part = self.group.share(self.plan.held_out.blocks)
        rows = self.group.even(part, self.plan.held_out.blocks)
        nats, tokens = block_losses(self.model, rows) if len(rows) else (rows[:, 0], rows[:, 0])
        total, all_tokens = self.group.add(nats[: len(part)].sum().item(), tokens[: len(part)].sum().item())
        self.record.held_out[self.record.step] = total / all_tokens
        if self.record.best_step == self.record.step:
            self.state.keep_best()
        return self.record.held_out[self.record.step]

    def _save(self) -> None:
        """Save the run, by the first process, with the random number generators of all."""
        assert self.plan.scratch
        self.state.save(self.plan.scratch, self.group.rows(device.random_state(self.where)))

    def _resume(self) -> None:
        """Go on from a saved run where there is one; its losses are told again, so that the curve is whole."""
        noise = self.state.load(self.plan.scratch) if self.plan.scratch else None
        if noise is None:
            return
        device.set_random_state(noise[self.group.rank], self.where)
        for step, loss in enumerate(self.record.losses, 1):
            held_out = {"held_out_loss": self.record.held_out[step]} if step in self.record.held_out else {}
            self.progress.step(step, self.plan.steps, loss=loss, **held_out)
        self.progress.note(f"resuming at step {self.record.step}")


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


def _identity(plan: TrainingPlan, blocks: Tensor, processes: int) -> str:
    """Digest of what makes a run this run and no other; not of where and how often it is saved."""
    held_out = plan.held_out
    numbers = [plan.steps, plan.batch, plan.learning_rate, plan.warmup, plan.final_share, plan.weight_decay, plan.grad_clip]
    named = [*numbers, plan.optimizer, plan.accumulate, plan.seed, processes]
    texts = [hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest() for ids in (blocks, *([held_out.blocks] if held_out else []))]
    return content_digest([named, texts, [held_out.every, held_out.patience] if held_out else None])
