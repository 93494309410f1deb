"""PyTorch eager, float32, SDPA attention, key-value cache: the baseline, as fast as transformers itself makes it."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

from featherweight.runtimes.engine import Engine, Generation, Timing, Tokens, by_length, windows_at_once

if TYPE_CHECKING:
    from torch import Tensor


class TorchEager(Engine):
    """transformers' own model in a greedy loop without the bookkeeping of `.generate` (never slower than it)."""

    def load(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(self.threads)
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.weights, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
        self.model = model.eval()

    def set_threads(self, threads: int) -> None:
        import torch

        self.threads = threads
        torch.set_num_threads(threads)

    def logprobs(self, windows: Tokens) -> list[list[float]]:
        import torch

        scores: list[list[float]] = [[] for _ in windows]
        most = windows_at_once(self.limits.max_tokens, self.model.config.vocab_size)
        with torch.inference_mode():
            for batch in by_length(windows, most):
                ids = torch.tensor([windows[index] for index in batch])
                for index, row in zip(batch, self._score(ids).tolist(), strict=True):
                    scores[index] = row
        return scores

    def _score(self, ids: Tensor) -> Tensor:
        """[batch, tokens] -> log-probabilities of ids[:, 1:], float32 [batch, tokens - 1]."""
        logits = self.model(ids[:, :-1], use_cache=False).logits.float()
        chosen = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
        return chosen - logits.logsumexp(-1)

    def generate(self, prompts: Tokens, new_tokens: int) -> Generation:
        import torch

        tokens: Tokens = [[] for _ in prompts]
        began, firsts = perf_counter(), 0.0
        with torch.inference_mode():
            for batch in by_length(prompts, self.limits.max_batch):
                new, first = self._greedy(torch.tensor([prompts[index] for index in batch]), new_tokens)
                firsts = first - began
                for index, row in zip(batch, new.tolist(), strict=True):
                    tokens[index] = row
        return Generation(tokens, Timing(firsts, perf_counter() - began))

    def _greedy(self, ids: Tensor, new_tokens: int) -> tuple[Tensor, float]:
        """[batch, prompt] -> ([batch, new_tokens], the moment at which the first of them was there)."""
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        ids = self._next(ids, cache)
        first, new = perf_counter(), [ids]
        for _ in range(new_tokens - 1):
            ids = self._next(ids, cache)
            new.append(ids)
        return torch.cat(new, dim=1), first

    def _next(self, ids: Tensor, cache: Any) -> Tensor:
        """The likeliest next token of each sequence, [batch, 1]; appends the keys and values of `ids` to the cache."""
        logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)
