"""A model that is compiled to functions of new tokens and of a cache that they write into, served: what such engines share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

from featherweight.model.architecture import family_of, task_of
from featherweight.model.heads import read_states
from featherweight.runtimes.batched import answered, label_logprobs, scored
from featherweight.runtimes.interface import Generation, LoadedModel, Timing, Tokens, by_length
from featherweight.spec import HEADED
from featherweight.text.examples import packed_inputs

if TYPE_CHECKING:
    from torch import Tensor

PLACES = 64
"""A cache holds a multiple of so many places (tvm/kernels.LANES)."""


class StepGraphModel(LoadedModel):
    """`load` sets `config`, the model's; `call` and `cache` are the engine's own."""

    config: Any

    @abstractmethod
    def call(self, ids: Tensor, seen: int, cache: Any, kept: Tensor, types: Tensor, lengths: Tensor) -> Tensor:
        """Of a decoder the logits of the new tokens `kept`, behind `seen` ones of each sequence; an encoder's answers of all.

        ids: int64 [batch, tokens]. types, of the same shape: which of two texts each belongs to. lengths: of each text without
        padding, int64 [batch].
        """

    @abstractmethod
    def cache(self, batch: int, places: int) -> Any:
        """Keys and values of so many sequences, not yet written."""

    def logprobs(self, windows: Tokens) -> list[list[float]]:
        return self.logprobs_given(windows, [[] for _ in windows])

    def logprobs_given(self, windows: Tokens, sources: Tokens) -> list[list[float]]:
        return scored(self.config, self.limits.max_tokens, windows, sources, self._score)

    def _score(self, inputs: Mapping[str, Any], labels: Tensor) -> list[list[float]]:
        return label_logprobs(self._read(inputs["input_ids"]), labels)

    def outputs(self, ids: Tokens, types: Tokens) -> list[list[list[float]]]:
        return answered(self.config, self.limits.max_batch, ids, types, self._answers)

    def _answers(self, ids: Tokens, types: Tokens) -> Tensor:
        import torch

        inputs = packed_inputs(self.config, ids, types)
        lengths = torch.tensor([len(row) for row in ids])
        found = self._read(inputs["input_ids"], inputs.get("token_type_ids"), lengths)
        return read_states(self.config, found, inputs)

    def generate(self, prompts: Tokens, new_tokens: int) -> Generation:
        import torch

        tokens: Tokens = [[] for _ in prompts]
        began, first = perf_counter(), 0.0
        for batch in by_length(prompts, self.limits.max_batch):
            some = torch.tensor([prompts[index] for index in batch])
            new, moment = self._greedy(some, new_tokens) if family_of(self.config) == "causal" else self._fill(some)
            first = moment - began
            for index, row in zip(batch, new.tolist(), strict=True):
                tokens[index] = row
        return Generation(tokens, Timing(first, perf_counter() - began))

    def _greedy(self, ids: Tensor, new_tokens: int) -> tuple[Tensor, float]:
        """[batch, prompt] -> ([batch, new_tokens], the moment at which the first of them was there)."""
        import torch

        batch, tokens = ids.shape
        cache, new, first, seen = self._cache(batch, tokens + new_tokens), [], 0.0, 0
        for _ in range(new_tokens):
            kept, lengths = torch.tensor([ids.shape[1] - 1]), torch.full((batch,), seen + ids.shape[1])
            logits = self.call(ids, seen, cache, kept, torch.zeros_like(ids), lengths)
            seen += ids.shape[1]
            ids = logits[:, -1].argmax(-1, keepdim=True)
            first = first or perf_counter()
            new.append(ids)
        return torch.cat(new, dim=1), first

    def _fill(self, ids: Tensor) -> tuple[Tensor, float]:
        """The likeliest token at every position; none where vectors or labels are answered."""
        if task_of(self.config) in HEADED:
            self._answers(ids.tolist(), [[0] * ids.shape[1]] * len(ids))
            return ids[:, :0], perf_counter()
        return self._read(ids).argmax(-1), perf_counter()

    def _read(self, ids: Tensor, types: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """What the model answers at every position of whole texts, [batch, tokens, width]; lengths: of each without padding."""
        import torch

        batch, tokens = ids.shape
        types = torch.zeros_like(ids) if types is None else types
        lengths = torch.full((batch,), tokens) if lengths is None else lengths
        return self.call(ids, 0, self._cache(batch, tokens), torch.arange(tokens), types, lengths)

    def _cache(self, batch: int, tokens: int) -> Any:
        return self.cache(batch, -(-tokens // PLACES) * PLACES)
