"""Which ways of answering together are tried, and which is taken."""

from __future__ import annotations

from featherweight.measure.batching import Batching, Trial, best_batching, tried
from featherweight.measure.request import Request


def answered(wait_s: float, gap_s: float = 1.0) -> list[Request]:
    return [Request(gap_s * at, None, gap_s * at + wait_s) for at in range(4)]


def test_the_sizes_are_tried_without_a_window_and_the_windows_with_the_best_of_them():
    waits = {(8, 0.0): 3.0, (1, 0.0): 4.0, (4, 0.0): 2.0, (4, 0.01): 1.5, (4, 0.1): 2.5}
    trials = tried((1, 8, 4, 8), (0.1, 0.0, 0.01), lambda one: answered(waits[one.max_batch, one.window_s]), patience_s=9.0)
    assert {(one.batching.max_batch, one.batching.window_s): one.wait_s for one in trials} == waits
    assert best_batching(trials) == Batching(4, 0.01)


def test_no_window_is_tried_where_one_by_one_is_best_and_nothing_where_there_is_no_choice():
    trials = tried((1, 8), (0.0, 0.01), lambda one: answered(float(one.max_batch) + 1), patience_s=99.0)
    assert [one.batching for one in trials] == [Batching(8), Batching(1)]
    assert tried((8,), (0.01,), lambda one: answered(1.0), patience_s=9.0) == ()


def test_where_no_two_requests_meet_the_first_trial_is_the_last():
    trials = tried((1, 8), (0.0, 0.01), lambda one: answered(0.4), patience_s=9.0)
    assert best_batching(trials) == Batching(8) and len(trials) == 1


def test_of_those_that_are_level_the_largest_batch_with_the_shortest_window_is_taken_and_who_was_given_up_has_waited():
    trials = [Trial(Batching(1), 1.0), Trial(Batching(8, 0.01), 1.04), Trial(Batching(8), 1.05), Trial(Batching(16), 1.2)]
    assert best_batching(trials) == Batching(8)
    given_up = tried((1, 8), (0.0,), lambda one: [Request(0.0, None, None), *answered(1.0)], patience_s=6.0)
    assert [one.wait_s for one in given_up] == [2.0, 2.0]
