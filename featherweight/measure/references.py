"""How near texts come to their references, in points of 100: corpus BLEU and chrF by sacrebleu, mean F of ROUGE-L by rouge-score.

Each is a function of figures that add up over the texts, so that a bootstrap draws texts without reading them again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from featherweight.errors import DataError, ToolchainError
from featherweight.measure.spec import ReferenceMetric, WorkloadSpec

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric

PACKAGES: dict[ReferenceMetric, str] = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge_l": "rouge_score"}
"""The package that says what each metric is."""


class References:
    """The packages that hold texts against references, as a part of a measurement."""

    libraries = ("sacrebleu", "rouge-score")


def require(spec: WorkloadSpec) -> None:
    """Raise ToolchainError where a package is not installed that one of the workload's metrics takes."""
    for package in _packages(spec):
        if find_spec(package) is None:
            raise ToolchainError(
                f"workload.references: {package.replace('_', '-')} is not installed; pip install 'featherweight[benchmarks]'"
            )


def fingerprint(spec: WorkloadSpec) -> str | None:
    """Of the packages that score the workload's texts; None where it has no references. Raises as `require` does."""
    require(spec)
    return json.dumps([[package, version(package)] for package in _packages(spec)]) if spec.references else None


def _packages(spec: WorkloadSpec) -> list[str]:
    return sorted({PACKAGES[metric] for metric in spec.references.metrics}) if spec.references else []


def matches(metric: ReferenceMetric, texts: Sequence[str], references: Sequence[str]) -> tuple[tuple[float, ...], ...]:
    """For each text what `score` takes, summed over all of them. Raises DataError for references that the metric cannot read."""
    if metric == "rouge_l":
        return _longest_common(texts, references)
    return tuple(map(tuple, _sacrebleu(metric)._extract_corpus_statistics(texts, [references])))


def score(metric: ReferenceMetric, sums: Sequence[float]) -> float:
    """The metric over all texts, 0 to 100, from the sum of their `matches`."""
    if metric == "rouge_l":
        return 100 * sums[0] / sums[1]
    return float(_sacrebleu(metric)._compute_score_from_stats(list(sums)).score)


def _longest_common(texts: Sequence[str], references: Sequence[str]) -> tuple[tuple[float, ...], ...]:
    """ROUGE-L's F of each text, and a one to count it."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    if not any(scorer.score(text, text)["rougeL"].fmeasure for text in references):
        raise DataError("workload.references: rouge_l reads words of a-z and 0-9 alone, and no target has one; take chrf")
    return tuple((scorer.score(wanted, text)["rougeL"].fmeasure, 1.0) for text, wanted in zip(texts, references, strict=True))


def _sacrebleu(metric: ReferenceMetric) -> Metric:
    """sacrebleu's own, as its command has them by default."""
    from sacrebleu.metrics import BLEU, CHRF

    return BLEU() if metric == "bleu" else CHRF()
