"""What a recipe says of measuring and choosing: the workload, the constraints, the objective."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from featherweight.measure.batching import TRIAL_S
from featherweight.measure.load import rate_name
from featherweight.measure.speed import Shape
from featherweight.measure.statistics import examples_to_show, trials_to_show, values_to_show
from featherweight.spec import Positive, SequenceLength, Share, Spec
from featherweight.store.served_folder import SERVED_TOKENS

BASELINE = "baseline"
"""The name of the untouched checkpoint among the variants."""


class ChangedAnswersSpec(Spec):
    """Greedy texts of up to `new_tokens`, behind the beginnings (`prompt_tokens`, or a seq2seq model's whole source) of `prompts`
    pieces of the held-out text, as many as there are. One has changed where its text is not the original's, letter for letter.
    """

    prompts: Positive = 100
    new_tokens: Positive = 32


ReferenceMetric = Literal["bleu", "chrf", "rouge_l"]


def _several(value: Any) -> Any:
    """One or several."""
    return [value] if isinstance(value, int | float | str | dict) and not isinstance(value, bool) else value


class ReferencesSpec(Spec):
    """Greedy texts of up to `new_tokens` of the first `texts` sources of the held-out text, held against their targets."""

    texts: Positive = 100
    new_tokens: Positive = 64
    metrics: Annotated[tuple[ReferenceMetric, ...], Field(min_length=1), BeforeValidator(_several)] = get_args(ReferenceMetric)


class BenchmarkSpec(Spec):
    """A task of lm-evaluation-harness (`task`, by default the benchmark's own name) on local data: its prompts, choices and metric.

    file: a JSON object each line, as the task's own data set has them. labels: a file of the right answers, a number each line.
    limit: only the first so many. examples: a file as `file`, of which so many `shots` stand in front of each prompt.
    new_tokens: of a task that has texts written, the most of each. filter: of one that reads its answer in several ways, which.
    chat: ask as a user in a conversation, by the checkpoint's chat template; the examples are earlier turns of it.
    """

    quiet = frozenset({"examples", "shots", "new_tokens", "filter", "chat"})

    task: str | None = None
    file: str
    labels: str | None = None
    limit: Positive | None = None
    examples: str | None = None
    shots: Positive | None = None
    new_tokens: Positive = 256
    filter: str | None = None
    chat: bool = False

    @model_validator(mode="after")
    def _examples_and_shots(self) -> BenchmarkSpec:
        if (self.examples is None) != (self.shots is None):
            raise ValueError("examples, a file, and shots, how many of them stand in front of a prompt, go together")
        return self

    @property
    def files(self) -> list[str]:
        """All that it reads."""
        return [name for name in (self.file, self.labels, self.examples) if name]


class LengthSpec(Spec):
    """Requests of another length, one at a time; a number alone is that of the prompt's tokens."""

    prompt_tokens: Positive
    new_tokens: Positive = 16

    @model_validator(mode="before")
    @classmethod
    def _prompt_alone(cls, value: Any) -> Any:
        return {"prompt_tokens": value} if isinstance(value, int) else value


Rate = Annotated[float, Field(gt=0, le=10**5)]
Wait = Annotated[float, Field(gt=0, le=10**5)]
Window = Annotated[float, Field(ge=0, le=10)]


class RequestsSpec(Spec):
    """Requests that come when they come (Poisson), `rate` a second on average, for about `seconds`; at several rates one after
    the other.

    rounds: into so many parts they are split, by turns with the baseline. patience_s: one whose answer is not begun by then is
    given up. Prompts are of half to all of the workload's `prompt_tokens`, answers of all of its `new_tokens`; an encoder's answers
    are vectors or labels. max_batch: the most that are answered together, by default each of the workload's `batch_sizes`;
    batch_window_s: how long a batch that is not full waits for others. Of several each variant gets the best, and is served so.
    """

    rate: Annotated[tuple[Rate, ...], Field(min_length=1), BeforeValidator(_several)]
    seconds: Wait = 30
    rounds: Annotated[int, Field(ge=1, le=100)] = 3
    patience_s: Wait = 30
    max_batch: Annotated[tuple[Positive, ...], BeforeValidator(_several)] = ()
    batch_window_s: Annotated[tuple[Window, ...], Field(min_length=1), BeforeValidator(_several)] = (0.0, 0.01)

    @model_validator(mode="after")
    def _distinct_rates(self) -> RequestsSpec:
        named = [rate_name(rate) for rate in self.rate]
        if twice := next((name for name in named if named.count(name) > 1), None):
            raise ValueError(f"rate: {twice.removeprefix('rate_')} stands twice; its figures are named by the rate")
        return self

    def count(self, rate: float) -> int:
        """How many requests come at a rate in a round."""
        return math.ceil(rate * self.seconds / self.rounds)

    @property
    def trial_count(self) -> int:
        """How many come, at the highest rate, in a trial of how they are answered together."""
        rate = max(self.rate)
        return min(self.count(rate), math.ceil(rate * TRIAL_S))

    def trials_s(self, batch_sizes: Collection[int]) -> float:
        """So long the trials of a variant take at most."""
        ways = len(set(self.max_batch or batch_sizes)) + len(set(self.batch_window_s)) - 1
        return ways * self.trial_count / max(self.rate) if ways > 1 else 0.0


class WorkloadSpec(Spec):
    """What is measured: generation from `prompt_tokens` to `new_tokens`, and perplexity over `windows` windows of text.

    A seq2seq model encodes a source of `prompt_tokens` and decodes `new_tokens`. For an encoder one pass over `prompt_tokens` is
    a generation: `new_tokens` plays no role, and tokens per second are those that it has read.

    max_tokens: the longest sequence (prompt and new tokens) that the served model will be asked for, within its context: each
    engine is compared with PyTorch up to there, and refuses more. By default 512, or what is measured here where that is longer.
    threads: the counts to try for each engine, the best of which it runs at; by default 1, 2, 4 ... up to the machine's cores.
    changed_answers: compare the texts that it writes with the original's; not by default.
    benchmarks: tasks whose accuracy is measured, by name. references: hold what a seq2seq model writes against `data.target`.
    lengths: other lengths of prompts, such as [512, 2048], for each of which the time to the first token is measured.
    requests: how long requests wait that come at a rate.
    """

    quiet = frozenset({"changed_answers", "benchmarks", "references", "lengths", "requests"})

    prompt_tokens: Positive = 16
    new_tokens: Positive = 64
    batch_sizes: Annotated[tuple[Positive, ...], BeforeValidator(_several)] = (1, 8)
    rounds: Positive = 5
    windows: Positive = 60
    window_tokens: SequenceLength = 256
    max_tokens: SequenceLength | None = None
    threads: Annotated[tuple[Positive, ...] | None, Field(min_length=1), BeforeValidator(_several)] = None
    changed_answers: ChangedAnswersSpec | None = None
    benchmarks: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], BenchmarkSpec] = Field(default={})
    references: ReferencesSpec | None = None
    lengths: Annotated[tuple[LengthSpec, ...], BeforeValidator(_several)] = ()
    requests: RequestsSpec | None = None

    @model_validator(mode="after")
    def _distinct_lengths(self) -> WorkloadSpec:
        prompts = [one.prompt_tokens for one in self.lengths]
        if twice := next((prompt for prompt in prompts if prompts.count(prompt) > 1), None):
            raise ValueError(f"lengths: {twice} tokens stand twice; its figures are named by the prompt's length")
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        """What scores it beside the engines."""
        harness = ("featherweight.measure.benchmark_files:Harness",) if self.benchmarks else ()
        return (*harness, "featherweight.measure.references:References") if self.references else harness

    @property
    def batches(self) -> list[Shape]:
        """What is timed at each batch size."""
        return [Shape(size, self.prompt_tokens, self.new_tokens) for size in self.batch_sizes]

    @property
    def most_at_once(self) -> int:
        """The most sequences that are ever answered together."""
        return max(*self.batch_sizes, *(self.requests.max_batch if self.requests else ()), 0)

    @property
    def long_prompts(self) -> list[Shape]:
        """What is timed at each of the other lengths."""
        return [Shape(1, one.prompt_tokens, one.new_tokens) for one in self.lengths]

    @property
    def served_tokens(self) -> int:
        """The longest sequence that an engine has to serve: what is asked for, and what is measured."""
        return max(self.max_tokens or SERVED_TOKENS, self.measured_tokens)

    @property
    def measured_tokens(self) -> int:
        """The longest sequence that is measured."""
        return max(self.window_tokens, self.prompt_tokens + self.written_tokens, self.longest_request)

    @property
    def longest_request(self) -> int:
        """The longest sequence among the other lengths; 0 without any."""
        return max((one.prompt_tokens + one.new_tokens for one in self.lengths), default=0)

    @property
    def written_tokens(self) -> int:
        """The longest text that is written."""
        return max(self.new_tokens, *(new for _, new in self.asked_texts), 0)

    @property
    def asked_texts(self) -> list[tuple[int, int]]:
        """(how many greedy texts, the most tokens of each) for each purpose that asks for some; all of the first questions."""
        changed, references = self.changed_answers, self.references
        asked = [(changed.prompts, changed.new_tokens)] if changed else []
        return [*asked, (references.texts, references.new_tokens)] if references else asked


Seconds = Annotated[float, Field(gt=0)]
NEIGHBOURS = 2
"""Of so many requests that come after each other one says something new, where a line is short now and then."""
REQUEST_QUANTILES = {"max_p95_request_s": 0.95, "max_p99_request_s": 0.99, "max_p99_request_ttft_s": 0.99}
"""The quantile that each bound of what requests wait is about."""


class ConstraintsSpec(Spec):
    """Bounds that the winner keeps with its confidence bound, not its point estimate. Quality loss: relative, in bits per byte; of
    encoders that answer by vectors or labels the difference of their loss (see featherweight/measure/agreement.py).

    max_changed_answers: a share of 1, of what `workload.changed_answers` asks for. max_accuracy_loss: a difference of shares, in
    each of `workload.benchmarks`. max_reference_loss: in points of 100, in each metric of `workload.references`. max_ttft_s: time
    to the first token, or that at several of `workload.lengths`, such as {512: 0.2, 2048: 1.0}. max_startup_s: until it can serve.
    max_p95_request_s, max_p99_request_s, max_p99_request_ttft_s: what requests of `workload.requests` wait, at every rate, or at
    some, such as {4: 1.5}.
    """

    quiet = frozenset(
        {
            *("max_changed_answers", "max_accuracy_loss", "max_reference_loss"),
            *("max_p99_latency_s", "max_ttft_s", "max_inter_token_s", "max_startup_s"),
            *("max_p95_request_s", "max_p99_request_s", "max_p99_request_ttft_s"),
        }
    )

    max_quality_loss: Annotated[float, Field(gt=-1)] | None = None
    min_speedup: Annotated[float, Field(gt=0)] | None = None
    max_size_bytes: Positive | None = None
    max_p95_latency_s: Seconds | None = None
    max_peak_memory_bytes: Positive | None = None
    max_changed_answers: Share | None = None
    max_accuracy_loss: Share | None = None
    max_reference_loss: Annotated[float, Field(gt=0, lt=100)] | None = None
    max_p99_latency_s: Seconds | None = None
    max_ttft_s: Seconds | dict[Positive, Seconds] | None = None
    max_inter_token_s: Seconds | None = None
    max_startup_s: Seconds | None = None
    max_p95_request_s: Seconds | dict[Rate, Seconds] | None = None
    max_p99_request_s: Seconds | dict[Rate, Seconds] | None = None
    max_p99_request_ttft_s: Seconds | dict[Rate, Seconds] | None = None

    @property
    def bounds(self) -> dict[str, float]:
        """Those that are set, by name; of one that is set for several lengths or rates each, as 'max_ttft_s.512'."""
        flat: dict[str, float] = {}
        for name, bound in self.model_dump(exclude_none=True).items():
            flat |= {f"{name}.{_plain(at)}": one for at, one in bound.items()} if isinstance(bound, dict) else {name: bound}
        return flat


def _plain(at: float) -> str:
    """A length or a rate as names of figures have it."""
    return str(at) if isinstance(at, int) else f"{at:g}"


def unmeasured(constraints: ConstraintsSpec, objective: str, workload: WorkloadSpec) -> str | None:
    """Why a bound could never be kept, or the objective be told: nothing measures it, or too little; None where all can."""
    if reason := _untimed(constraints, objective, workload) or _too_few_requests(constraints, workload.requests):
        return reason
    if reason := _too_few_examples(constraints.max_accuracy_loss, workload.benchmarks):
        return reason
    if constraints.max_reference_loss is not None and workload.references is None:
        return "constraints.max_reference_loss wants workload.references, such as {texts: 100, new_tokens: 64, metrics: [bleu]}"
    allowed, asked = constraints.max_changed_answers, workload.changed_answers
    if allowed is None:
        return None
    if asked is None:
        return "constraints.max_changed_answers wants workload.changed_answers, such as {prompts: 100, new_tokens: 32}"
    needed = trials_to_show(allowed)
    if asked.prompts >= needed:
        return None
    return (
        f"constraints.max_changed_answers {allowed:g} takes at least {needed} prompts to show, even if no answer changes; "
        f"set workload.changed_answers.prompts to that"
    )


def _too_few_examples(allowed: float | None, benchmarks: dict[str, BenchmarkSpec]) -> str | None:
    """A loss of accuracy that no benchmark measures, or of so few examples that its interval is wider, whatever is answered."""
    if allowed is None:
        return None
    if not benchmarks:
        return "constraints.max_accuracy_loss wants workload.benchmarks, such as {lambada_openai: {file: lambada.jsonl}}"
    needed = examples_to_show(allowed)
    few = [name for name, one in benchmarks.items() if one.limit is not None and one.limit < needed]
    if not few:
        return None
    return (
        f"constraints.max_accuracy_loss {allowed:g} takes at least {needed} examples to show, even if no answer differs; "
        f"set workload.benchmarks.{few[0]}.limit to that"
    )


def _untimed(constraints: ConstraintsSpec, objective: str, workload: WorkloadSpec) -> str | None:
    """A batch size or a length of prompts that something asks for, and that is not timed."""
    kind, _, named = objective.partition("@")
    if kind == "speedup" and int(named) not in workload.batch_sizes:
        return f"objective {objective} wants {named} among workload.batch_sizes, which are {list(workload.batch_sizes)}"
    bounds = constraints.max_ttft_s if isinstance(constraints.max_ttft_s, dict) else {}
    wanted = {f"constraints.max_ttft_s.{prompt}": prompt for prompt in bounds} | ({objective: int(named)} if kind == "ttft" else {})
    timed = [one.prompt_tokens for one in workload.lengths]
    return next((f"{what} wants {prompt} among workload.lengths" for what, prompt in wanted.items() if prompt not in timed), None)


def _too_few_requests(constraints: ConstraintsSpec, asked: RequestsSpec | None) -> str | None:
    """A wait that no request shows, or too few of them."""
    bounds = {name: getattr(constraints, name) for name in REQUEST_QUANTILES}
    for name, bound in bounds.items():
        if bound is None:
            continue
        if asked is None:
            return f"constraints.{name} wants workload.requests, such as {{rate: 4, seconds: 100}}"
        rates = tuple(bound) if isinstance(bound, dict) else asked.rate
        if other := next((rate for rate in rates if rate_name(rate) not in map(rate_name, asked.rate)), None):
            return f"constraints.{name} wants {other:g} among the rates of workload.requests"
        needed = NEIGHBOURS * values_to_show(REQUEST_QUANTILES[name])
        if (fewest := min(map(asked.count, rates)) * asked.rounds) < needed:
            seconds = math.ceil(needed / min(rates))
            return (
                f"constraints.{name} takes about {needed} requests to show, and workload.requests has {fewest} at the rate "
                f"{min(rates):g}; set workload.requests.seconds to {seconds}"
            )
    return None


class DecideSpec(Spec):
    """How the winner is chosen among the measured variants. variants: all that the plan has, the baseline included."""

    constraints: ConstraintsSpec
    objective: str
    variants: tuple[str, ...] = ()
