"""A served variant as lm-evaluation-harness's model. Importing this imports the harness, an optional dependency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM

from featherweight.errors import StageError
from featherweight.runtimes.client import Worker
from featherweight.runtimes.generation_settings import SAMPLING, GenerationSettings

AT_ONCE = 16
"""Texts that are scored in one call, between which progress could be told and an engine may stop."""
NO_SETTINGS = GenerationSettings({})
NOT_FOLLOWED = {"do_sample", "max_length", "max_new_tokens", *SAMPLING}
Pair = tuple[tuple[str, str], list[int], list[int]]


class HarnessModel(TemplateLM):
    """Scores texts by a worker, cut into tokens and, where they are too long, on the left as the harness's own HFLM does."""

    def __init__(self, worker: Worker, tokenizer: Any, greedy: bool, settings: GenerationSettings = NO_SETTINGS) -> None:
        """greedy: whether what would be written is asked for too, which costs a generation for each text. settings: of the
        checkpoint, followed as HFLM does where it has texts written: all but their lengths and what is drawn by chance.
        """
        super().__init__()
        self.worker, self.tokenizer, self.greedy = worker, tokenizer, greedy
        kept = {name: value for name, value in settings.values.items() if name not in NOT_FOLLOWED}
        self.settings = kept | {"eos_token_id": list(dict.fromkeys([*settings.ends, self.eot_token_id]))}

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

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls it by, where it has a chat template put around a prompt."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the checkpoint's template writes it, up to where the assistant begins or goes on."""
        going_on = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **going_on))

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
        """Greedy texts up to the end token or the first of the task's own words, cut as the harness's own HFLM cuts them."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

        told = [normalize_gen_kwargs(request.args[1]) for request in requests]
        if any(one.get("do_sample") for one in told):
            raise StageError("a benchmark that has texts drawn by chance is not run; take one that has them written greedily")
        prompts = [
            self._room(self.tok_encode(request.args[0]), one["max_gen_toks"]) for request, one in zip(requests, told, strict=True)
        ]
        written, eos = self._texts(prompts, [one["max_gen_toks"] for one in told]), self.tokenizer.decode([self.eot_token_id])
        return [
            postprocess_generated_text(text, handle_stop_sequences(one["until"], eos=eos), None)
            for text, one in zip(written, told, strict=True)
        ]

    def _room(self, prompt: list[int], new_tokens: int) -> list[int]:
        """The end of a prompt, where the whole leaves no room."""
        if new_tokens >= self.worker.max_tokens:
            raise StageError(f"a benchmark has {new_tokens} tokens written, and {self.worker.max_tokens} are served at most")
        return prompt[-(self.worker.max_tokens - new_tokens) :]

    def _texts(self, prompts: list[list[int]], new_tokens: list[int]) -> list[str]:
        """Those of like lengths go together."""
        found = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda index: (new_tokens[index], len(prompts[index])))
        for start in range(0, len(order), self.worker.max_batch):
            batch = order[start : start + self.worker.max_batch]
            rows = self.worker.answer([prompts[index] for index in batch], new_tokens[batch[-1]], self.settings)
            for index, row in zip(batch, rows, strict=True):
                found[index] = str(self.tokenizer.decode(row[: new_tokens[index]], skip_special_tokens=True))
        return found
