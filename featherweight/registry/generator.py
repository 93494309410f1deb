"""Text in, text out, through a served variant's own engine."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from featherweight.errors import DataError, StageError
from featherweight.model.architecture import Family, family_of
from featherweight.runtimes.client import Worker, open_worker
from featherweight.text.tokens import load_tokenizer


class Generator:
    """A served folder's engine and tokenizer; greedy. Safe to call from several threads, which then take turns."""

    def __init__(self, served: Path, threads: int = 1, max_tokens: int = 512, max_batch: int = 8) -> None:
        self.served, self.threads, self.max_tokens, self.max_batch = served, threads, max_tokens, max_batch
        self._tokenizer = load_tokenizer(served)
        self._family = _family(served)
        self._turn = threading.Lock()
        self._worker: Worker | None = self._open()

    def __call__(self, prompts: Sequence[str], max_new_tokens: int = 64, stop_at_end: bool = True) -> list[str]:
        """What follows each prompt: at most `max_new_tokens` tokens, up to the end-of-text token if `stop_at_end`.

        Of a seq2seq model, what it makes of each prompt. Of an encoder, each prompt with its masks filled in.
        Raises DataError for a prompt that is empty or does not fit, StageError where the engine fails; the next call then
        starts the engine anew.
        """
        if self._family == "encoder":
            max_new_tokens = 0
        encoded = [self._encode(prompt, max_new_tokens) for prompt in prompts]
        with self._turn:
            new: list[list[int]] = []
            for start in range(0, len(encoded), self.max_batch):
                new += self._generate(encoded[start : start + self.max_batch], max_new_tokens)
        if self._family == "encoder":
            return [self._filled(*three) for three in zip(prompts, encoded, new, strict=True)]
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
        ids = self._ids(prompt)
        if not ids:
            raise DataError("the prompt is empty, and this tokenizer has no token to begin a text with")
        if (max_new_tokens < 1 and self._family != "encoder") or len(ids) + max_new_tokens > self.max_tokens:
            room = f"this model is served with room for {self.max_tokens} tokens"
            raise DataError(f"a prompt of {len(ids)} tokens and max_new_tokens {max_new_tokens}: {room}, one new at least")
        return ids

    def _ids(self, prompt: str) -> list[int]:
        """A causal prompt is not closed by an end token: the text goes on. Any other is framed as its tokenizer does it."""
        if self._family != "causal":
            return self._tokenizer(prompt)["input_ids"]
        lead = [] if self._tokenizer.bos_token_id is None else [self._tokenizer.bos_token_id]
        return lead + self._tokenizer(prompt, add_special_tokens=False)["input_ids"]

    def _filled(self, prompt: str, ids: list[int], new: list[int]) -> str:
        """The prompt with the model's token at the place of each mask."""
        tokens = [filling for was, filling in zip(ids, new, strict=True) if was == self._tokenizer.mask_token_id]
        for token in tokens:
            text = str(self._tokenizer.decode([token])).strip().removeprefix("##")
            prompt = prompt.replace(self._tokenizer.mask_token, text, 1)
        return prompt

    def _decode(self, prompt: list[int], new: list[int], stop_at_end: bool) -> str:
        """The text of the new tokens in their place, so that a leading space is kept."""
        end = self._tokenizer.eos_token_id
        if stop_at_end and end in new:
            new = new[: new.index(end)]
        if self._family == "seq2seq":
            return self._text(new)
        before, after = self._text(prompt), self._text(prompt + new)
        return after[len(before) :]

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _family(served: Path) -> Family:
    """What kind of model a served folder holds, from the configuration that lies beside its tokenizer."""
    from transformers import AutoConfig

    return family_of(AutoConfig.from_pretrained(served, local_files_only=True))
