"""Measurements of served variants, and their comparison with the baseline."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from featherweight.errors import IntegrityError, StageError
from featherweight.measure.load import Load, worst
from featherweight.measure.references import score
from featherweight.measure.roofline import Roofline
from featherweight.measure.spec import ReferenceMetric
from featherweight.measure.speed import Shape, Speed
from featherweight.measure.statistics import (
    Estimate,
    bootstrap_difference,
    bootstrap_median,
    bootstrap_median_ratio,
    bootstrap_ratio,
    bootstrap_score_difference,
    paired_share_difference,
    share_of,
)
from featherweight.system.device import CPU, Device

FILE = "measurement.json"
OTHERS = "others_cpu_share"
BUSY = 0.1
"""Above this share of the processors, other programs may have made the speeds what they are."""


@dataclass(frozen=True)
class Quality:
    """Per window of text: summed negative log-likelihood in nats, scored tokens, and the UTF-8 bytes that they stand for.

    Of an encoder that answers by vectors or labels `nll` is the loss of each example, which `loss` names (see
    featherweight/measure/agreement.py), and `figures` are what else is known of all of them.
    """

    nll: tuple[float, ...]
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]
    loss: str = "bits_per_byte"
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def of_text(self) -> bool:
        """Whether it is how well text is predicted, so that losses are compared by their ratio."""
        return self.loss == "bits_per_byte"

    @property
    def metrics(self) -> dict[str, float]:
        """Its flat figures."""
        if self.of_text:
            return {"bits_per_byte": self.bits_per_byte, "perplexity": self.perplexity, "windows": len(self.nll)}
        return {self.loss: sum(self.nll) / len(self.nll), **self.figures, "windows": len(self.nll)}

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(sum(self.nll) / sum(self.tokens))

    @property
    def bits_per_byte(self) -> float:
        """Cross-entropy per byte of text: comparable across tokenizers, unlike perplexity."""
        return sum(self.nll) / math.log(2) / sum(self.bytes)


@dataclass(frozen=True)
class Measurement:
    """One served variant on its own engine.

    peak_memory_bytes: what the serving processes held, up to the end of the speed rounds, of the memory that the weights lie in,
    the main one or the GPU's; None where the driver does not tell. On a GPU also peak_host_memory_bytes, and PyTorch's own count,
    peak_tensor_bytes. roofline: what its tokens at batch 1 read, None where memory is not its roof. device: where the engine said
    that it served from. attention: the kernels that PyTorch takes, by pass. answers: its greedy texts, where they were asked for.
    hits: of each benchmark 1.0 for an example that it answered rightly, 0.0 for another. written: its texts that were held against
    references. matches: of each metric of references what adds up to it (references.py), for each of those texts.
    lengths: its speed at other lengths of prompts, one request at a time. loads: under requests that come at a rate.
    """

    engine: str
    quality: Quality
    speeds: tuple[Speed, ...]
    peak_memory_bytes: int | None
    size_bytes: int
    startup_s: float
    roofline: Roofline | None = None
    device: Device = CPU
    attention: Mapping[str, str] = field(default_factory=dict)
    peak_host_memory_bytes: int | None = None
    peak_tensor_bytes: int | None = None
    answers: tuple[str, ...] = ()
    hits: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    written: tuple[str, ...] = ()
    matches: Mapping[ReferenceMetric, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    lengths: tuple[Speed, ...] = ()
    loads: tuple[Load, ...] = ()

    @property
    def timed(self) -> dict[Shape, Speed]:
        """Every speed, by what was timed."""
        return {speed.shape: speed for speed in (*self.speeds, *self.lengths)}

    @property
    def sizes(self) -> dict[str, float]:
        """What it takes of memory, disk and time to start, as far as it is known."""
        keys = ("peak_memory_bytes", "peak_host_memory_bytes", "peak_tensor_bytes", "size_bytes", "startup_s")
        return {key: value for key in keys if (value := getattr(self, key)) is not None}

    def speed(self, batch_size: int) -> Speed:
        """The measurement at a batch size; raises StageError if there is none."""
        for speed in self.speeds:
            if speed.batch_size == batch_size:
                return speed
        measured = ", ".join(str(speed.batch_size) for speed in self.speeds)
        raise StageError(f"batch size {batch_size} was not measured; measured: {measured}")

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Measurement:
        """The inverse of `dataclasses.asdict` and a trip through JSON."""
        told: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in tree["quality"].items()}
        quality = Quality(**told)
        roofline = Roofline(**tree["roofline"]) if tree.get("roofline") else None
        speeds, lengths = (tuple(map(Speed.from_json, tree.get(key, ()))) for key in ("speeds", "lengths"))
        loads = tuple(map(Load.from_json, tree.get("loads", ())))
        texts = {key: tuple(tree.get(key, ())) for key in ("answers", "written")}
        hits = {name: tuple(one) for name, one in tree.get("hits", {}).items()}
        matches = {name: tuple(map(tuple, rows)) for name, rows in tree.get("matches", {}).items()}
        parts = {"quality": quality, "speeds": speeds, "lengths": lengths, "roofline": roofline, "hits": hits, "matches": matches}
        return cls(**{**tree, **parts, **texts, "loads": loads})


@dataclass(frozen=True)
class Plain:
    """A variant with speculation, without it: its speeds by turns with it, at each batch size. tokens_per_pass: so many
    are written in a pass over a text with it, by batch size; empty where the engine does not tell.
    """

    speeds: tuple[Speed, ...]
    tokens_per_pass: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Plain:
        """The inverse of `dataclasses.asdict` and a trip through JSON."""
        written = {int(batch): float(tokens) for batch, tokens in tree["tokens_per_pass"].items()}
        return cls(tuple(map(Speed.from_json, tree["speeds"])), written)


@dataclass(frozen=True)
class Comparison:
    """A variant beside the baseline that ran in turns with it: round i of one is paired with round i of the other.

    plain: what a variant with speculation is without it. others: the share of the processors that other programs took meanwhile;
    None where that was not looked at.
    """

    variant: Measurement
    baseline: Measurement
    machine: str = ""
    plain: Plain | None = None
    others: float | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether either side was served from a GPU."""
        return any(side.device != CPU for side in (self.variant, self.baseline))

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes that were measured."""
        return tuple(speed.batch_size for speed in self.variant.speeds)

    def speedup(self, batch_size: int) -> Estimate:
        """How many times faster than the baseline, by the median over paired rounds."""
        return bootstrap_median_ratio(
            self.baseline.speed(batch_size).rounds_s, self.variant.speed(batch_size).rounds_s, seed=batch_size
        )

    @cached_property
    def quality_change(self) -> Estimate:
        """Relative change of bits per byte, or difference of another loss, paired by window; worse is positive."""
        if self.variant.quality.bytes != self.baseline.quality.bytes:
            raise StageError("the variant and the baseline were scored on different windows; evaluate both anew")
        losses = self.variant.quality.nll, self.baseline.quality.nll
        return bootstrap_ratio(*losses).shifted(-1.0) if self.variant.quality.of_text else bootstrap_difference(*losses)

    @cached_property
    def changed_answers(self) -> Estimate | None:
        """The share of the greedy texts that are not the baseline's; None where none were asked for."""
        ours, theirs = self.variant.answers, self.baseline.answers
        if len(ours) != len(theirs):
            raise StageError("the variant and the baseline were asked different things; evaluate both anew")
        return share_of(sum(one != other for one, other in zip(ours, theirs, strict=True)), len(ours)) if ours else None

    @cached_property
    def accuracy_changes(self) -> dict[str, Estimate]:
        """Of each benchmark the accuracy less the baseline's, paired by example; worse is negative."""
        ours, theirs = self.variant.hits, self.baseline.hits
        if ours.keys() != theirs.keys():
            raise StageError("the variant and the baseline ran different benchmarks; evaluate both anew")
        return {name: paired_share_difference(ours[name], theirs[name]) for name in ours}

    def _accuracy(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name, change in self.accuracy_changes.items():
            found = self.variant.hits[name]
            figures |= _bounded(f"accuracy_{name}", share_of(round(sum(found)), len(found)))
            figures |= _bounded(f"accuracy_change_{name}", change)
        if self.accuracy_changes:
            figures |= _bounded("accuracy_loss", _worst_loss(self.accuracy_changes.values()))
        return figures

    @cached_property
    def reference_changes(self) -> dict[ReferenceMetric, Estimate]:
        """Of each metric of references the score less the baseline's, in points of 100, paired by text; worse is negative."""
        ours, theirs = self.variant.matches, self.baseline.matches
        if {name: len(rows) for name, rows in ours.items()} != {name: len(rows) for name, rows in theirs.items()}:
            raise StageError("the variant and the baseline were held against different references; evaluate both anew")
        return {name: bootstrap_score_difference(ours[name], theirs[name], partial(score, name)) for name in ours}

    def _near_references(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name, change in self.reference_changes.items():
            figures[name] = score(name, [math.fsum(column) for column in zip(*self.variant.matches[name], strict=True)])
            figures |= _bounded(f"{name}_change", change)
        if self.reference_changes:
            figures |= _bounded("reference_loss", _worst_loss(self.reference_changes.values()))
            figures["references"] = len(self.variant.written)
        return figures

    def _speculation(self) -> dict[str, float]:
        """What speculation gains, by `speculation_speedup_N`, and `tokens_per_pass_N`."""
        figures: dict[str, float] = {}
        for plain in self.plain.speeds if self.plain else ():
            batch = plain.batch_size
            faster = bootstrap_median_ratio(plain.rounds_s, self.variant.speed(batch).rounds_s, seed=batch)
            figures |= _bounded(f"speculation_speedup_{batch}", faster)
        told = self.plain.tokens_per_pass if self.plain else {}
        return figures | {f"tokens_per_pass_{batch}": tokens for batch, tokens in told.items()}

    def _lengths(self) -> dict[str, float]:
        """Of each other length of prompts, by `_prompt_N`."""
        figures: dict[str, float] = {}
        for speed in self.variant.lengths:
            theirs, at = self.baseline.timed.get(speed.shape), f"prompt_{speed.prompt_tokens}"
            if theirs is None:
                raise StageError("the variant and the baseline were timed at different lengths; evaluate both anew")
            sooner = bootstrap_median_ratio(theirs.rounds_ttft_s, speed.rounds_ttft_s, seed=speed.prompt_tokens)
            figures |= _bounded(f"ttft_speedup_{at}", sooner) | _named(speed, at)
            figures[f"noise_{at}"] = theirs.noise
        return figures

    def _loads(self) -> dict[str, float]:
        """Of each rate of requests, by `_rate_N`, and the longest waits at any, by `_requests`; what has no end is left out."""
        figures: dict[str, float] = {}
        loads, theirs = self.variant.loads, self.baseline.loads
        if [(load.rate, len(load.requests)) for load in loads] != [(load.rate, len(load.requests)) for load in theirs]:
            raise StageError("the variant and the baseline were asked at different rates; evaluate both anew")
        for load in loads:
            for name, estimate in load.estimates.items():
                figures |= _bounded(f"{name}_{load.at}", estimate)
            figures |= {f"{name}_{load.at}": value for name, value in load.rates.items()}
        for name in loads[0].estimates if loads else ():
            if name != "done":
                figures |= _bounded(f"{name}_requests", worst([load.estimates[name] for load in loads]))
        figures |= {"threads_requests": loads[0].threads} if loads else {}
        if loads and (batching := loads[0].batching):
            figures |= {"max_batch_requests": batching.max_batch, "batch_window_s_requests": batching.window_s}
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    def metrics(self) -> dict[str, float]:
        """Everything as flat figures: N in a name is a batch size, behind `prompt_` the tokens of a prompt, behind `rate_` requests
        a second.

        `_low` and `_high` bound a 95 % confidence interval.
        """
        variant = self.variant
        figures: dict[str, float] = variant.quality.metrics
        figures |= _bounded("quality_change", self.quality_change)
        if self.changed_answers:
            figures |= _bounded("changed_answers", self.changed_answers) | {"answers": len(variant.answers)}
        figures |= self._accuracy()
        figures |= self._near_references()
        figures |= {"on_gpu": variant.device != CPU, "baseline_on_gpu": self.baseline.device != CPU} if self.on_gpu else {}
        figures |= variant.sizes
        for batch_size in self.batch_sizes:
            figures |= _bounded(f"speedup_{batch_size}", self.speedup(batch_size))
            figures |= _named(variant.speed(batch_size), str(batch_size))
            figures[f"noise_{batch_size}"] = self.baseline.speed(batch_size).noise
        figures |= self._speculation() | self._lengths() | self._loads()
        figures |= {} if self.others is None else {OTHERS: self.others}
        if variant.roofline and 1 in self.batch_sizes:
            figures["roofline_1"] = variant.roofline.share(variant.speed(1).tokens_per_s)
            figures |= asdict(variant.roofline)
        return {key: float(value) for key, value in figures.items()}

    def write(self, folder: Path) -> None:
        """Write `folder/measurement.json`: every raw figure of both sides, and the metrics made of them."""
        tree = asdict(self) | {"metrics": self.metrics()}
        (folder / FILE).write_text(json.dumps(tree, indent=1))

    @classmethod
    def read(cls, folder: Path) -> Comparison:
        """Read what `write` wrote; raises IntegrityError where there is nothing, or nothing sensible."""
        try:
            tree = json.loads((folder / FILE).read_text())
            variant, baseline = (Measurement.from_json(tree[side]) for side in ("variant", "baseline"))
            plain = Plain.from_json(tree["plain"]) if tree.get("plain") else None
            return cls(variant, baseline, tree["machine"], plain, tree.get("others"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{folder / FILE} is no measurement ({error}); evaluate the variant anew") from error


def read_metrics(folder: Path) -> dict[str, float]:
    """The flat figures that `Comparison.write` left in a folder; raises IntegrityError where there are none."""
    try:
        return {str(key): float(value) for key, value in json.loads((folder / FILE).read_text())["metrics"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{folder / FILE} holds no metrics ({error}); evaluate the variant anew") from error


def busy_note(metrics: Mapping[str, float]) -> str | None:
    """What is to be known of speeds that were measured beside other programs; None on a quiet machine."""
    if metrics.get(OTHERS, 0.0) <= BUSY:
        return None
    return f"other programs took over {BUSY:.0%} of the processors while it was timed: on a quiet machine its speeds may be others"


def _worst_loss(changes: Iterable[Estimate]) -> Estimate:
    """What may be lost where the most may: the change of the lowest bound, turned round."""
    worst = min(changes, key=lambda change: change.low)
    return Estimate(0.0 - worst.value, 0.0 - worst.high, 0.0 - worst.low)  # where -0.0 would be shown as a gain


def _bounded(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _named(speed: Speed, at: str) -> dict[str, float]:
    """The figures of a speed, `at` behind each name."""
    figures = {f"{key}_{at}": value for key, value in speed.figures.items()}
    return figures | _bounded(f"ttft_s_{at}", bootstrap_median(speed.by_round(speed.ttft_s), seed=speed.prompt_tokens))
