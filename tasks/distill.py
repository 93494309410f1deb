"""distill: a shallower student, made of the teacher's own layers and trained to say what the teacher says."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight import surgery, training
from featherweight.examples import example_blocks, inputs_and_labels
from featherweight.progress import Progress
from featherweight.recipe import DistillSpec
from tasks.stage import Metrics, stage

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

COMPARED = 32
"""Blocks of training text on which the teacher and the finished student are compared."""


@stage("distill", version="1", libraries=("torch", "transformers"))
def distill(
    spec: DistillSpec, *, checkpoint: Path, text: Path, out: Path, seed: int = 0, progress: Progress = Progress()
) -> Metrics:
    """Distil `checkpoint` into a student of chosen layers: temperature-scaled KL on the logits plus cross-entropy.

    Metrics: `loss_first` and `loss_last` (the mixed loss), `teacher_loss` and `student_loss` (cross-entropy in nats per
    token, on a sample of the text), `parameters_teacher`, `parameters`, `tokens`, `tokens_per_s`. Raises RecipeError for
    layers that the teacher does not have, StageError for an architecture it cannot cut and on divergence.
    """
    surgery.require_llama_like(checkpoint, "distill")
    config = surgery.load_config(checkpoint)
    surgery.require_context(config, spec.sequence, "distill")
    layers = surgery.chosen_layers(spec.layers, config.num_hidden_layers)
    blocks = example_blocks(checkpoint, config, text, spec.sequence, limit=spec.steps * spec.batch, seed=seed)
    teacher = surgery.load_model(checkpoint)
    student = surgery.copy_layers(teacher, layers)
    run = training.timed_loop(
        student,
        blocks,
        steps=spec.steps,
        batch=spec.batch,
        learning_rate=spec.learning_rate,
        loss_fn=distillation(teacher, student, spec),
        weight_decay=0.01,
        seed=seed,
        progress=progress,
    )
    surgery.save_model(student, out, checkpoint)
    return run | {
        "teacher_loss": training.mean_loss(teacher, blocks[:COMPARED]),
        "student_loss": training.mean_loss(student, blocks[:COMPARED]),
        "parameters_teacher": surgery.parameters(teacher),
        "parameters": surgery.parameters(student),
    }


def distillation(teacher: PreTrainedModel, student: PreTrainedModel, spec: DistillSpec) -> Callable[[Tensor], Tensor]:
    """The loss function of a student: token ids [batch, length] -> scalar."""
    import torch

    def loss(ids: Tensor) -> Tensor:
        inputs, labels = inputs_and_labels(student.config, ids)
        with torch.inference_mode():
            target = teacher(**inputs).logits.flatten(0, 1)
        logits = student(**inputs).logits.flatten(0, 1)
        return distillation_loss(logits, target, labels.flatten(), spec.temperature, spec.kl_weight)

    return loss


def distillation_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, kl_weight: float) -> Tensor:
    """`kl_weight` T^2 KL(teacher || student), both softened by T, plus (1 - `kl_weight`) cross-entropy (Hinton et al. 2015).

    logits, teacher_logits: [tokens, vocabulary]; the KL is a mean over all tokens. labels: [tokens], -100 where the next
    token is unknown; the cross-entropy is a mean over the others. The factor T^2 keeps the size of the KL's gradient.
    """
    return _function().apply(logits, teacher_logits, labels, temperature, kl_weight)


@cache
def _function() -> Any:
    """The autograd function of `distillation_loss`.

    Its gradient is known in closed form, so it is made in the forward pass, a few rows at a time: the logits are the
    largest tensors of a training step, and autograd would keep half a dozen copies of them.
    """
    import torch

    class Distillation(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, target: Tensor, labels: Tensor, temperature: float, weight: float) -> Tensor:
            gradient = torch.empty_like(logits)
            known = max(1, int((labels >= 0).sum()))
            total = logits.new_zeros((), dtype=torch.float64)
            for part in torch.arange(len(logits)).split(max(1, 2**20 // logits.shape[1])):
                rows = slice(int(part[0]), int(part[-1]) + 1)
                kl, kl_gradient = _softened(logits[rows], target[rows], temperature)
                ce, ce_gradient = _cross_entropy(logits[rows], labels[rows])
                total += weight / len(logits) * kl + (1 - weight) / known * ce
                torch.add(kl_gradient.mul_(weight / len(logits)), ce_gradient, alpha=(1 - weight) / known, out=gradient[rows])
            ctx.save_for_backward(gradient)
            return total.to(logits.dtype)

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
            (gradient,) = ctx.saved_tensors
            return gradient * upstream[0], None, None, None, None

    return Distillation


def _softened(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """T^2 KL(target || logits) at temperature T summed over rows, and its gradient for `logits`: T (q - p)."""
    log_p = (target / temperature).log_softmax(-1)
    log_q = (logits / temperature).log_softmax(-1)
    p = log_p.exp()
    kl = temperature**2 * (p * log_p.sub_(log_q)).sum()
    return kl, log_q.exp_().sub_(p).mul_(temperature)


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the rows with a label, and its gradient for `logits`."""
    known = (labels >= 0)[:, None]
    index = labels.clamp(min=0)[:, None]
    log_q = logits.log_softmax(-1)
    loss = -(log_q.gather(1, index) * known).sum()
    gradient = log_q.exp_().scatter_add_(1, index, -known.to(log_q.dtype))
    return loss, gradient.mul_(known)
