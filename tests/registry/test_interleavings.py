"""Every interleaving of writers on a store with MLflow's atomic operations, each of them killed at every place.

The writers run the registry's own loops and decisions; only the store is a dictionary, and a scheduler says who goes on.
All states that any schedule reaches are visited (with FEATHERWEIGHT_SWEEP=1 the widest cases too: minutes). A killed writer
is one that takes no further step, so that what holds in every state, whoever goes on from there, holds for kills at every
place too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import greenlet
import pytest

from featherweight.errors import GateError
from featherweight.registry import commit as commits
from featherweight.registry.commit import Cell, Unsure, commit, complete
from featherweight.registry.decisions import rollback_decision, transition_decision
from featherweight.registry.history import Entry
from featherweight.registry.versions import MARK, RegisteredModel

pytestmark = pytest.mark.slow

ALL = frozenset({Cell("alias", "champion"), Cell("mark", "")})
SOME = ALL if "FEATHERWEIGHT_SWEEP" in os.environ else frozenset({Cell("alias", "champion")})
NONE = ALL if "FEATHERWEIGHT_SWEEP" in os.environ else frozenset()
Cells = tuple[tuple[Cell, str], ...]
Stored = tuple[str, ...]


def model_of(cells: Cells, stored: Stored) -> RegisteredModel:
    aliases = {cell.name: value for cell, value in cells if cell.kind == "alias"}
    tags = {{"mark": MARK}[cell.kind]: value for cell, value in cells if cell.kind == "mark"}
    holder = SimpleNamespace(name="m", creation_timestamp=7, aliases=aliases, tags=tags)
    versions = [
        SimpleNamespace(name="m", version=n, tags={"featherweight.digest": f"d{n}"}, run_id="", source="", creation_timestamp=0)
        for n in "123"
    ]
    for version in versions:
        version.current_stage = "None"
    return RegisteredModel.of(holder, versions, dict(enumerate(stored, 1)), has_stages=False)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Look:
    """One look: of the cells only those that are kept here, fewer than MLflow's, since all are written alike."""

    model: RegisteredModel
    rest: list[tuple[Cell, str | None]]

    @property
    def history(self) -> Any:
        return self.model.history

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def behind(self) -> list[tuple[Cell, str | None]]:
        return self.rest


@cache
def look_of(cells: Cells, stored: Stored, kept: frozenset[Cell]) -> Look:
    model = model_of(cells, stored)
    return Look(model, [(cell, value) for cell, value in model.behind() if cell in kept])


@dataclass
class World:
    """The store, and what each writer's next step depends on: its first look, its own last entry, and all since its last look."""

    kept: frozenset[Cell]
    cells: dict[Cell, str] = field(default_factory=dict)
    stored: list[str] = field(default_factory=list)
    first: dict[str, str] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)
    since: dict[str, list[Hashable]] = field(default_factory=dict)

    def look(self) -> Look:
        return look_of(tuple(sorted(self.cells.items())), tuple(self.stored), self.kept)

    def key(self) -> Hashable:
        writers = ((one, self.first.get(one), self.last.get(one), tuple(since)) for one, since in sorted(self.since.items()))
        return tuple(sorted(self.cells.items())), tuple(self.stored), tuple(writers)


@cache
def text_of(entry: Entry) -> str:
    return entry.to_json()


class Store:
    """MLflow's operations for one writer; before each it gives way to the scheduler. faults: of its appends, in order."""

    def __init__(self, world: World, name: str, faults: str = "") -> None:
        self.world, self.name, self.faults = world, name, list(faults)
        world.since[name] = []

    def _step(self) -> None:
        parent = greenlet.getcurrent().parent
        if parent is not None:
            parent.switch()

    def read(self) -> Look:
        self._step()
        cells = tuple(sorted(self.world.cells.items()))
        self.world.since[self.name] = [cells]
        self._step()
        stored = tuple(self.world.stored)
        self.world.since[self.name].append(stored)
        self.look, self.written = look_of(cells, stored, self.world.kept), 0
        self.world.first.setdefault(self.name, self.look.history.standing.champion)
        return self.look

    def append(self, entry: Entry) -> None:
        self._step()
        fault = self.faults.pop(0) if self.faults else "."
        if fault != "l":
            self.world.stored.append(text_of(entry))
        self.world.last[self.name] = entry.id
        self.world.since[self.name] = [fault]
        if fault != ".":
            raise Unsure("no answer")

    def write(self, cell: Cell, value: str | None) -> None:
        self._step()
        self.written += 1
        self.world.since[self.name] = [tuple(self.look.behind()), self.written]
        if value is None:
            self.world.cells.pop(cell, None)
        else:
            self.world.cells[cell] = value


Writer = Callable[[Store], Any]
Writers = dict[str, tuple[Writer, str]]  # and the faults of its appends


def promote(version: str, expect: str | None, to: str = "production") -> Writer:
    return lambda store: commit(store, transition_decision(version, to, store.name, "x", (), expect), lambda _: None)


def roll_back(store: Store) -> Any:
    return commit(store, rollback_decision(store.name, "x"), lambda _: None)


def settle(store: Store) -> Any:
    return complete(store, store.read()), None


@cache
def begun(kept: frozenset[Cell]) -> World:
    """A world in which version 1 was champion and version 2 is."""
    world = World(kept)
    for version in "12":
        promote(version, None)(Store(world, "first"))
    return world


class Run:
    """Writers in a world that begins with champions 1 and 2, each until its next operation; their outcomes as they end."""

    def __init__(self, writers: Writers, kept: frozenset[Cell]) -> None:
        self.world = World(kept, dict(begun(kept).cells), list(begun(kept).stored))
        self.outcomes: dict[str, Any] = {}
        stores = {name: Store(self.world, name, faults) for name, (_, faults) in writers.items()}
        self.alive = {name: greenlet.greenlet(self._body(name, writers[name][0], stores[name])) for name in writers}
        for name in list(self.alive):
            self.step(name)

    def _body(self, name: str, writer: Writer, store: Store) -> Callable[[], None]:
        def body() -> None:
            try:
                self.outcomes[name] = writer(store)[1]
            except GateError as refusal:
                self.outcomes[name] = refusal
            del self.alive[name]
            del self.world.since[name]

        return body

    def step(self, name: str) -> None:
        self.alive[name].switch()


@cache
def settled(cells: Cells, stored: Stored, kept: frozenset[Cell]) -> list[Entry]:
    """The entries that count in a world, in which whoever looks next, all others killed, leaves nothing behind."""
    world = World(kept, dict(cells), list(stored))
    before = world.look()
    assert before.history.faults == ()
    assert before.model.versions[before.history.standing.champion].aliases == ("champion",)
    settle(Store(world, "next"))
    assert world.look().behind() == []
    assert world.look().history.entries == before.history.entries
    return list(before.history.entries)


def check_state(run: Run, counted: list[Entry]) -> list[Entry]:
    """Assert what holds in every state; returns the entries that count, of which `counted` were there before."""
    now = settled(tuple(sorted(run.world.cells.items())), tuple(run.world.stored), run.world.kept)
    assert now[: len(counted)] == counted, "what was decided changed"
    for name, outcome in run.outcomes.items():
        mine = [entry for entry in now if entry.who == name]
        if isinstance(outcome, GateError):
            assert mine == []
            named = any(f"meanwhile (version {entry.told().split()[1]}" in str(outcome) for entry in now if entry.who != name)
            assert named or "no previous champion" in str(outcome)
        else:
            assert mine == ([outcome] if outcome else [])
    return now


def explore(writers: Writers, kept: frozenset[Cell]) -> int:
    """Visit every reachable state once; returns how many there are."""
    visited: set[Hashable] = set()
    todo: list[tuple[tuple[str, ...], list[Entry]]] = [((), [])]
    while todo:
        path, counted = todo.pop()
        run = Run(writers, kept)
        for name in path:
            run.step(name)
        while run.world.key() not in visited:
            visited.add(run.world.key())
            counted = check_state(run, counted)
            if not run.alive:
                assert run.world.look().behind() == [], "all went on to their end, and something is behind"
                break
            first, *others = run.alive
            todo += [((*path, other), counted) for other in others]
            path = (*path, first)
            run.step(first)
    return len(visited)


@pytest.fixture(autouse=True)
def _same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids and times that a schedule gives again when it is run again."""

    def placed(draft: Entry, history: Any) -> Entry:
        entry = original(draft, history)
        return replace(entry, id=f"{draft.who} on {entry.before}", when="")

    original = commits.placed
    monkeypatch.setattr(commits, "placed", placed)


CASES: dict[str, tuple[Writers, frozenset[Cell]]] = {
    "two promotions": ({"ada": (promote("3", "2"), ""), "bob": (promote("1", "2"), "")}, ALL),
    "the same promotion twice, and a lost answer": ({"ada": (promote("3", "2"), "s"), "bob": (promote("3", "2"), "")}, ALL),
    "two rollbacks and a lost request": ({"ada": (roll_back, "l"), "bob": (roll_back, "")}, ALL),
    "a promotion, a rollback and a reader": ({"ada": (promote("3", "2"), ""), "bob": (roll_back, ""), "eve": (settle, "")}, SOME),
    "two that insist": ({"ada": (promote("3", None), ""), "bob": (promote("1", None), "")}, ALL),
    "three writers": ({"ada": (promote("3", "2"), ""), "bob": (promote("1", "2"), ""), "eve": (roll_back, "")}, NONE),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_interleaving_and_no_kill_breaks_the_history(case: str) -> None:
    assert explore(*CASES[case]) > 100


def test_the_search_finds_a_writer_that_does_not_look_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(store: Store, seen: Look) -> Look:
        for cell, value in seen.behind():
            store.write(cell, value)
        return seen

    monkeypatch.setattr(commits, "complete", hasty)
    with pytest.raises(AssertionError, match="something is behind"):
        explore(*CASES["two that insist"])
