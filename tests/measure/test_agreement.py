"""Quality of encoders' answers against what is worked out by hand."""

from __future__ import annotations

import numpy
import pytest

from featherweight.measure.agreement import label_quality, score_quality

THEIRS = [0.0, 1.0, 4.0, 5.0]


def rows(numbers: list[float]) -> list[list[list[float]]]:
    """As a head with one label answers: its logit beside a zero."""
    return [[[0.0, number]] for number in numbers]


def test_a_number_is_judged_on_its_own_scale() -> None:
    ours = [0.0, 1.0, 4.0, 4.0]
    found = score_quality(rows(ours), rows(THEIRS), (1,) * 4)
    assert found.loss == "score_error"
    assert numpy.mean(found.nll) == pytest.approx(0.25 / numpy.var(THEIRS))
    as_labels = [label_quality(rows(one), rows(THEIRS), [[]] * 4, (1,) * 4, single=True) for one in (ours, THEIRS)]
    lost = numpy.mean(as_labels[0].nll) - numpy.mean(as_labels[1].nll)
    assert lost < 0.05 * numpy.mean(found.nll), "a sigmoid hides what happens far from zero"


def test_saying_the_mean_each_time_costs_all_of_it() -> None:
    found = score_quality(rows([2.5] * 4), rows(THEIRS), (1,) * 4)
    assert numpy.mean(found.nll) == pytest.approx(1)


def test_the_original_itself_costs_nothing_and_numbers_that_never_vary_are_told_apart() -> None:
    assert score_quality(rows(THEIRS), rows(THEIRS), (1,) * 4).nll == (0.0,) * 4
    assert numpy.mean(score_quality(rows([1.0, 2.0]), rows([1.0, 1.0]), (1, 1)).nll) > 1e9
