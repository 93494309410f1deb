"""Text that a checkpoint writes itself: training data where there is little (LLM-QAT, Liu et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from transformers import PreTrainedModel

ROWS = 128


def generate_blocks(model: PreTrainedModel, starts: Tensor, count: int, length: int, seed: int) -> Tensor:
    """Sample `count` blocks of `length` tokens at temperature 1: int64 [count, length].

    A block begins with BOS, or without one with a random token of `starts`; where a text ends, the next begins in the block.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    bos, ends = model.config.bos_token_id, _ends(model)
    first = starts[torch.randint(len(starts), (count,), generator=generator)] if bos is None else torch.full((count,), bos)
    model.eval()
    with torch.inference_mode():
        parts = [_sample(model, part, length, ends, generator) for part in first.split(ROWS)]
    return torch.cat(parts).clone()


def _sample(model: PreTrainedModel, first: Tensor, length: int, ends: Tensor, generator: Generator) -> Tensor:
    """One batch with its key-value cache; `first` int64 [rows]."""
    import torch

    blocks = first.unsqueeze(1)
    cache = None
    for _ in range(length - 1):
        output = model(input_ids=blocks[:, -1:].to(model.device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        drawn = _draw(output.logits[:, -1].cpu(), generator)
        drawn = torch.where(torch.isin(drawn, ends), first.unsqueeze(1), drawn)
        blocks = torch.cat([blocks, drawn], dim=1)
    return blocks


def _draw(logits: Tensor, generator: Generator) -> Tensor:
    """One id per row of `logits` by inverse transform: int64 [rows, 1]. torch.multinomial takes as long as the model."""
    import torch

    bounds = logits.double().softmax(-1).cumsum_(-1)
    places = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64) * bounds[:, -1:]
    return torch.searchsorted(bounds, places, right=True).clamp_(max=logits.shape[1] - 1)


def _ends(model: PreTrainedModel) -> Tensor:
    """The ids that end a text."""
    import torch

    found = model.config.eos_token_id
    return torch.tensor([] if found is None else found, dtype=torch.long).flatten()
