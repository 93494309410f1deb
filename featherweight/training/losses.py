"""What a model is trained on by default: the cross-entropy of the tokens that it has to predict, one loss for every family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from featherweight.model.architecture import task_of
from featherweight.model.heads import answers
from featherweight.text.model_inputs import IGNORED, inputs_and_labels

if TYPE_CHECKING:
    from torch import Tensor, nn


def token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of what `model` has to predict of the blocks `ids` (see text.model_inputs), in nats per answer."""
    import torch

    # The labels are shifted rather than the logits: a slice of the logits would copy the largest tensor there is.
    config: Any = model.config
    inputs, labels = inputs_and_labels(config, ids)
    logits = answers(model, inputs)
    if task_of(config) == "feature-extraction":
        return contrast(logits.squeeze(1))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


COLUMNS = 256
"""Of the answers at a position, those that are looked at."""
SCALE = 20.0
"""What cosines are multiplied by before their softmax, as in sentence-transformers' MultipleNegativesRankingLoss."""


def contrast(vectors: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of finding each text's other half among those of the batch, by cosine (Henderson et al. 2017).

    vectors: [2 * batch, width], all first halves before all second ones. reduction: the mean, or 'none' for one of each.
    """
    import torch

    first, second = torch.nn.functional.normalize(vectors, dim=-1).chunk(2)
    others = torch.arange(len(first), device=vectors.device)
    return torch.nn.functional.cross_entropy(SCALE * first @ second.T, others, reduction=reduction)


def predicted_tokens(model: nn.Module, blocks: Tensor) -> int:
    """How many tokens of the `blocks` the model has to predict."""
    return int((inputs_and_labels(model.config, blocks)[1] != IGNORED).sum())


def mean_loss(model: nn.Module, blocks: Tensor, batch: int = 8) -> float:
    """Mean cross-entropy over all `blocks`, in nats per predicted token, without gradients."""
    nats, counts = block_losses(model, blocks, batch)
    return (nats.sum() / counts.sum()).item()


def block_losses(model: nn.Module, blocks: Tensor, batch: int = 8) -> tuple[Tensor, Tensor]:
    """What each of the `blocks` costs in nats, and of how many predicted tokens: float64 [blocks] both, without gradients.

    What a batch is matters to embeddings alone: each text's other half is sought in it.
    """
    return block_answers(model, blocks, batch)[:2]


def block_answers(model: nn.Module, blocks: Tensor, batch: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """`block_losses`, and a sample of what is answered to each block: float32 [blocks, positions, up to COLUMNS].

    Of log-probabilities, but for a constant at each position; zero where nothing is predicted. Of an embedding its direction.
    """
    import torch

    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        with torch.no_grad():  # of a sharded model, what is put together in inference mode could not be trained with later
            found = [_row_answers(model, part.to(device)) for part in blocks.split(batch)]
    finally:
        model.train(was_training)
    nats, counts, seen = (torch.cat([one.cpu() for one in part]) for part in zip(*found, strict=True))
    return nats.double(), counts.double(), seen


def _row_answers(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The nats of each block of a batch, its predicted tokens, and a sample of its answers."""
    import torch

    config: Any = model.config
    inputs, labels = inputs_and_labels(config, ids)
    logits = answers(model, inputs)
    if task_of(config) == "feature-extraction":
        nats = contrast(logits.squeeze(1), reduction="none")
        return nats, torch.ones_like(nats), torch.nn.functional.normalize(_sampled(logits), dim=-1)
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    seen, predicted = _sampled(logits), labels != IGNORED
    seen = (seen - seen.mean(-1, keepdim=True)).where(predicted.unsqueeze(-1), 0.0)
    return nats.view_as(labels).sum(1), predicted.sum(1).to(nats.dtype), seen


def _sampled(answers: Tensor) -> Tensor:
    """Every so manieth of [batch, positions, width], up to COLUMNS of them."""
    return answers[..., :: -(-answers.shape[-1] // COLUMNS)].float()
