"""A served variant as lm-evaluation-harness's model. Importing this imports the harness, an optional dependency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM

from featherweight.errors import StageError
from featherweight.runtimes.client import Worker

AT_ONCE = 16
"""Texts that are scored in one call, between which progress could be told and an engine may stop."""
Pair = tuple[tuple[str, str], list[int], list[int]]


class HarnessModel(TemplateLM):
    """Scores texts by a worker, cut into tokens and, where they are too long, on the left as the harness's own HFLM does."""

    def __init__(self, worker: Worker, tokenizer: Any, greedy: bool) -> None:
        """greedy: whether what would be written is asked for too, which costs a generation for each text."""
        super().__init__()
        self.worker, self.tokenizer, self.greedy = worker, tokenizer, greedy

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        """(summed log-probability of the continuation, whether it is what would be written) of each."""
        found: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda index: len(requests[index][1]) + len(requests[index][2]))
        for start in range(0, len(order), AT_ONCE):
            batch = order[start : start + AT_ONCE]
            pairs = [self._cut(*requests[index][1:]) for index in batch]
            scores = self.worker.logprobs([[*context, *wanted] for context, wanted in pairs])
            for index, (context, wanted), row in zip(batch, pairs, scores, strict=True):
                found[index] = math.fsum(row[-len(wanted) :]), self._written(context, wanted, row[-len(wanted) :])
        if not all(math.isfinite(score) for score, _ in found):
            raise StageError(f"{self.worker.engine} gives log-probabilities that are no numbers in a benchmark")
        return found

    def _cut(self, context: list[int], wanted: list[int]) -> tuple[list[int], list[int]]:
        if len(wanted) >= self.worker.max_tokens:
            raise StageError(f"a benchmark's answer has {len(wanted)} tokens, and {self.worker.max_tokens} are served at most")
        return context[-(self.worker.max_tokens - len(wanted)) :], wanted

    def _written(self, context: list[int], wanted: list[int], scores: Sequence[float]) -> bool:
        """Whether the continuation is the greedy one: surely where each token has more than half of the probability."""
        if not self.greedy or all(score > math.log(0.5) for score in scores):
            return self.greedy
        return self.worker.generate([context], len(wanted)) == [wanted]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise StageError("a benchmark that scores whole texts is not run; bits per byte are measured by themselves")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise StageError("a benchmark that has texts written is not run; take one of several choices, or of likelihoods")
