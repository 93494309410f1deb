"""What a served variant writes behind prompts, in letters: greedy texts up to their end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.runtimes.client import Worker
from featherweight.runtimes.generation_settings import GenerationSettings


def greedy_texts(worker: Worker, folder: Path, prompts: Sequence[list[int]], new_tokens: int) -> tuple[str, ...]:
    """The text of up to `new_tokens` tokens behind each prompt, in the tokenizer of `folder`, special tokens spelt out.

    Prompts of like lengths go together, as many as the worker was opened for.
    """
    tokenizer, settings = load_tokenizer(folder), GenerationSettings.read(folder)
    texts: list[str] = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), worker.max_batch):
        batch = order[start : start + worker.max_batch]
        for index, tokens in zip(batch, worker.generate([prompts[index] for index in batch], new_tokens), strict=True):
            texts[index] = str(tokenizer.decode(settings.cut(tokens, new_tokens)))
    return tuple(texts)
