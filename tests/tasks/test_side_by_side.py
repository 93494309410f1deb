"""Stages side by side: each on a place of its own, measurements alone, nothing before its inputs."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections import Counter

import pytest

from featherweight.errors import RecipeError
from featherweight.recipe.plan import Node, Plan
from featherweight.spec import Spec
from featherweight.system import device
from featherweight.system.device import CPU, CUDA, Place, place_in_use, places
from tasks.outcome import Outcome, Outcomes
from tasks.side_by_side import run_nodes
from tasks.stopping import stopped


def plan(where: str) -> Plan:
    """Two exports of a checkpoint, each measured, and what decides between them."""
    both = {"device": where}
    nodes = [
        Node("load", "load", "", Spec(), {}),
        Node("a", "export", "", Spec(), {"checkpoint": "load"}, **both),
        Node("b", "export", "", Spec(), {"checkpoint": "load"}, **both),
        Node("a/evaluate", "evaluate", "", Spec(), {"served": "a"}, engines=("x",), **both),
        Node("b/evaluate", "evaluate", "", Spec(), {"served": "b"}, engines=("x",), **both),
        Node("decide", "decide", "", Spec(), {"a": "a/evaluate", "b": "b/evaluate"}),
    ]
    return Plan({node.id: node for node in nodes}, (), {})


class Seen:
    """What ran at the same time as what, and where; two exports, and two measurements on GPUs, wait for each other."""

    def __init__(self, *together: str) -> None:
        self.together, self.barrier = together, threading.Barrier(2)
        self.running: set[str] = set()
        self.most, self.where = Counter[str](), dict[str, Place | None]()
        self.lock = threading.Lock()

    def __call__(self, node: Node, outcomes: Outcomes) -> Outcome:
        assert set(node.inputs.values()) <= outcomes.keys()
        with self.lock:
            self.running.add(node.id)
            self.where[node.id] = place_in_use()
            for id in self.running:
                self.most[id] = max(self.most[id], len(self.running))
        if node.id in self.together:
            self.barrier.wait(120)
        with self.lock:
            self.running.remove(node.id)
        return Outcome(node.id, "done", {})


def test_on_a_cpu_two_exports_overlap_and_measurements_are_alone() -> None:
    seen = Seen("a", "b")
    found = run_nodes(plan(CPU), seen, [Place(None, 2)] * 2)
    assert list(found) == list(plan(CPU).nodes)
    assert seen.most == {"load": 1, "a": 2, "b": 2, "a/evaluate": 1, "b/evaluate": 1, "decide": 1}
    assert seen.where["load"] is None and seen.where["a"] == Place(None, 2)


def test_no_measurement_begins_while_another_stage_may() -> None:
    """One that had begun would wait for its machine with what it has taken idle."""
    order: list[str] = []

    def run(node: Node, outcomes: Outcomes) -> Outcome:
        order.append(node.id)
        return Outcome(node.id, "done", {})

    nodes = plan(CPU).nodes
    nodes["b"] = Node("b", "export", "", Spec(), {"checkpoint": "b+finetune"}, device=CPU)
    nodes["b+finetune"] = Node("b+finetune", "finetune", "", Spec(), {"checkpoint": "b/prune"}, device=CPU)
    nodes["b/prune"] = Node("b/prune", "prune", "", Spec(), {"checkpoint": "load"}, device=CPU)
    for several in [Place(None, 2)] * 2, [Place("0", 2), Place("1", 2)]:
        order.clear()
        run_nodes(Plan(nodes, (), {}), run, several, lambda node, of: 1)
        assert {*order[-3:-1]} == {"a/evaluate", "b/evaluate"} and order[-1] == "decide"


def test_on_gpus_each_stage_and_each_measurement_has_one_to_itself() -> None:
    seen = Seen("a", "b", "a/evaluate", "b/evaluate")
    run_nodes(plan(CUDA), seen, [Place("0", 2), Place("1", 2)])
    for pair in ("a", "b"), ("a/evaluate", "b/evaluate"):
        assert {seen.where[id].gpu for id in pair} == {"0", "1"}


def test_one_place_runs_them_one_after_the_other_here() -> None:
    seen = Seen()
    run_nodes(plan(CPU), seen, [Place(None, 1)])
    assert set(seen.most.values()) == {1} and set(seen.where.values()) == {None}


def test_an_error_that_ends_the_run_is_raised() -> None:
    def fails(node: Node, outcomes: Outcomes) -> Outcome:
        raise RecipeError(f"{node.id} is essential")

    with pytest.raises(RecipeError, match="load is essential"):
        run_nodes(plan(CPU), fails, [Place(None, 2)] * 2)


def test_what_ends_the_run_ends_the_processes_of_the_others() -> None:
    """A stage whose process was ended has not failed: it is told so, and keeps what it resumes from."""
    told, works = list[object](), threading.Event()

    def run(node: Node, outcomes: Outcomes) -> Outcome:
        if node.id == "a":
            # Like a stage's process by its arguments alone.
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "featherweight.training.launch"])
            works.set()
            told.extend([child.wait(), stopped()])
        if node.id == "b":
            assert works.wait(120)
            raise KeyboardInterrupt
        return Outcome(node.id, "done", {})

    with pytest.raises(KeyboardInterrupt):
        run_nodes(plan(CPU), run, [Place(None, 2)] * 2)
    assert told == [-signal.SIGKILL, True]
    assert not stopped()


def test_places_are_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "resolve", lambda: CUDA)
    monkeypatch.setattr(device, "gpus", lambda: ("some", "other"))
    assert places() == (Place(None, 1),)
    monkeypatch.setenv("FEATHERWEIGHT_SIDE_BY_SIDE", "auto")
    assert places() == (Place("0", 2), Place("1", 2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [place.gpu for place in places()] == ["3", "5"]
    with device.using(CUDA), device.at(places()[1]):
        assert device.told() == {"FEATHERWEIGHT_DEVICE": CUDA, "CUDA_VISIBLE_DEVICES": "5"}
    monkeypatch.setenv("FEATHERWEIGHT_SIDE_BY_SIDE", "3")
    with pytest.raises(RecipeError, match="3, and 2 GPUs are in reach"):
        places()
    monkeypatch.setattr(device, "resolve", lambda: CPU)
    assert places() == (Place(None, 3),) * 3
