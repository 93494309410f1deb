"""What a served variant writes behind prompts, in letters: greedy texts up to their end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.runtimes.client import Worker
from featherweight.runtimes.generation_settings import GenerationSettings


def greedy_tokens(worker: Worker, prompts: Sequence[list[int]], new_tokens: Sequence[int]) -> list[list[int]]:
    """The tokens behind each prompt, as many as `new_tokens` has for it or more, past their end too.

    Those of like lengths go together, as many as the worker was opened for.
    """
    written: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: (new_tokens[index], len(prompts[index])))
    for start in range(0, len(order), worker.max_batch):
        batch = order[start : start + worker.max_batch]
        found = worker.generate([prompts[index] for index in batch], new_tokens[batch[-1]])
        for index, tokens in zip(batch, found, strict=True):
            written[index] = tokens
    return written


def spelt(folder: Path, written: Sequence[list[int]], new_tokens: int, *, special: bool) -> tuple[str, ...]:
    """Texts of up to `new_tokens` tokens or their end, in the tokenizer of `folder`. special: spell special ones out, no end."""
    tokenizer, settings = load_tokenizer(folder), GenerationSettings.read(folder)
    ended = [settings.cut(tokens[:new_tokens], new_tokens) for tokens in written]
    ended = [tokens[:-1] if special and tokens and tokens[-1] in settings.ends else tokens for tokens in ended]
    return tuple(str(tokenizer.decode(tokens, skip_special_tokens=not special)) for tokens in ended)
