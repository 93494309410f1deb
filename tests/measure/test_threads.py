"""Numbers of threads: which are tried, and which is best."""

from __future__ import annotations

import math

import pytest

from featherweight.measure import threads
from featherweight.measure.threads import best_count, best_latency_s, common_count, thread_counts


@pytest.mark.parametrize(
    ("cores", "slow", "counts"),
    [(1, False, [1]), (2, False, [1, 2]), (2, True, [1, 2]), (6, False, [1, 2, 4, 6]), (8, False, [1, 2, 4, 8]), (8, True, [1, 8])],
)
def test_counts_to_try(monkeypatch, cores, slow, counts):
    monkeypatch.setattr(threads, "physical_cores", lambda: cores)
    monkeypatch.setattr(threads, "available_cores", lambda: 2 * cores)
    assert thread_counts(None, slow) == counts
    assert thread_counts((3, 1, 3), slow) == [3, 1]


def test_of_counts_that_are_as_good_the_smallest_is_taken():
    assert best_count({1: (1.0, 0.9), 2: (0.5, 0.6), 4: (0.49,)}) == 2
    assert best_count({1: (0.5,), 2: (25.0,)}) == 1
    assert best_latency_s({1: (0.5,), 2: (25.0, 0.4)}) == 0.4
    assert best_latency_s({}) == math.inf


def test_one_count_for_all_where_it_is_near_the_best_of_each():
    one, eight = {1: (1.0, 1.1), 2: (1.05,)}, {1: (3.0,), 2: (2.0, 2.5)}
    assert common_count([one, eight]) == 2
    assert common_count([{1: (1.0,), 2: (1.3,)}, eight]) is None
    assert common_count([one, {}]) is None and common_count([]) is None
    assert common_count([one, one]) == 1
