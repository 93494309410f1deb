"""What a model is trained on by default: the cross-entropy of the tokens that it has to predict, one loss for every family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featherweight.text.model_inputs import IGNORED, inputs_and_labels

if TYPE_CHECKING:
    from torch import Tensor, nn


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
