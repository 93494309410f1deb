"""What every variant of a recipe is measured on: prompts to go on from, and windows of text to score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, cycle, islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, TypeVar

from featherweight.errors import DataError, RecipeError, StageError
from featherweight.measure.benchmark_files import writes
from featherweight.measure.spec import ConstraintsSpec, WorkloadSpec
from featherweight.measure.speed import Shape
from featherweight.model.architecture import Family, family_of, task_of
from featherweight.model.facts import CheckpointFacts
from featherweight.model.heads import says_a_number
from featherweight.model.positions import context_tokens
from featherweight.spec import Task
from featherweight.store.served_folder import verified_tokens
from featherweight.text.examples import Example
from featherweight.text.model_inputs import scoring_windows, sources_and_targets
from featherweight.text.respelling import Respelling
from featherweight.text.tokens import Window

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Value = TypeVar("Value")
FEWEST_WINDOWS = 2
"""Of text, so that a loss of quality has an interval."""
APART = 16
"""Tokens of the text that are left out between the beginnings that are gone on from: a piece is no shorter than that."""


@dataclass(frozen=True)
class Respelt:
    """parts: how many windows each window of the text has become. firsts: where each of its tokens begins."""

    parts: tuple[int, ...]
    firsts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Workload:
    """What every variant of a recipe is measured on; `max_tokens` is the longest sequence in it.

    single: a model that labels texts has one label only; number: and says a number by it. respelt: where a
    variant's tokenizer is another one, what its windows are the parts of. questions: prompts whose greedy answers are compared, in
    the tokens of the variant, whose tokenizer lies in the folder `tokenizer`. references: what the first of them are to be answered
    with.
    """

    spec: WorkloadSpec
    windows: list[Window]
    max_tokens: int
    family: Family = "causal"
    task: Task = "text-generation"
    single: bool = False
    respelt: Respelt | None = None
    questions: tuple[list[int], ...] = ()
    tokenizer: Path = Path()
    references: tuple[str, ...] = ()
    number: bool = False

    @classmethod
    def read(cls, spec: WorkloadSpec, folder: Path, evaluation: Path) -> Workload:
        """The windows of a text folder, in the tokens of the model in `folder` and no longer than its context.

        Raises RecipeError for a workload that does not fit it, DataError for a text that is too short to judge by.
        """
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        family, context = family_of(config), context_tokens(config)
        if reason := _context_refusal(spec, family, context):
            raise RecipeError(reason)
        length = min(spec.window_tokens, context)
        windows = scoring_windows(folder, config, evaluation, length, spec.windows)
        if len(windows) < min(spec.windows, FEWEST_WINDOWS):
            raise DataError(
                f"the evaluation text fills one window of at most {length} tokens, by which no loss of quality can be told; give "
                "more text, or a larger data.evaluation"
            )
        questions, references = _questions(spec, folder, config, evaluation) if spec.asked_texts else ((), ())
        written = 0 if family == "encoder" else spec.written_tokens
        other = max((one.prompt_tokens + (one.new_tokens if written else 0) for one in spec.long_prompts), default=0)
        longest = max(length, other, written + max(spec.prompt_tokens, *map(len, questions), 0))
        longest = max(longest, min(spec.served_tokens, context)) if spec.benchmarks else longest
        task, single = task_of(config), config.num_labels == 1
        number = task == "text-classification" and says_a_number(config)
        return cls(spec, windows, longest, family, task, single, None, questions, folder, references, number)

    def for_served(self, served: Path, source: Path) -> Workload:
        """The same text in the tokens of the variant in `served`, which may lack some of those of `source` (text/respelling.py)."""
        respelling = Respelling.between(source, served)
        if respelling is None:
            return self
        limit = verified_tokens(served)
        parts = [respelling.windows(window, self.family, limit) for window in self.windows]
        windows = list(chain.from_iterable(parts))
        firsts = tuple(tuple(respelling.firsts(window.ids)) for window in self.windows)
        longest = max(self.max_tokens, *(max(len(window.ids), len(window.source)) for window in windows))
        questions = tuple(map(respelling.all, self.questions))
        longest = max(longest, *(len(ids) + self.spec.written_tokens for ids in questions), 0)
        spelt = Respelt(tuple(map(len, parts)), firsts)
        return replace(self, windows=windows, max_tokens=longest, respelt=spelt, questions=questions, tokenizer=served)

    def new_tokens(self, shape: Shape) -> int:
        """Tokens to generate: none by an encoder, which reads its prompt once."""
        return 0 if self.family == "encoder" else shape.new_tokens

    @property
    def answer_tokens(self) -> list[int]:
        """How many tokens to write behind each question."""
        return [max(new for texts, new in self.spec.asked_texts if place < texts) for place in range(len(self.questions))]

    def counted_tokens(self, shape: Shape) -> int:
        """Tokens of a sequence that the speed is said in: those generated, or those that an encoder has read."""
        return shape.prompt_tokens if self.family == "encoder" else shape.new_tokens

    @property
    def quality_bytes(self) -> tuple[int, ...]:
        """UTF-8 bytes that each window stands for."""
        return tuple(self.by_window([window.text_bytes for window in self.windows], sum))

    def by_window(self, values: Sequence[Value], join: Callable[[Sequence[Value]], Value]) -> list[Value]:
        """One value for each window of the text, of those of its parts."""
        if self.respelt is None:
            return list(values)
        ends = accumulate(self.respelt.parts)
        return [join(values[end - count : end]) for end, count in zip(ends, self.respelt.parts, strict=True)]

    def rows(self, answers: list[list[list[float]]]) -> list[list[list[float]]]:
        """What an encoder answers to each example, a row for each token of the text as the baseline reads it."""
        if self.respelt is None or self.task != "token-classification":
            return answers
        if any(firsts[-1] >= len(answer) for firsts, answer in zip(self.respelt.firsts, answers, strict=True)):
            raise StageError(
                "spelt in the tokens that were kept, an example is longer than what is served; lower workload.window_tokens"
            )
        return [[answer[first] for first in firsts] for firsts, answer in zip(self.respelt.firsts, answers, strict=True)]

    @property
    def examples(self) -> list[Example]:
        """The windows of an encoder that answers by vectors or labels."""
        return [window for window in self.windows if isinstance(window, Example)]

    def prompts(self, shape: Shape) -> list[list[int]]:
        """Prompts of equal length, each from the beginning of another window; short windows borrow from the next ones."""
        length, prompts = shape.prompt_tokens, []
        for first in range(shape.batch_size):
            here = first % len(self.windows)
            ids = chain.from_iterable(window.source or window.ids for window in cycle([*self.windows[here:], *self.windows[:here]]))
            prompts.append(list(islice(ids, length)))
        return prompts

    def asked(self, rate: float, turn: int) -> list[list[int]]:
        """The prompts of one round's requests: beginnings of the text, of half to all of `prompt_tokens`."""
        assert self.spec.requests is not None
        most, draw = self.spec.prompt_tokens, Random(turn)
        prompts = self.prompts(Shape(self.spec.requests.count(rate), most, self.spec.new_tokens))
        return [ids[: draw.randint(-(-most // 2), most)] for ids in prompts]


def _questions(
    spec: WorkloadSpec, folder: Path, config: PreTrainedConfig, evaluation: Path
) -> tuple[tuple[list[int], ...], tuple[str, ...]]:
    """Beginnings of pieces of the text, of `prompt_tokens` each; of a seq2seq model the sources, cut to what is measured, or
    to what is served where there are references, which come second."""
    texts, new_tokens = map(max, zip(*spec.asked_texts, strict=True))
    if family_of(config) == "seq2seq":
        longest = spec.served_tokens if spec.references else spec.measured_tokens
        pairs = sources_and_targets(folder, evaluation, min(longest - new_tokens, context_tokens(config)), texts)
        targets = [target for _, target in pairs[: spec.references.texts]] if spec.references else []
        return tuple(source for source, _ in pairs), tuple(targets)
    windows = scoring_windows(folder, config, evaluation, min(spec.prompt_tokens + APART, context_tokens(config)), texts)
    return tuple(window.ids[: spec.prompt_tokens] for window in windows), ()


def workload_refusal(spec: WorkloadSpec, facts: CheckpointFacts, constraints: ConstraintsSpec) -> str | None:
    """Why the checkpoint does not hold the workload, or what is asked of it; None where it does."""
    if spec.changed_answers and family_of(facts.config) == "encoder":
        task = task_of(facts.config)
        return f"workload.changed_answers: a model for {task} writes no text whose change could be counted; leave it out"
    if constraints.max_p99_request_ttft_s is not None and family_of(facts.config) == "encoder":
        return "constraints.max_p99_request_ttft_s: an encoder writes no tokens; bound max_p95_request_s or max_p99_request_s"
    if spec.benchmarks and family_of(facts.config) != "causal":
        return "workload.benchmarks: they are asked of models that go on from a text (text-generation); leave them out"
    context = context_tokens(facts.config)
    return _context_refusal(spec, family_of(facts.config), context) or _written_refusal(spec, context)


def _written_refusal(spec: WorkloadSpec, context: int) -> str | None:
    """Why a benchmark has longer texts written than are served with a prompt before them."""
    served = min(spec.served_tokens, context)
    for name, one in spec.benchmarks.items():
        if one.new_tokens >= served and writes(name, one):
            way = "raise workload.max_tokens, or lower" if served < context else "lower"
            return (
                f"workload.benchmarks.{name} has {one.new_tokens} tokens written behind each prompt, and {served} are served in "
                f"all; {way} its new_tokens"
            )
    return None


def _context_refusal(spec: WorkloadSpec, family: Family, context: int) -> str | None:
    """Why a workload does not fit the model: prompt and text in one sequence, or in one each, or the prompt alone."""
    asked = [("workload", spec.prompt_tokens, spec.written_tokens)]
    asked += [("workload.lengths", one.prompt_tokens, one.new_tokens) for one in spec.lengths]
    for where, prompt, new in asked:
        needed = {"causal": prompt + new, "seq2seq": max(prompt, new), "encoder": prompt}[family]
        if needed > context:
            return (
                f"{where}: prompt_tokens {prompt} and new_tokens {new} make {needed} tokens, "
                f"but the model's context holds {context}; lower them"
            )
    return None
