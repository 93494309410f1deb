"""What a recipe says of measuring and choosing: the workload, the constraints, the objective."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from featherweight.measure.statistics import trials_to_show
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


class ReferencesSpec(Spec):
    """Greedy texts of up to `new_tokens` of the first `texts` sources of the held-out text, held against their targets."""

    texts: Positive = 100
    new_tokens: Positive = 64
    metrics: Annotated[tuple[ReferenceMetric, ...], Field(min_length=1)] = get_args(ReferenceMetric)


class BenchmarkSpec(Spec):
    """A task of lm-evaluation-harness (`task`, by default the benchmark's own name) on local data: its prompts, choices and metric.

    file: a JSON object each line, as the task's own data set has them. labels: a file of the right answers, a number each line.
    limit: only the first so many.
    """

    task: str | None = None
    file: str
    labels: str | None = None
    limit: Positive | None = None


class WorkloadSpec(Spec):
    """What is measured: generation from `prompt_tokens` to `new_tokens`, and perplexity over `windows` windows of text.

    A seq2seq model encodes a source of `prompt_tokens` and decodes `new_tokens`. For an encoder one pass over `prompt_tokens` is
    a generation: `new_tokens` plays no role, and tokens per second are those that it has read.

    max_tokens: the longest sequence (prompt and new tokens) that the served model will be asked for, within its context: each
    engine is compared with PyTorch up to there, and refuses more. By default 512, or what is measured here where that is longer.
    threads: the counts to try for each engine, the best of which it runs at; by default 1, 2, 4 ... up to the machine's cores.
    changed_answers: compare the texts that it writes with the original's; not by default.
    benchmarks: tasks whose accuracy is measured, by name. references: hold what a seq2seq model writes against `data.target`.
    """

    quiet = frozenset({"changed_answers", "benchmarks", "references"})

    prompt_tokens: Positive = 16
    new_tokens: Positive = 64
    batch_sizes: tuple[Positive, ...] = (1, 8)
    rounds: Positive = 5
    windows: Positive = 60
    window_tokens: SequenceLength = 256
    max_tokens: SequenceLength | None = None
    threads: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    changed_answers: ChangedAnswersSpec | None = None
    benchmarks: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], BenchmarkSpec] = Field(default={})
    references: ReferencesSpec | None = None

    @property
    def served_tokens(self) -> int:
        """The longest sequence that an engine has to serve: what is asked for, and what is measured."""
        return max(self.max_tokens or SERVED_TOKENS, self.measured_tokens)

    @property
    def measured_tokens(self) -> int:
        """The longest sequence that is measured."""
        return max(self.window_tokens, self.prompt_tokens + self.written_tokens)

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


class ConstraintsSpec(Spec):
    """Bounds that the winner keeps with its confidence bound, not its point estimate. Quality loss: relative, in bits per byte; of
    encoders that answer by vectors or labels the difference of their loss (see featherweight/measure/agreement.py).

    max_changed_answers: a share of 1, of what `workload.changed_answers` asks for. max_accuracy_loss: a difference of shares, in
    each of `workload.benchmarks`. max_reference_loss: in points of 100, in each metric of `workload.references`.
    """

    quiet = frozenset({"max_changed_answers", "max_accuracy_loss", "max_reference_loss"})

    max_quality_loss: Annotated[float, Field(gt=-1)] | None = None
    min_speedup: Annotated[float, Field(gt=0)] | None = None
    max_size_bytes: Positive | None = None
    max_p95_latency_s: Annotated[float, Field(gt=0)] | None = None
    max_peak_memory_bytes: Positive | None = None
    max_changed_answers: Share | None = None
    max_accuracy_loss: Share | None = None
    max_reference_loss: Annotated[float, Field(gt=0, lt=100)] | None = None


def unmeasured(constraints: ConstraintsSpec, workload: WorkloadSpec) -> str | None:
    """Why a bound could never be kept: nothing measures it, or too little to show it; None where all can."""
    if constraints.max_accuracy_loss is not None and not workload.benchmarks:
        return "constraints.max_accuracy_loss wants workload.benchmarks, such as {lambada_openai: {file: lambada.jsonl}}"
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


class DecideSpec(Spec):
    """How the winner is chosen among the measured variants. variants: all that the plan has, the baseline included."""

    constraints: ConstraintsSpec
    objective: str
    variants: tuple[str, ...] = ()
