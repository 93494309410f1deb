"""Text in, text out, through a served variant's own engine."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from featherweight.errors import DataError, StageError
from featherweight.runtimes import Worker, open_worker
from featherweight.text import load_tokenizer


class Generator:
    """A served folder's engine and tokenizer; greedy. Safe to call from several threads, which then take turns."""

    def __init__(self, served: Path, threads: int = 1, max_tokens: int = 512, max_batch: int = 8) -> None:
        self.served, self.threads, self.max_tokens, self.max_batch = served, threads, max_tokens, max_batch
        self._tokenizer = load_tokenizer(served)
        self._turn = threading.Lock()
        self._worker: Worker | None = self._open()

    def __call__(self, prompts: Sequence[str], max_new_tokens: int = 64, stop_at_end: bool = True) -> list[str]:
        """What follows each prompt: at most `max_new_tokens` tokens, up to the end-of-text token if `stop_at_end`.

        Raises DataError for a prompt that is empty or does not fit, StageError where the engine fails; the next call then
        starts the engine anew.
        """
        encoded = [self._encode(prompt, max_new_tokens) for prompt in prompts]
        with self._turn:
            new: list[list[int]] = []
            for start in range(0, len(encoded), self.max_batch):
                new += self._generate(encoded[start : start + self.max_batch], max_new_tokens)
        return [self._decode(ids, tokens, stop_at_end) for ids, tokens in zip(encoded, new, strict=True)]

    def close(self) -> None:
        """Stop the engine."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _open(self) -> Worker:
        return open_worker(self.served, self.threads, self.max_tokens, self.max_batch)

    def _generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        if self._worker is None:
            self._worker = self._open()
        try:
            return self._worker.generate(prompts, max_new_tokens)
        except StageError:
            self.close()
            raise

    def _encode(self, prompt: str, max_new_tokens: int) -> list[int]:
        lead = [] if self._tokenizer.bos_token_id is None else [self._tokenizer.bos_token_id]
        ids = lead + self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if not ids:
            raise DataError("the prompt is empty, and this tokenizer has no token to begin a text with")
        if max_new_tokens < 1 or len(ids) + max_new_tokens > self.max_tokens:
            room = f"this model is served with room for {self.max_tokens} tokens"
            raise DataError(f"a prompt of {len(ids)} tokens and max_new_tokens {max_new_tokens}: {room}, one new at least")
        return ids

    def _decode(self, prompt: list[int], new: list[int], stop_at_end: bool) -> str:
        """The text of the new tokens in their place, so that a leading space is kept."""
        end = self._tokenizer.eos_token_id
        if stop_at_end and end in new:
            new = new[: new.index(end)]
        before, after = self._text(prompt), self._text(prompt + new)
        return after[len(before) :]

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
