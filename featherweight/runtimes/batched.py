"""What an engine of whole graphs answers of many texts, a batch of like ones at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from featherweight.model.architecture import task_of
from featherweight.model.heads import takes_padding
from featherweight.runtimes.interface import Tokens, alike, by_length, by_shape, windows_at_once
from featherweight.text.model_inputs import IGNORED, window_inputs

if TYPE_CHECKING:
    from torch import Tensor

Score = Callable[[Mapping[str, Any], Any], list[list[float]]]
"""(inputs, labels [batch, positions]) -> the log-probabilities of each row's labels that are not IGNORED."""


def scored(config: Any, tokens: int, windows: Tokens, sources: Tokens, score: Score) -> list[list[float]]:
    """The log-probabilities of each window, of up to `tokens`, given its source; windows of one shape go to `score` together."""
    import torch

    scores: list[list[float]] = [[] for _ in windows]
    for batch in by_shape(windows, sources, windows_at_once(tokens, config.get_text_config().vocab_size)):
        ids, source = (torch.tensor([rows[index] for index in batch]) for rows in (windows, sources))
        inputs, labels = window_inputs(config, ids, source)
        for index, row in zip(batch, score(inputs, labels), strict=True):
            scores[index] = row
    return scores


def label_logprobs(logits: Tensor, labels: Tensor) -> list[list[float]]:
    """What logits [batch, positions, vocabulary] say of the labels [batch, positions] that are not IGNORED."""
    found = logits.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    return [row[wanted].tolist() for row, wanted in zip(found, labels != IGNORED, strict=True)]


def answered(
    config: Any, most: int, ids: Tokens, types: Tokens, answers: Callable[[Tokens, Tokens], Tensor]
) -> list[list[list[float]]]:
    """Vectors or labels of each sequence. Those of like lengths go to `answers` together, `most` at once, which pads and masks;
    only those of one length where the model sees padding."""
    found: list[list[list[float]]] = [[] for _ in ids]
    by_tokens = task_of(config) == "token-classification"
    for batch in (alike if takes_padding(config) else by_length)(ids, most):
        rows = answers([ids[index] for index in batch], [types[index] for index in batch]).tolist()
        for index, row in zip(batch, rows, strict=True):
            found[index] = row[: len(ids[index])] if by_tokens else row
    return found
