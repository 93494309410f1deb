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


SCALE = 20.0
"""What cosines are multiplied by before their softmax, as in sentence-transformers' MultipleNegativesRankingLoss."""


def contrast(vectors: Tensor) -> Tensor:
    """Mean cross-entropy of finding each text's other half among those of the batch, by cosine (Henderson et al. 2017).

    vectors: [2 * batch, width], all first halves before all second ones.
    """
    import torch

    first, second = torch.nn.functional.normalize(vectors, dim=-1).chunk(2)
    return torch.nn.functional.cross_entropy(SCALE * first @ second.T, torch.arange(len(first), device=vectors.device))


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
