"""Measuring served variants on their own engines, by turns: threads, speed, memory, quality."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from featherweight.errors import StageError
from featherweight.measure.agreement import embedding_quality, label_quality, score_quality
from featherweight.measure.load import Load
from featherweight.measure.measurement import Measurement, Quality
from featherweight.measure.references import matches
from featherweight.measure.speed import Shape, Speed
from featherweight.measure.threads import HOPELESS, Probe, best_count, best_latency_s, common_count, thread_counts
from featherweight.progress import Progress
from featherweight.runtimes.benchmarks import hits
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.greedy_texts import greedy_tokens, spelt
from featherweight.runtimes.interface import Timing
from featherweight.runtimes.kept_worker import kept_worker, started
from featherweight.runtimes.workload import Workload
from featherweight.spec import HEADED
from featherweight.store.served_folder import Serving, served_bytes
from featherweight.system.device import CPU
from featherweight.system.energy import EnergyMeter

PROBE_ROUNDS, PROBE_S = 3, 1.0
# What a quick engine repeats its generation for in each of its turns, so that one hiccup of the machine is not its figure.
TURN_S, MOST_REPEATS = 0.2, 8


@dataclass(frozen=True)
class Turn:
    """One round's generations, and the joules that the machine used in it; None where that is not readable."""

    timings: list[Timing]
    energy_j: float | None = None


class MeasuredVariant:
    """One served folder being measured: its worker, and its best number of threads for whatever is timed."""

    def __init__(
        self,
        workload: Workload,
        served: Path,
        stack: ExitStack,
        progress: Progress,
        known: Measurement | None = None,
        *,
        keep: bool = False,
        like: Measurement | None = None,
    ) -> None:
        """known: its measurement by itself, of which only the speed is taken again. keep: others are measured beside it later.
        like: that of an engine much like this one, on this machine, whose best numbers of threads are taken where each other one
        would cost tens of seconds.
        """
        self.workload, self.served, self.progress = workload, served, progress
        self.shapes = [*workload.spec.batches, *workload.spec.long_prompts]
        self.known = known if known and known.timed.keys() >= {*self.shapes} and _same_questions(known, workload) else None
        self.engine = Serving.read(served).engine
        self.slow = RUNTIMES[self.engine].slow_to_switch
        self.taken = _likely(like, self.shapes) if self.slow and not workload.spec.threads else {}
        self.counts = [self.taken[self.shapes[0]]] if self.taken else thread_counts(workload.spec.threads, self.slow)
        asked = served, self.counts[0], workload.max_tokens, workload.spec.most_at_once, progress
        self.worker = stack.enter_context(kept_worker(*asked, fresh=self.known is None) if keep else started(*asked))
        before = self.known.timed if self.known else {}
        self.warmup_s = {(shape, speed.threads): speed.warmup_s for shape, speed in before.items()}
        self.repeats = 1
        self.energy = EnergyMeter(self.worker.device)
        self.probes = self._probe({shape: speed.probe for shape, speed in before.items()})

    def _probe(self, known: Mapping[Shape, Mapping[int, tuple[float, ...]]]) -> dict[Shape, Probe]:
        """Latencies by what is timed and number of threads; one count alone needs no probe."""
        probes: dict[Shape, Probe] = {shape: dict(known.get(shape, {})) for shape in self.shapes}
        wanted = [shape for shape in probes if shape not in known]
        for threads in self.counts if wanted and len(self.counts) > 1 else ():
            self.progress.note(f"trying {self.engine} with {threads} thread{'s' if threads > 1 else ''}")
            for shape in wanted:
                probes[shape][threads] = self._try(shape, threads, probes[shape])
        return probes

    def _try(self, shape: Shape, threads: int, others: Probe) -> tuple[float, ...]:
        """Latencies of a few shorter generations; only the first, which warms up, where that is hopeless already."""
        self.worker.set_threads(threads)
        wanted = self.workload.new_tokens(shape)
        tokens = min(wanted, max(16, wanted // 4))
        best = best_latency_s(others)
        first_s = self._run(shape, tokens).total_s
        self.warmup_s.setdefault((shape, threads), first_s)
        if first_s > 2 * HOPELESS * best and not self.slow:
            return (first_s,)
        times: list[float] = []
        while len(times) < PROBE_ROUNDS and sum(times) < PROBE_S and (not times or times[0] < HOPELESS * best):
            times.append(self._run(shape, tokens).total_s)
        return tuple(times)

    def threads(self, shape: Shape) -> int:
        """The best number of threads for what is timed, the only one where there was no choice."""
        if self.known:
            return self.known.timed[shape].threads
        if self.taken:
            return self.taken[shape]
        probe = self.probes[shape]
        return best_count(probe) if probe else self.counts[0]

    def prepare(self, shape: Shape) -> None:
        """Switch to the best number of threads and generate unmeasured, to warm up and to see how often a turn repeats it."""
        threads, tokens = self.threads(shape), self.workload.new_tokens(shape)
        self.worker.set_threads(threads)
        first_s = self._run(shape, tokens).total_s
        self.warmup_s.setdefault((shape, threads), first_s)
        warm_s = self._run(shape, tokens).total_s if first_s < TURN_S or self.slow else first_s
        self.repeats = max(1, min(MOST_REPEATS, int(TURN_S / warm_s)))

    def turn(self, shape: Shape) -> Turn:
        """One round's timed generations."""
        before = self.energy.read()
        timings = [self._run(shape, self.workload.new_tokens(shape)) for _ in range(self.repeats)]
        return Turn(timings, self.energy.since(before))

    def _run(self, shape: Shape, new_tokens: int) -> Timing:
        return self.worker.time(self.workload.prompts(shape), new_tokens)

    def speed(self, shape: Shape, turns: list[Turn]) -> Speed:
        """The turns of all rounds as a measurement."""
        threads, timings = self.threads(shape), [timing for turn in turns for timing in turn.timings]
        return Speed(
            shape.batch_size,
            threads,
            shape.prompt_tokens,
            self.workload.counted_tokens(shape),
            tuple(timing.total_s for timing in timings),
            tuple(timing.ttft_s for timing in timings),
            self.repeats,
            self.warmup_s[shape, threads],
            self.probes[shape],
            tuple(turn.energy_j for turn in turns if turn.energy_j is not None),
        )

    @property
    def fullest(self) -> Shape:
        """What is timed of the most texts at once: requests that come by themselves are answered at its number of threads."""
        return max(self.workload.spec.batches, key=lambda shape: shape.batch_size)

    def timed_texts(self) -> tuple[list[list[int]], dict[int, float]]:
        """What it writes where it is timed, and by batch size so many tokens a pass over a text, where it drafts and tells."""
        texts, written = list[list[int]](), dict[int, float]()
        for shape in self.shapes:
            before = self.worker.acceptance()
            texts += self.worker.generate(self.workload.prompts(shape), self.workload.new_tokens(shape))
            after = self.worker.acceptance()
            if before and after and shape in self.workload.spec.batches:
                written[shape.batch_size] = (after.written - before.written) / (after.passes - before.passes)
        return texts, written

    def live(self, shape: Shape, turns: list[Turn]) -> dict[str, float]:
        """What is told while rounds go on."""
        speed = self.speed(shape, turns)
        if shape in self.workload.spec.batches:
            return {f"tokens_per_s_{shape.batch_size}": speed.tokens_per_s}
        return {f"ttft_s_prompt_{shape.prompt_tokens}": speed.median_ttft_s}

    def measurement(self, timed: list[Speed], original: MeasuredVariant | None = None, loads: tuple[Load, ...] = ()) -> Measurement:
        """Everything about it. Memory is read before the windows are scored, which serving never does.

        timed: at each batch size, then at each other length of prompts. original: the baseline that answers by vectors or labels
        are compared with, itself by default.
        """
        batches = len(self.workload.spec.batch_sizes)
        speeds, lengths = tuple(timed[:batches]), tuple(timed[batches:])
        if self.known:
            anew = replace(self.known, speeds=speeds, lengths=lengths, loads=loads)
            return replace(anew, size_bytes=served_bytes(self.served), roofline=None)
        host, worker = self.worker.peak_memory_bytes(), self.worker
        on_cpu = worker.device == CPU
        told, tensors = (None, None) if on_cpu else (worker.peak_gpu_memory_bytes(), worker.peak_tensor_bytes())
        return Measurement(
            self.engine,
            self._quality(original or self),
            speeds,
            host if on_cpu else told or tensors,  # PyTorch's own count, where the driver tells nothing of a GPU
            served_bytes(self.served),
            worker.startup_s,
            device=worker.device,
            peak_host_memory_bytes=None if on_cpu else host,
            peak_tensor_bytes=tensors,
            attention=self._attention(),
            hits=self._hits(),
            lengths=lengths,
            loads=loads,
            **self._texts(),
        )

    def _attention(self) -> dict[str, str]:
        """Asked last, since it computes; a model that cannot be asked is measured all the same."""
        try:
            return self.worker.attention()
        except StageError as error:
            self.progress.note(f"its attention is not known: {error}")
            return {}

    def _texts(self) -> dict[str, Any]:
        """Its greedy answers to the workload's questions, in letters: a variant's tokens need not be the baseline's."""
        work, found = self.workload, dict[str, Any]()
        if not work.questions:
            return found
        self.progress.note(f"asking {self.engine} for {len(work.questions)} texts")
        written = greedy_tokens(self.worker, work.questions, work.answer_tokens)
        if changed := work.spec.changed_answers:
            found["answers"] = spelt(work.tokenizer, written[: changed.prompts], changed.new_tokens, special=True)
        if asked := work.spec.references:
            texts = spelt(work.tokenizer, written[: asked.texts], asked.new_tokens, special=False)
            found |= {"written": texts, "matches": {name: matches(name, texts, work.references) for name in asked.metrics}}
        return found

    def _hits(self) -> dict[str, tuple[float, ...]]:
        asked = self.workload.spec.benchmarks
        if asked:
            self.progress.note(f"asking {self.engine} {', '.join(asked)}")
        return hits(self.worker, self.workload.tokenizer, asked) if asked else {}

    @cached_property
    def answers(self) -> list[list[list[float]]]:
        """What an encoder answers to each example."""
        examples = self.workload.examples
        self.progress.note(f"asking {self.engine} for {len(examples)} answers")
        found = self.worker.outputs([one.ids for one in examples], [one.types for one in examples])
        return self.workload.rows(found)

    def _quality(self, original: MeasuredVariant) -> Quality:
        work = self.workload
        if work.task == "feature-extraction":
            return embedding_quality(self.answers, original.answers, work.quality_bytes)
        if work.number:
            return score_quality(self.answers, original.answers, work.quality_bytes)
        if work.task in HEADED:
            labels = [one.labels for one in original.workload.examples]
            return label_quality(self.answers, original.answers, labels, work.quality_bytes, work.single)
        return self._text_quality()

    def _text_quality(self) -> Quality:
        windows = self.workload.windows
        scores: list[list[float]] = []
        for start in range(0, len(windows), 8):
            self.progress.note(f"scoring window {start + 1} of {len(windows)}")
            scores += self.worker.score(windows[start : start + 8])
        nll = [-math.fsum(row) for row in scores]
        broken = sum(not math.isfinite(value) for value in nll)
        if broken:
            raise StageError(f"{self.engine} gives log-probabilities that are no numbers in {broken} of {len(nll)} windows")
        tokens = self.workload.by_window([len(row) for row in scores], sum)
        return Quality(tuple(self.workload.by_window(nll, math.fsum)), tuple(tokens), self.workload.quality_bytes)


def _likely(like: Measurement | None, shapes: list[Shape]) -> dict[Shape, int]:
    """The numbers of threads of another measurement, one for all where that is near; none where it has not timed all of it."""
    timed = like.timed if like else {}
    if not timed.keys() >= {*shapes}:
        return {}
    common = common_count([timed[shape].probe for shape in shapes])
    return {shape: common or timed[shape].threads for shape in shapes}


def _same_questions(known: Measurement, workload: Workload) -> bool:
    """Whether what was asked of it then is what is asked now."""
    spec, texts = workload.spec, max(len(known.answers), len(known.written))
    if known.quality.bytes != workload.quality_bytes or texts != len(workload.questions):
        return False
    metrics = set(spec.references.metrics) if spec.references else set()
    compared = bool(known.answers) == (spec.changed_answers is not None)
    return compared and known.hits.keys() == spec.benchmarks.keys() and known.matches.keys() == metrics


def take_turns(sides: Collection[MeasuredVariant], shape: Shape, progress: Progress) -> list[Speed]:
    """Timed rounds by turns: how quickly each side answers. What is told while they go on is of the first."""
    turns: dict[MeasuredVariant, list[Turn]] = {side: [] for side in sides}
    for side in turns:
        side.prepare(shape)
    first = next(iter(turns))
    rounds = first.workload.spec.rounds
    for turn in range(rounds):
        for side in by_turns(turns, turn):
            turns[side].append(side.turn(shape))
        progress.step(turn + 1, rounds, **first.live(shape, turns[first]))
    return [side.speed(shape, turns[side]) for side in sides]


def by_turns(sides: Collection[MeasuredVariant], turn: int) -> list[MeasuredVariant]:
    """One of each side by turns, so that what slows the machine slows both; who begins alternates too."""
    return list(sides) if turn % 2 == 0 else list(sides)[::-1]
