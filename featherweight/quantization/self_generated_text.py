"""Text that a checkpoint writes itself: training data where there is little (LLM-QAT, Liu et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featherweight.model.decoding import Reading

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from transformers import PreTrainedModel

ROWS = 128


def generate_blocks(model: PreTrainedModel, passages: Tensor, length: int, seed: int) -> Tensor:
    """Go on from `passages` (int64 [count, tokens]) at temperature 1, to blocks of `length` tokens: int64 [count, length].

    Where a text ends, the next begins in the block as the passage did: with BOS, where the tokenizer begins texts with it.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    model.eval()
    with torch.inference_mode():
        parts = [_sample(model, part, length, generator) for part in passages.split(ROWS)]
    return torch.cat(parts).clone()


def draw_passages(lead: list[int], blocks: Tensor, count: int, length: int, seed: int) -> Tensor:
    """`count` passages of `length` tokens from anywhere in `blocks` (int64 [blocks, tokens]), behind what leads every text.

    A model that writes from nothing stays with what it likes best; from passages of a text it stays near that text.
    """
    import torch

    stream, wanted = blocks.flatten(), length - len(lead)
    starts = torch.randint(len(stream) - wanted + 1, (count, 1), generator=torch.Generator().manual_seed(seed))
    leads = torch.tensor(lead, dtype=torch.long).repeat(count, 1)
    return torch.cat([leads, stream[starts + torch.arange(wanted)]], dim=1)


def _sample(model: PreTrainedModel, passages: Tensor, length: int, generator: Generator) -> Tensor:
    """One batch with its key-value cache."""
    import torch

    ends, restart = _ends(model), passages[:, :1]
    blocks, read, reading = passages, passages, Reading(model)
    while blocks.shape[1] < length:
        drawn = _draw(reading.next(read.to(model.device)).cpu(), generator)
        read = torch.where(torch.isin(drawn, ends), restart, drawn)
        blocks = torch.cat([blocks, read], dim=1)
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

    found = model.generation_config.eos_token_id
    return torch.tensor([] if found is None else found, dtype=torch.long).flatten()
