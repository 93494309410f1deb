"""PyTorch eager, float32, SDPA attention, key-value cache: the baseline, as fast as transformers itself makes it."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

from featherweight.runtimes.engine import Engine, Generation, Timing, Tokens, by_length, windows_at_once

if TYPE_CHECKING:
    from torch import Tensor


class TorchEager(Engine):
    """transformers' own model in a greedy loop without the bookkeeping of `.generate` (never slower than it).

    options: `bitsandbytes`, 'nf4' or 'llm.int8', rounds the weights at load and computes in float16 on a CUDA GPU.
    """

    def load(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(self.threads)
        rounded = self.options.get("bitsandbytes")
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.weights,
            attn_implementation="sdpa",
            local_files_only=True,
            **_bitsandbytes(rounded) if rounded else {"dtype": torch.float32},
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
                ids = torch.tensor([windows[index] for index in batch], device=self.model.device)
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
                new, first = self._greedy(torch.tensor([prompts[index] for index in batch], device=self.model.device), new_tokens)
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


def _bitsandbytes(rounded: str) -> dict[str, Any]:
    """Options of from_pretrained for 4-bit NormalFloat (Dettmers et al. 2023) or LLM.int8 (Dettmers et al. 2022)."""
    import torch
    from transformers import BitsAndBytesConfig

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float16}
    config = BitsAndBytesConfig(**nf4 if rounded == "nf4" else {"load_in_8bit": True})
    return {"quantization_config": config, "dtype": torch.float16, "device_map": {"": 0}}
