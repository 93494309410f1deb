"""What is to be done next about an arrival: taken once, followed up when it died, given up with the reason."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta

import pytest

from featherweight.recipe.recipe import Recipe
from tasks.claims import LONGEST_WAIT, Claim, Patience, Try, claim_key, is_lost

NOW = datetime(2026, 11, 26, tzinfo=UTC)
PATIENCE = Patience(tries=3, crashes=4, backoff_s=60)
RECIPE = {"name": "x", "checkpoint": {"source": "a"}, "data": {"source": "text"}, "promote": {"model": "x"}}


def claim(*states: str) -> Claim:
    """A claim whose tries ended in these states, a minute apart, the last one now."""
    begin = NOW - timedelta(minutes=len(states) - 1)
    tries = [Try(n + 1, f"run-{n}", state, begin + timedelta(minutes=n)) for n, state in enumerate(states)]
    return Claim("key", "x", tuple(tries))


@pytest.mark.parametrize(
    ("states", "status", "wait_s"),
    [
        ((), "new", 0),
        (("SCHEDULED",), "queued", None),
        (("PENDING",), "running", None),
        (("RUNNING",), "running", None),
        (("COMPLETED",), "done", None),
        (("CANCELLED",), "cancelled", None),
        (("FAILED",), "failed", 60),
        (("FAILED", "FAILED"), "failed", 240),
        (("FAILED", "FAILED", "FAILED"), "quarantined", None),
        (("CRASHED",), "crashed", 0),
        (("CRASHED", "CRASHED"), "crashed", 60),
        (("CRASHED", "FAILED", "CRASHED", "COMPLETED"), "done", None),
        (("CRASHED",) * 4, "quarantined", None),
    ],
)
def test_what_is_next(states: tuple[str, ...], status: str, wait_s: float | None) -> None:
    found = claim(*states)
    assert found.status(PATIENCE) == status
    due = found.next_try(PATIENCE, NOW)
    assert due == (None if wait_s is None else (len(states) + 1, NOW + timedelta(seconds=wait_s)))


def test_the_wait_has_an_end() -> None:
    due = claim(*["FAILED"] * 30).next_try(Patience(tries=100), NOW)
    assert due == (31, NOW + LONGEST_WAIT)


@pytest.mark.parametrize("states", list(itertools.product(("FAILED", "CRASHED"), repeat=4)))
def test_whatever_happens_it_ends(states: tuple[str, ...]) -> None:
    """Each look makes at most one try, of the next number; in the end there is none."""
    lived: list[str] = []
    for state in itertools.cycle(states):
        due = claim(*lived).next_try(PATIENCE, NOW)
        if due is None:
            break
        assert due[0] == len(lived) + 1
        lived.append(state)
    assert claim(*lived).status(PATIENCE) == "quarantined" and len(lived) <= PATIENCE.tries + PATIENCE.crashes


@pytest.mark.parametrize(
    ("state", "running", "silent_s", "lost"),
    [
        ("RUNNING", True, 10_000, False),
        ("RUNNING", False, 0, True),
        ("RUNNING", None, 80, False),
        ("RUNNING", None, 100, True),
        ("PENDING", None, 100, False),
        ("PENDING", None, 130, True),
        ("SCHEDULED", False, 10_000, False),
        ("COMPLETED", False, 10_000, False),
    ],
)
def test_which_tries_have_lost_their_process(state: str, running: bool | None, silent_s: float, lost: bool) -> None:
    last = claim(state).tries[-1]
    assert is_lost(last, Patience(silent_s=90), running, NOW - timedelta(seconds=silent_s), NOW) == lost


def test_the_key_is_of_what_the_recipe_says_and_of_the_content() -> None:
    """Not of where the checkpoint lies, nor of the defaults that a later version adds."""

    class Later(Recipe):
        novelty: int = 3

    key = claim_key(Recipe.model_validate(RECIPE), "content")
    moved = Recipe.model_validate({**RECIPE, "checkpoint": {"source": "b"}})
    assert claim_key(moved, "content") == claim_key(Later.model_validate(RECIPE), "content") == key
    assert claim_key(moved, "other") != key
    assert claim_key(Recipe.model_validate({**RECIPE, "seed": 1}), "content") != key
