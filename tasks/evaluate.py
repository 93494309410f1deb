"""Evaluate a served variant on its own engine, in turns with the baseline: quality, speed, memory, size."""

from __future__ import annotations

import filecmp
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from featherweight.errors import RecipeError, StageError
from featherweight.measure.measurement import Comparison, Measurement, Quality, Speed
from featherweight.measure.roofline import Roofline
from featherweight.measure.spec import WorkloadSpec
from featherweight.model.architecture import Family, family_of
from featherweight.progress import Metrics, Progress
from featherweight.runtimes import Timing, engine_class, open_worker
from featherweight.runtimes.bytes_read import bytes_read
from featherweight.store.served_folder import Serving
from featherweight.system.machine import available_cores, hardware_fingerprint, memory_bandwidth_bytes_s, physical_cores
from featherweight.text.model_inputs import scoring_windows
from featherweight.text.tokens import Window
from tasks.stage import stage

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PROBE_ROUNDS, PROBE_S = 3, 1.0
# A count of threads that is this many times slower than another is not tried again: two teams of threads on too few cores
# can be fifty times slower.
HOPELESS = 1.5
# What a quick engine repeats its generation for in each of its turns, so that one hiccup of the machine is not its figure.
TURN_S, MOST_REPEATS = 0.2, 8
Probe = dict[int, tuple[float, ...]]


@stage("evaluate", hardware=True, libraries=("torch", "transformers", "onnxruntime-genai", "ctranslate2"))
def evaluate(
    spec: WorkloadSpec,
    *,
    served: Path,
    baseline: Path,
    evaluation: Path,
    out: Path,
    baseline_measurement: Path | None = None,
    seed: int = 0,
    progress: Progress = Progress(),
) -> Metrics:
    """Measure `served` beside `baseline` (both served folders) on the text folder `evaluation`.

    baseline_measurement: what evaluating the baseline against itself gave; its quality, memory and best thread counts are
    taken from there, while its speed is measured again, in turns with the variant's. Writes `measurement.json` and returns
    Comparison.metrics(). Raises StageError where an engine fails or computes what is no number, RecipeError where the
    workload does not fit the model's context.
    """
    workload = _workload(spec, baseline, evaluation)
    known = Comparison.read(baseline_measurement).variant if baseline_measurement else None
    with ExitStack() as stack:
        variant = _Side(workload, served, stack, progress)
        other = variant if _same(served, baseline) else _Side(workload, baseline, stack, progress, known)
        pairs = [_take_turns(variant, other, batch_size, progress) for batch_size in spec.batch_sizes]
        measured = variant.measurement([ours for ours, _ in pairs])
        measured = replace(measured, roofline=_roofline(served, measured))
        reference = measured if other is variant else other.measurement([theirs for _, theirs in pairs])
    comparison = Comparison(measured, reference, hardware_fingerprint())
    comparison.write(out)
    return comparison.metrics()


def _roofline(served: Path, measured: Measurement) -> Roofline | None:
    """What tokens at batch 1 read, and what as many threads as it ran at can read; None where memory is not the roof."""
    speed = next((speed for speed in measured.speeds if speed.batch_size == 1), None)
    read = bytes_read(served) if speed else None
    if speed is None or read is None:
        return None
    return Roofline(read.per_token(speed.prompt_tokens, speed.new_tokens), memory_bandwidth_bytes_s(speed.threads))


@dataclass(frozen=True)
class _Workload:
    """What every variant of a recipe is measured on; `max_tokens` is the longest sequence in it."""

    spec: WorkloadSpec
    windows: list[Window]
    max_tokens: int
    family: Family = "causal"

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
        return tuple(window.text_bytes for window in self.windows)

    def prompts(self, batch_size: int) -> list[list[int]]:
        """Prompts of equal length, each from the beginning of another window; short windows borrow from the next ones."""
        length, prompts = self.spec.prompt_tokens, []
        for first in range(batch_size):
            here = first % len(self.windows)
            ids = chain.from_iterable(window.source or window.ids for window in cycle([*self.windows[here:], *self.windows[:here]]))
            prompts.append(list(islice(ids, length)))
        return prompts


def _workload(spec: WorkloadSpec, baseline: Path, evaluation: Path) -> _Workload:
    """The windows, in the baseline's tokens and no longer than its context."""
    from transformers import AutoConfig

    folder = baseline / Serving.read(baseline).weights
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    family, context = family_of(config), _context(config)
    _require_context(spec, family, context)
    length = min(spec.window_tokens, context)
    windows = scoring_windows(folder, config, evaluation, length, spec.windows)
    return _Workload(spec, windows, max(length, spec.prompt_tokens + spec.new_tokens), family)


def _require_context(spec: WorkloadSpec, family: Family, context: int) -> None:
    """Refuse a workload that does not fit the model: prompt and text in one sequence, or in one each, or the prompt alone."""
    prompt, new = spec.prompt_tokens, spec.new_tokens
    needed = {"causal": prompt + new, "seq2seq": max(prompt, new), "encoder": prompt}[family]
    if needed > context:
        raise RecipeError(
            f"workload: prompt_tokens {prompt} and new_tokens {new} make {needed} tokens, "
            f"but the model's context holds {context}; lower them"
        )


def _context(config: PreTrainedConfig) -> int:
    """Longest sequence that a model was made for. RoBERTa's positions begin after its padding token's."""
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2**31
    return positions - (config.pad_token_id or 0) - 1 if config.model_type in ("roberta", "xlm-roberta") else positions


class _Side:
    """One served folder being measured: its worker, and its best number of threads for each batch size."""

    def __init__(
        self, workload: _Workload, served: Path, stack: ExitStack, progress: Progress, known: Measurement | None = None
    ) -> None:
        self.workload, self.served, self.progress = workload, served, progress
        self.known = known if known and known.quality.bytes == workload.quality_bytes else None
        sizes = workload.spec.batch_sizes
        self.engine = Serving.read(served).engine
        self.slow = engine_class(self.engine).slow_to_switch
        self.counts = _thread_counts(workload.spec.threads, self.slow)
        progress.note(f"starting {self.engine}")
        self.worker = stack.enter_context(open_worker(served, self.counts[0], workload.max_tokens, max(sizes)))
        self.warmup_s: dict[tuple[int, int], float] = {}
        self.repeats = 1
        self.probes = self._probe(sizes)

    def _probe(self, batch_sizes: tuple[int, ...]) -> dict[int, Probe]:
        """Latencies by batch size and number of threads; one count alone needs no probe."""
        known = {speed.batch_size: speed for speed in self.known.speeds} if self.known else {}
        probes: dict[int, Probe] = {size: dict(known[size].probe) if size in known else {} for size in batch_sizes}
        wanted = [size for size in batch_sizes if size not in known]
        for threads in self.counts if wanted and len(self.counts) > 1 else ():
            self.progress.note(f"trying {self.engine} with {threads} thread{'s' if threads > 1 else ''}")
            for size in wanted:
                probes[size][threads] = self._try(size, threads, probes[size])
        return probes

    def _try(self, batch_size: int, threads: int, others: Probe) -> tuple[float, ...]:
        """Latencies of a few shorter generations; only the first, which warms up, where that is hopeless already."""
        self.worker.set_threads(threads)
        wanted = self.workload.new_tokens
        tokens = min(wanted, max(16, wanted // 4))
        best = min((min(times) for times in others.values()), default=math.inf)
        first_s = self._run(batch_size, tokens).total_s
        self.warmup_s.setdefault((batch_size, threads), first_s)
        if first_s > 2 * HOPELESS * best and not self.slow:
            return (first_s,)
        times: list[float] = []
        while len(times) < PROBE_ROUNDS and sum(times) < PROBE_S and (not times or times[0] < HOPELESS * best):
            times.append(self._run(batch_size, tokens).total_s)
        return tuple(times)

    def threads(self, batch_size: int) -> int:
        """The number of threads with the best latency; of two within 3 % of it, the smaller."""
        if self.known:
            return self.known.speed(batch_size).threads
        probe = self.probes[batch_size]
        if not probe:
            return self.counts[0]
        best = min(min(times) for times in probe.values())
        return min(count for count, times in probe.items() if min(times) <= 1.03 * best)

    def prepare(self, batch_size: int) -> None:
        """Switch to the best number of threads and generate unmeasured, to warm up and to see how often a turn repeats it."""
        threads = self.threads(batch_size)
        self.worker.set_threads(threads)
        first_s = self._run(batch_size, self.workload.new_tokens).total_s
        self.warmup_s.setdefault((batch_size, threads), first_s)
        warm_s = self._run(batch_size, self.workload.new_tokens).total_s if first_s < TURN_S or self.slow else first_s
        self.repeats = max(1, min(MOST_REPEATS, int(TURN_S / warm_s)))

    def turn(self, batch_size: int) -> list[Timing]:
        """One round's timed generations."""
        return [self._run(batch_size, self.workload.new_tokens) for _ in range(self.repeats)]

    def _run(self, batch_size: int, new_tokens: int) -> Timing:
        return self.worker.time(self.workload.prompts(batch_size), new_tokens)

    def speed(self, batch_size: int, timings: list[Timing]) -> Speed:
        """The timings of all rounds as a measurement."""
        threads, spec = self.threads(batch_size), self.workload.spec
        return Speed(
            batch_size,
            threads,
            spec.prompt_tokens,
            self.workload.counted_tokens,
            tuple(timing.total_s for timing in timings),
            tuple(timing.ttft_s for timing in timings),
            self.repeats,
            self.warmup_s[batch_size, threads],
            self.probes[batch_size],
        )

    def measurement(self, speeds: list[Speed]) -> Measurement:
        """Everything about this side. Memory is read before the windows are scored, which serving never does."""
        peak = self.known.peak_memory_bytes if self.known else self.worker.peak_memory_bytes()
        startup_s = self.known.startup_s if self.known else self.worker.startup_s
        quality = self.known.quality if self.known else self._quality()
        return Measurement(self.engine, quality, tuple(speeds), peak, _size(self.served), startup_s)

    def _quality(self) -> Quality:
        windows = self.workload.windows
        scores: list[list[float]] = []
        for start in range(0, len(windows), 8):
            self.progress.note(f"scoring window {start + 1} of {len(windows)}")
            scores += self.worker.score(windows[start : start + 8])
        nll = [-math.fsum(row) for row in scores]
        broken = sum(not math.isfinite(value) for value in nll)
        if broken:
            raise StageError(f"{self.engine} gives log-probabilities that are no numbers in {broken} of {len(nll)} windows")
        return Quality(tuple(nll), tuple(len(row) for row in scores), self.workload.quality_bytes)


def _take_turns(variant: _Side, baseline: _Side, batch_size: int, progress: Progress) -> tuple[Speed, Speed]:
    """Timed rounds, one of each side by turns, so that what slows the machine slows both; who begins alternates too."""
    sides = [variant] if baseline is variant else [variant, baseline]
    timings: dict[_Side, list[Timing]] = {side: [] for side in sides}
    for side in sides:
        side.prepare(batch_size)
    for turn in range(variant.workload.spec.rounds):
        for side in sides if turn % 2 == 0 else reversed(sides):
            timings[side] += side.turn(batch_size)
        progress.step(turn + 1, variant.workload.spec.rounds, **_live(variant, batch_size, timings[variant]))
    return variant.speed(batch_size, timings[variant]), baseline.speed(batch_size, timings[baseline])


def _live(side: _Side, batch_size: int, timings: list[Timing]) -> dict[str, float]:
    tokens = batch_size * side.workload.counted_tokens
    return {f"tokens_per_s_{batch_size}": tokens / median(timing.total_s for timing in timings)}


def _thread_counts(wanted: tuple[int, ...] | None, slow: bool) -> list[int]:
    """Counts to try: 1, 2, 4 ... and all cores, or only 1 and all where each costs tens of seconds.

    The last one stays loaded, so all cores come last: an engine that is slow to switch mostly has a use for them.
    """
    if wanted:
        return list(dict.fromkeys(wanted))
    cores = max(1, min(available_cores(), physical_cores()))
    return sorted({1, cores, *(() if slow else _powers(cores))})


def _powers(cores: int) -> Iterator[int]:
    """1, 2, 4 ... up to `cores`."""
    count = 1
    while count <= cores:
        yield count
        count *= 2


def _same(one: Path, other: Path) -> bool:
    """Whether two served folders hold the same bytes."""
    if one.resolve() == other.resolve():
        return True
    here, there = _files(one), _files(other)
    if here.keys() != there.keys() or any(here[name].stat().st_size != there[name].stat().st_size for name in here):
        return False
    return all(here[name].samefile(there[name]) or filecmp.cmp(here[name], there[name], shallow=False) for name in here)


def _files(folder: Path) -> dict[Path, Path]:
    return {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}


def _size(folder: Path) -> int:
    """Bytes of everything that is served."""
    return sum(path.stat().st_size for path in _files(folder).values())
