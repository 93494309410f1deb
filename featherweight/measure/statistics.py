"""Estimates with confidence intervals: the bootstrap (Efron 1979, percentile intervals), seeded; of shares, Wilson's (1927)
and, of their differences, Agresti and Min's (2005); of far quantiles, those of the order statistics, of as many values as would
say as much if they knew nothing of each other.

A bootstrap of answers that are all alike has an interval without width, however few they are; a share's has not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil, sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from featherweight.errors import StageError

if TYPE_CHECKING:
    from numpy import ndarray

RESAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure with the bounds of its confidence interval."""

    value: float
    low: float
    high: float

    def shifted(self, by: float) -> Estimate:
        """The estimate of the same quantity plus a constant."""
        return Estimate(self.value + by, self.low + by, self.high + by)


def bootstrap_ratio(
    a: Sequence[float],
    b: Sequence[float],
    paired: bool = True,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """mean(a) / mean(b) with a percentile bootstrap interval. paired: a[i] and b[i] belong together and are drawn together."""
    import numpy

    first, second = _samples(a, b, paired)
    draw = numpy.random.default_rng(seed)
    here = draw.integers(0, len(first), (resamples, len(first)))
    there = here if paired else draw.integers(0, len(second), (resamples, len(second)))
    ratios = first[here].mean(1) / second[there].mean(1)
    return _estimate(float(first.mean() / second.mean()), ratios, confidence)


def bootstrap_difference(
    a: Sequence[float], b: Sequence[float], *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> Estimate:
    """Mean of a[i] - b[i] with a percentile bootstrap interval."""
    import numpy

    first, second = _samples(a, b, paired=True)
    differences = first - second
    drawn = numpy.random.default_rng(seed).integers(0, len(first), (resamples, len(first)))
    return _estimate(float(differences.mean()), differences[drawn].mean(1), confidence)


def bootstrap_median_ratio(
    a: Sequence[float], b: Sequence[float], *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> Estimate:
    """Median of a[i] / b[i] over paired rounds: what disturbs one round only moves nothing. Interval as `bootstrap_ratio`."""
    import numpy

    first, second = _samples(a, b, paired=True)
    ratios = first / second
    drawn = numpy.random.default_rng(seed).integers(0, len(ratios), (resamples, len(ratios)))
    return _estimate(float(numpy.median(ratios)), numpy.median(ratios[drawn], axis=1), confidence)


def bootstrap_median(
    rounds: Sequence[Sequence[float]], *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> Estimate:
    """Median of all values. Interval as `bootstrap_ratio`; the equally long rounds are drawn whole, as what disturbs one value
    disturbs its neighbours."""
    import numpy

    values = numpy.asarray(rounds, dtype=float)
    drawn = numpy.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    return _estimate(float(numpy.median(values)), numpy.median(values[drawn].reshape(resamples, -1), axis=1), confidence)


def bootstrap_score_difference(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    score: Callable[[Sequence[float]], float],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """score(sum of a's rows) - score(sum of b's rows) with a percentile bootstrap interval; a[i] and b[i] are drawn together.

    For scores of a whole corpus that are no means over its texts: Koehn (2004), Statistical Significance Tests for Machine
    Translation Evaluation.
    """
    import numpy

    first, second = _samples(a, b, paired=True)
    often = numpy.random.default_rng(seed).multinomial(len(first), numpy.full(len(first), 1 / len(first)), resamples)
    sides = zip((often @ first).tolist(), (often @ second).tolist(), strict=True)
    differences = numpy.array([score(ours) - score(theirs) for ours, theirs in sides])
    return _estimate(score(first.sum(0).tolist()) - score(second.sum(0).tolist()), differences, confidence)


def share_of(hits: float, trials: float, *, confidence: float = CONFIDENCE) -> Estimate:
    """hits / trials with Wilson's score interval. Raises StageError for no trials.

    Both may be fractions, of trials that are not independent: see `correlation_time`.
    """
    if not trials:
        raise StageError("a share of nothing cannot be told")
    value, z = hits / trials, _deviations(confidence)
    spread = z * sqrt(value * (1 - value) / trials + z**2 / (4 * trials**2))
    low, high = ((value + z**2 / (2 * trials) + side * spread) / (1 + z**2 / trials) for side in (-1, 1))
    return Estimate(value, 0.0 if hits == 0 else low, 1.0 if hits == trials else high)


def paired_share_difference(a: Sequence[float], b: Sequence[float], *, confidence: float = CONFIDENCE) -> Estimate:
    """The share of hits in `a` less that in `b`, of 1.0 and 0.0 at the same trials, with the interval of Agresti and Min (2005).

    Theirs is Wald's after half a trial more of each of the four outcomes, so that it has a width where no two trials differ.
    """
    if not a or len(a) != len(b):
        raise StageError(f"cannot compare {len(a)} trials with {len(b)}: both must have some, and as many")
    gained, lost = (sum(one > other for one, other in pairs) + 0.5 for pairs in (zip(a, b, strict=True), zip(b, a, strict=True)))
    trials = len(a) + 2
    middle = (gained - lost) / trials
    spread = _deviations(confidence) * sqrt(max(0.0, gained + lost - (gained - lost) ** 2 / trials)) / trials
    value = (sum(a) - sum(b)) / len(a)
    return Estimate(value, min(value, middle - spread), max(value, middle + spread))


def quantile_estimate(runs: Sequence[Sequence[float]], share: float, *, confidence: float = CONFIDENCE) -> Estimate:
    """The smallest value that a `share` of all values does not exceed, with the interval of the order statistics.

    runs: series in the order of time, whose values may be infinite. Nothing is supposed of how they are spread (Conover, Practical
    Nonparametric Statistics, 3.2). What waits in one line waits together, so of `correlation_time` neighbours one counts:
    the longer one of that of the ranks and that of being above the quantile. The bounds are values again, and infinite below or
    above where there are too few of them. Raises StageError for none.
    """
    from scipy.stats import binom, rankdata

    values = list(chain.from_iterable(runs))
    if not values:
        raise StageError("a quantile of nothing cannot be told")
    ordered, count = sorted(values), len(values)
    value = ordered[max(1, ceil(round(share * count, 9))) - 1]
    ranks = iter(rankdata(values).tolist())
    above = [[float(one > value) for one in run] for run in runs]
    together = max(correlation_time(above), correlation_time([[next(ranks) for _ in run] for run in runs]))
    independent, tail = max(1, int(count / together)), (1 - confidence) / 2
    low, high = int(binom.ppf(tail, independent, share)), int(binom.isf(tail, independent, share)) + 1
    first = ordered[low * count // independent - 1] if low else -math.inf
    last = ordered[min(count, ceil(high * count / independent)) - 1] if high <= independent else math.inf
    return Estimate(value, first, last)


def correlation_time(runs: Sequence[Sequence[float]]) -> float:
    """Of how many neighbours in a series as many as one say something new: 1 + 2 * the sum of the autocorrelations, at least 1.

    Summed while two neighbouring lags together are positive, and never growing: Geyer (1992), Practical Markov Chain Monte Carlo,
    3.3. runs: series of one process, each in the order of time; their mean is one.
    """
    import numpy

    mean = numpy.concatenate([numpy.asarray(run, dtype=float) for run in runs]).mean()
    series = [numpy.asarray(run, dtype=float) - mean for run in runs]
    total = sum(float(one @ one) for one in series)
    time, least = -1.0, math.inf
    for lag in range(0, max(map(len, series)) - 1, 2) if total else ():
        pair = sum(float(one[: len(one) - k] @ one[k:]) for one in series for k in (lag, lag + 1) if k < len(one)) / total
        if (least := min(least, pair)) <= 0:
            break
        time += 2 * least
    return max(1.0, time)


def values_to_show(share: float, *, confidence: float = CONFIDENCE) -> int:
    """How many independent values it takes until the interval of `quantile_estimate` ends above (0 to 1, both excluded)."""
    return ceil(math.log((1 - confidence) / 2) / math.log(share))


def trials_to_show(share: float, *, confidence: float = CONFIDENCE) -> int:
    """How many trials without a hit it takes until the interval of `share_of` ends at `share` (0 to 1, both excluded)."""
    return ceil(_deviations(confidence) ** 2 * (1 - share) / share)


def examples_to_show(loss: float, *, confidence: float = CONFIDENCE) -> int:
    """How many examples, all answered alike, it takes until the interval of `paired_share_difference` ends at `loss`."""
    return max(1, ceil(_deviations(confidence) / loss - 2))


def _deviations(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _samples(a: Sequence[Any], b: Sequence[Any], paired: bool) -> tuple[ndarray, ndarray]:
    import numpy

    if not a or not b or (paired and len(a) != len(b)):
        raise StageError(f"cannot compare {len(a)} samples with {len(b)}: both must have some, paired ones as many")
    return numpy.asarray(a, dtype=float), numpy.asarray(b, dtype=float)


def _estimate(value: float, resampled: ndarray, confidence: float) -> Estimate:
    """The percentile interval, widened to hold the estimate itself where rounding would leave it just outside."""
    import numpy

    low, high = numpy.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, min(float(low), value), max(float(high), value))
