"""What a student minimises on its logits: a divergence from the teacher's distribution, and cross-entropy on the labels.

Gradients are known in closed form, so they are made in the forward pass, a few rows at a time: the logits are the largest
tensors of a training step, and autograd would keep half a dozen copies of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from featherweight.spec import Task

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 2**20
"""Logits that are worked on at once."""


@dataclass(frozen=True)
class TopK:
    """The teacher's distribution, already softened, as far as it is kept.

    ids: its likeliest tokens, int64 [rows, k]. log_p: their log-probabilities and, where the vocabulary holds more, that of all
    other tokens together: [rows, k + 1], else [rows, k].
    """

    ids: Tensor
    log_p: Tensor


def distillation_loss(
    logits: Tensor,
    teacher: Tensor | TopK,
    labels: Tensor,
    temperature: float,
    kl_weight: float,
    divergence: str = "forward_kl",
) -> Tensor:
    """`kl_weight` T^2 D(teacher, student), both softened by T, plus (1 - `kl_weight`) cross-entropy (Hinton et al. 2015).

    logits: [tokens, vocabulary]. teacher: logits of the same shape, or what is kept of its distribution at that temperature;
    then D is taken over the kept tokens and all others as one, which is at most the whole D.
    labels: [tokens], -100 where there is nothing to predict (padding, unmasked tokens, the end of a block). Both terms are
    means over the other tokens. The factor T^2 keeps the size of D's gradient.
    divergence: 'forward_kl' KL(teacher || student); 'reverse_kl' KL(student || teacher), as in MiniLLM (Gu et al. 2024);
    'jensen_shannon' the mean of both to their mixture, GKD's with beta 1/2 (Agarwal et al. 2024).
    """
    target, ids = (teacher.log_p, teacher.ids) if isinstance(teacher, TopK) else (teacher, None)
    return _function().apply(logits, target, ids, labels, temperature, kl_weight, DIVERGENCES[divergence])


def top_k(logits: Tensor, temperature: float, k: int) -> TopK:
    """What to keep of a teacher's logits [rows, vocabulary]: the `k` likeliest tokens and the mass of the tail."""
    import torch

    log_p = (logits / temperature).log_softmax(-1)
    kept, ids = log_p.topk(min(k, log_p.shape[1]))
    if k >= log_p.shape[1]:
        return TopK(ids, kept)
    tail = log_p.scatter(1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return TopK(ids, torch.cat([kept, tail], 1))


def answered(task: Task, ours: Tensor, theirs: Tensor | TopK, labels: Tensor, temperature: float, weight: float, kind: str) -> Any:
    """The loss of a student's answers [batch, positions, width] to its teacher's, flat, and the labels [batch, positions].

    Of embeddings, which have no distribution, 1 - the cosine; of all others `distillation_loss`.
    """
    import torch

    if task == "feature-extraction":
        assert not isinstance(theirs, TopK), "embeddings are not kept"
        return (1 - torch.cosine_similarity(ours.flatten(0, 1), theirs, -1)).mean()
    return distillation_loss(ours.flatten(0, 1), theirs, labels.flatten(), temperature, weight, kind)


@cache
def _function() -> Any:
    """The autograd function of `distillation_loss`."""
    import torch

    class Distillation(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, logits: Tensor, target: Tensor, ids: Tensor | None, labels: Tensor, t: float, weight: float, divergence: Any
        ) -> Tensor:
            gradient = torch.empty_like(logits)
            known = max(1, int((labels >= 0).sum()))
            total = logits.new_zeros((), dtype=torch.float64)
            for part in torch.arange(len(logits)).split(max(1, CHUNK // logits.shape[1])):
                rows = slice(int(part[0]), int(part[-1]) + 1)
                kept = None if ids is None else ids[rows]
                value, slope = _softened(logits[rows], target[rows], kept, labels[rows] >= 0, t, divergence)
                ce, ce_gradient = _cross_entropy(logits[rows], labels[rows])
                total += (weight * value + (1 - weight) * ce) / known
                torch.add(slope.mul_(weight / known), ce_gradient, alpha=(1 - weight) / known, out=gradient[rows])
            ctx.save_for_backward(gradient)
            return total.to(logits.dtype)

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
            (gradient,) = ctx.saved_tensors
            return gradient * upstream[0], None, None, None, None, None, None

    return Distillation


def _softened(
    logits: Tensor, target: Tensor, ids: Tensor | None, known: Tensor, temperature: float, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """T^2 D at temperature T summed over the known rows, and its gradient for `logits`."""
    log_q = (logits / temperature).log_softmax(-1)
    if ids is None:
        value, gradient = divergence((target / temperature).log_softmax(-1), log_q)
    else:
        value, gradient = _bucketed(target, ids, log_q, divergence)
    return temperature**2 * (value * known).sum(), gradient.mul_(known[:, None] * temperature)


def _bucketed(log_p: Tensor, ids: Tensor, log_q: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """D between the tokens `ids` and the rest as one, and its gradient, which a tail token takes its share of the tail's of."""
    import torch

    kept = log_q.gather(1, ids)
    if log_p.shape[1] == ids.shape[1]:
        value, slope = divergence(log_p, kept)
        return value, torch.zeros_like(log_q).scatter_(1, ids, slope)
    tail = log_q.scatter(1, ids, -math.inf).logsumexp(-1, keepdim=True)
    value, slope = divergence(log_p, torch.cat([kept, tail], 1))
    gradient = (log_q - tail).exp_().mul_(slope[:, -1:])
    return value, gradient.scatter_(1, ids, slope[:, :-1])


def _forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), log_q.exp() - p


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    q, ratio = log_q.exp(), log_q - log_p
    value = (q * ratio).sum(-1)
    return value, q * ratio.sub_(value[:, None])


def _jensen_shannon(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    log_m = log_p.logaddexp(log_q) - math.log(2)
    q, ratio = log_q.exp(), log_q - log_m
    of_q = (q * ratio).sum(-1)
    of_p = (log_p.exp() * (log_p - log_m)).sum(-1)
    return (of_p + of_q) / 2, q.mul_(ratio.sub_(of_q[:, None])).div_(2)


Divergence = Callable[["Tensor", "Tensor"], "tuple[Tensor, Tensor]"]
DIVERGENCES: Mapping[str, Divergence] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
}
"""Log-probabilities of the teacher and of the student, [rows, n] -> D of each row, and its gradient for the student's logits."""


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the rows with a label, and its gradient for `logits`."""
    known = (labels >= 0)[:, None]
    index = labels.clamp(min=0)[:, None]
    log_q = logits.log_softmax(-1)
    loss = -(log_q.gather(1, index) * known).sum()
    gradient = log_q.exp_().scatter_add_(1, index, -known.to(log_q.dtype))
    return loss, gradient.mul_(known)
