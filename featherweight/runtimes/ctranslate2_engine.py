"""CTranslate2's generator: one worker (inter_threads), `threads` OpenMP threads inside it."""

from __future__ import annotations

import json
from time import perf_counter
from typing import Any

from featherweight.runtimes.engine import Engine, Generation, Timing, Tokens, by_length, windows_at_once


class CTranslate2(Engine):
    """A converted folder (model.bin, config.json, vocabulary). options: `compute_type` (float32) and `device` (cpu)."""

    def load(self) -> None:
        import ctranslate2

        self.vocabulary: list[str] = json.loads((self.weights / "vocabulary.json").read_text())
        self.generator: Any = ctranslate2.Generator(
            str(self.weights),
            device=self.options.get("device", "cpu"),
            inter_threads=1,
            intra_threads=self.threads,
            compute_type=self.options.get("compute_type", "float32"),
        )

    def unload(self) -> None:
        del self.generator

    def logprobs(self, windows: Tokens) -> list[list[float]]:
        import numpy

        scores: list[list[float]] = [[] for _ in windows]
        most = windows_at_once(self.limits.max_tokens, len(self.vocabulary))
        for batch in by_length(windows, most):
            ids = numpy.array([windows[index] for index in batch], dtype=numpy.int32)
            every = numpy.asarray(self.generator.forward_batch(ids[:, :-1].tolist(), return_log_probs=True))
            chosen = numpy.take_along_axis(every, ids[:, 1:, None], -1)[..., 0]
            for index, row in zip(batch, chosen.tolist(), strict=True):
                scores[index] = row
        return scores

    def generate(self, prompts: Tokens, new_tokens: int) -> Generation:
        starts = [[self.vocabulary[token] for token in prompt] for prompt in prompts]
        waiting, first, began = set(range(len(prompts))), 0.0, perf_counter()

        def seen(step: Any) -> bool:
            nonlocal first
            waiting.discard(step.batch_id)
            first = first or (0.0 if waiting else perf_counter() - began)
            return False

        results = self.generator.generate_batch(
            starts,
            max_length=new_tokens,
            end_token=[],  # nothing ends a text; `min_length` would forbid the end token instead, and change the text
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=seen,
        )
        total = perf_counter() - began
        return Generation([list(result.sequences_ids[0]) for result in results], Timing(first or total, total))
