"""What every variant of a recipe is measured on: prompts to go on from, and windows of text to score."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path

from featherweight.errors import RecipeError
from featherweight.measure.spec import WorkloadSpec
from featherweight.model.architecture import Family, family_of, task_of
from featherweight.model.facts import CheckpointFacts
from featherweight.model.positions import context_tokens
from featherweight.spec import Task
from featherweight.text.examples import Example
from featherweight.text.model_inputs import scoring_windows
from featherweight.text.tokens import Window


@dataclass(frozen=True)
class Workload:
    """What every variant of a recipe is measured on; `max_tokens` is the longest sequence in it.

    single: a model that labels texts has one label only.
    """

    spec: WorkloadSpec
    windows: list[Window]
    max_tokens: int
    family: Family = "causal"
    task: Task = "text-generation"
    single: bool = False

    @classmethod
    def read(cls, spec: WorkloadSpec, folder: Path, evaluation: Path) -> Workload:
        """The windows of a text folder, in the tokens of the model in `folder` and no longer than its context.

        Raises RecipeError for a workload that does not fit it.
        """
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        family, context = family_of(config), context_tokens(config)
        if reason := _context_refusal(spec, family, context):
            raise RecipeError(reason)
        length = min(spec.window_tokens, context)
        windows = scoring_windows(folder, config, evaluation, length, spec.windows)
        longest = max(length, spec.prompt_tokens + (0 if family == "encoder" else spec.new_tokens))
        return cls(spec, windows, longest, family, task_of(config), config.num_labels == 1)

    @property
    def new_tokens(self) -> int:
        """Tokens to generate: none by an encoder, which reads its prompt once."""
        return 0 if self.family == "encoder" else self.spec.new_tokens

    @property
    def counted_tokens(self) -> int:
        """Tokens of a sequence that the speed is said in: those generated, or those that an encoder has read."""
        return self.spec.prompt_tokens if self.family == "encoder" else self.spec.new_tokens

    @property
    def quality_bytes(self) -> tuple[int, ...]:
        """UTF-8 bytes that each window stands for."""
        return tuple(window.text_bytes for window in self.windows)

    @property
    def examples(self) -> list[Example]:
        """The windows of an encoder that answers by vectors or labels."""
        return [window for window in self.windows if isinstance(window, Example)]

    def prompts(self, batch_size: int) -> list[list[int]]:
        """Prompts of equal length, each from the beginning of another window; short windows borrow from the next ones."""
        length, prompts = self.spec.prompt_tokens, []
        for first in range(batch_size):
            here = first % len(self.windows)
            ids = chain.from_iterable(window.source or window.ids for window in cycle([*self.windows[here:], *self.windows[:here]]))
            prompts.append(list(islice(ids, length)))
        return prompts


def workload_refusal(spec: WorkloadSpec, facts: CheckpointFacts) -> str | None:
    """Why the checkpoint does not hold the workload; None where it does."""
    return _context_refusal(spec, family_of(facts.config), context_tokens(facts.config))


def _context_refusal(spec: WorkloadSpec, family: Family, context: int) -> str | None:
    """Why a workload does not fit the model: prompt and text in one sequence, or in one each, or the prompt alone."""
    prompt, new = spec.prompt_tokens, spec.new_tokens
    needed = {"causal": prompt + new, "seq2seq": max(prompt, new), "encoder": prompt}[family]
    if needed <= context:
        return None
    return (
        f"workload: prompt_tokens {prompt} and new_tokens {new} make {needed} tokens, "
        f"but the model's context holds {context}; lower them"
    )
