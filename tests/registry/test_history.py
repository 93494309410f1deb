"""The history in MLflow: what it stores, what counts, what was altered, and the histories that earlier releases kept in tags."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from sqlalchemy import event
from sqlalchemy.orm import Session

from featherweight.errors import GateError, IntegrityError
from featherweight.registry import tag_history
from featherweight.registry.commit import Cell, placed
from featherweight.registry.history import Entry, GateResult, Transition, fold
from featherweight.registry.mlflow_store import ENTRY, MlflowStore, set_once
from featherweight.registry.registry import RegisteredVersion, Registry
from featherweight.registry.versions import MARK, TAG, RegisteredModel
from featherweight.store.artifact import content_digest
from featherweight.store.workspace import Workspace
from flows.history import history_of
from tests.support.registering import MODEL, Bench, desk, plain_versions

__all__ = ["desk"]
pytestmark = pytest.mark.slow

SIDE = f"{MODEL}.history"


def register(desk: Bench, count: int) -> None:
    plain_versions(desk.registry.client, MODEL, count)


def move(desk: Bench, version: str, to: str = "production", **options: str) -> RegisteredVersion:
    return desk.registry.transition(MODEL, version, to, who="ada", why="a test", **options)  # type: ignore[arg-type]


def entries(desk: Bench) -> dict[int, str]:
    found = desk.registry.client.search_model_versions(f"name = '{SIDE}'")
    return {int(one.version): one.tags[ENTRY] for one in found}


def shown(desk: Bench) -> RegisteredModel:
    """The model, after it was asserted that everything in MLflow follows its history."""
    model = desk.registry.model(MODEL)
    assert model.behind() == []
    return model


def test_an_entry_of_a_huge_number_does_not_make_a_look_endless() -> None:
    """MLflow numbers them one by one; who writes into its database may not."""
    told = fold({2: "no entry", 2**62: "none either"}, 1)
    assert told.faults[0] == "history entry 1 was deleted"
    assert told.faults[2] == f"history entries 3 to {2**62 - 1} were deleted"
    assert (len(told.faults), told.entries) == (4, ())


def test_history_is_only_appended_and_is_no_model_to_serve(desk: Bench) -> None:
    register(desk, 3)
    move(desk, "1")
    move(desk, "2")
    before = entries(desk)
    desk.registry.rollback(MODEL, "ada", "back")
    move(desk, "3", "staging")
    after = entries(desk)
    assert (list(before), sorted(after)) == ([2, 1], [1, 2, 3, 4])
    assert before.items() <= after.items()
    assert shown(desk).history.faults == ()
    assert desk.registry.models() == [MODEL]
    with pytest.raises(GateError, match=r"no registered model 'nobody'; registered: little-llama$"):
        desk.registry.get("nobody", "1")
    with pytest.raises(GateError, match=r"'\.history' ends the names of those that hold histories"):
        desk.registry.register(desk.winner("x", model=SIDE))


def test_of_two_that_follow_one_the_second_lost_and_nothing_of_it_is_seen(desk: Bench) -> None:
    register(desk, 3)
    move(desk, "1")
    store = MlflowStore(desk.registry.client, MODEL)
    slept = store.read()
    entry = placed(slept.transition(slept.pick("2"), "production", "bob", "late", ()), slept.history)
    move(desk, "3")
    before = desk.registry.model(MODEL).history
    store.append(entry)
    store.append(entry)  # a network that repeats a request
    after = shown(desk).history
    assert (after.entries, after.standing) == (before.entries, before.standing)
    assert [(one.entry.id, one.winner.number) for one in after.lost] == [(entry.id, 2)] * 2
    assert desk.registry.rollback(MODEL, "ada", "back").version == "1"


def test_an_entry_that_was_stored_twice_counts_once(desk: Bench) -> None:
    register(desk, 1)
    store = MlflowStore(desk.registry.client, MODEL)
    seen = store.read()
    entry = placed(seen.transition(seen.pick("1"), "production", "ada", "x", ()), seen.history)
    store.append(entry)
    store.append(entry)
    history = store.read().history
    assert ([one.number for one in history.entries], history.lost, history.faults) == ([1], (), ())


def test_what_a_killed_writer_left_is_seen_right_and_completed(desk: Bench) -> None:
    register(desk, 2)
    move(desk, "1")
    store = MlflowStore(desk.registry.client, MODEL)
    seen = store.read()
    store.append(placed(seen.transition(seen.pick("2"), "production", "bob", "killed", ()), seen.history))
    assert desk.registry.client.get_registered_model(MODEL).aliases["champion"] == 1
    model = desk.registry.model(MODEL)
    assert [(one.version, one.stage, one.aliases) for one in model.versions.values()] == [
        ("1", "archived", ("previous",)),
        ("2", "production", ("champion",)),
    ]
    desk.registry.settle(MODEL)
    assert shown(desk).shown == {"champion": "2", "production": "2", "previous": "1"}


def test_who_was_overtaken_is_told_by_whom(desk: Bench) -> None:
    register(desk, 2)
    move(desk, "2")
    said = r"version 2 of 'little-llama' became champion meanwhile \(version 2 went to production, by ada: a test, entry 1\)"
    with pytest.raises(GateError, match=said):
        move(desk, "1", expect_champion="")


def test_a_model_that_was_deleted_and_made_again_begins_anew(desk: Bench) -> None:
    register(desk, 2)
    move(desk, "2")
    desk.registry.client.delete_registered_model(MODEL)
    desk.registry.register(desk.winner("other"))
    assert desk.registry.champion(MODEL) is None
    move(desk, "1")
    assert [one.number for one in shown(desk).history.entries] == [2]


def test_altered_and_deleted_entries_are_found_and_stop_nothing(desk: Bench) -> None:
    register(desk, 3)
    for version in "123":
        move(desk, version)
    client, whole = desk.registry.client, entries(desk)
    client.set_model_version_tag(SIDE, "1", ENTRY, whole[1].replace("ada", "bob"))
    assert desk.registry.history(MODEL).faults == (
        "history entry 1 was altered or removed: entry 2, which follows it, knew another",
    )
    client.set_model_version_tag(SIDE, "1", ENTRY, "{}")
    assert "history entry 1 is not readable; it was altered outside Featherweight" in desk.registry.history(MODEL).faults
    client.set_model_version_tag(SIDE, "1", ENTRY, whole[1])
    client.delete_model_version(SIDE, "2")
    history = desk.registry.history(MODEL)
    assert [one.number for one in history.entries] == [1, 3]
    assert "history entry 2 was deleted" in history.faults
    assert desk.registry.rollback(MODEL, "ada", "back").version == "2"
    assert shown(desk).shown["champion"] == "2"


def test_nothing_is_decided_on_a_history_that_was_cut(desk: Bench) -> None:
    register(desk, 2)
    move(desk, "1")
    move(desk, "2")
    desk.registry.client.delete_model_version(SIDE, "2")
    assert desk.registry.history(MODEL).faults == ("history entry 2, which the aliases followed, was removed or altered",)
    with pytest.raises(IntegrityError, match="history entry 2, which the aliases followed, was removed or altered; nothing is"):
        desk.registry.rollback(MODEL, "ada", "back")
    with pytest.raises(IntegrityError, match="nothing is decided on it"):
        move(desk, "1", "staging")
    desk.registry.settle(MODEL)
    assert desk.registry.model(MODEL).shown["champion"] == "2"  # no alias follows it either
    told = history_of(Workspace.at(desk.root), MODEL, repair=True)
    assert told.history.standing.champion == "1"
    assert "repair, by " in told.to_text()
    assert "entry 2 was removed or altered: what is left counts" in told.to_text()
    assert desk.registry.repair(MODEL, "ada") is None
    move(desk, "2")
    assert shown(desk).shown["champion"] == "2"


def test_the_history_is_told_with_gates_losers_and_what_was_behind(desk: Bench) -> None:
    register(desk, 2)
    gates = [GateResult("quality", True, "2.02 is fine", 2.02, 2.05)]
    desk.registry.transition(MODEL, "1", "production", who="ada", why="the first", gates=gates)
    store = MlflowStore(desk.registry.client, MODEL)
    seen = store.read()
    for who in ("bob", "eve"):
        store.append(placed(seen.transition(seen.pick("2"), "production", who, "both", ()), seen.history))
    before = desk.state()
    told = history_of(Workspace.at(desk.root), MODEL)
    assert told.behind in told.to_text()
    assert told.behind.startswith("out of step: ")
    assert desk.state() == before
    assert told.to_text().splitlines()[0] == "little-llama: champion 2, challenger none, previous 1"
    for line in ("version 1: none → production  by ada: the first", "✓ quality: 2.02 is fine", "by ada: the first"):
        assert line in told.to_text()
    assert "lost to entry 2: version 2 went to production, by eve: both" in told.to_text()
    record = json.loads(json.dumps(told.to_dict()))
    assert (record["lost"][0]["lost_to"], record["transitions"][1]["who"], record["faults"]) == (2, "bob", [])
    assert history_of(Workspace.at(desk.root), MODEL, repair=True).behind == ""
    assert shown(desk).shown["champion"] == "2"


@pytest.mark.slow
def test_two_writers_lose_nothing(desk: Bench) -> None:
    register(desk, 3)
    failures: list[BaseException] = []

    def write(name: str, versions: str) -> None:
        own = Registry(desk.registry.tracking_uri)
        try:
            for version in versions:
                own.transition(MODEL, version, "production", who=name, why=f"{name} wants {version}")
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=("ada", "123")), threading.Thread(target=write, args=("bob", "321"))]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(600)
    assert failures == []
    model = shown(desk)
    promoted = [one for one in model.history.transitions if one.target == "production"]
    displaced = [one for one in model.history.transitions if one.action == "displaced"]
    assert model.history.faults == ()
    assert {one.who for one in promoted} == {"ada", "bob"}
    assert [one.version for one in displaced] == [one.version for one in promoted[:-1]]
    assert model.shown["champion"] == promoted[-1].version
    assert model.shown["previous"] == promoted[-2].version


@pytest.mark.parametrize("other", ["mark", "alias", "tag"])
def test_who_is_overtaken_between_mlflows_look_and_its_write_writes_again(desk: Bench, other: str) -> None:
    register(desk, 2)
    cell = Cell(other, {"mark": "", "alias": "champion", "tag": "1"}[other])
    store = MlflowStore(desk.registry.client, MODEL)
    overtaken: list[Cell] = []

    def overtake(*_: object) -> None:
        if not overtaken:
            overtaken.append(cell)
            MlflowStore(Registry(desk.registry.tracking_uri).client, MODEL).write(cell, "2")

    event.listen(Session, "before_flush", overtake)
    try:
        store.write(cell, "1")
    finally:
        event.remove(Session, "before_flush", overtake)
    seen = desk.registry.client.get_registered_model(MODEL)
    written = {
        "mark": seen.tags.get(MARK),
        "alias": str(seen.aliases.get("champion")),
        "tag": desk.registry.client.get_model_version(MODEL, "1").tags.get(f"{TAG}stage"),
    }
    assert (overtaken, written[other]) == ([cell], "1")


def test_a_write_that_mlflow_keeps_refusing_fails(desk: Bench) -> None:
    register(desk, 1)
    asked: list[str] = []

    def refuse(text: str) -> None:
        asked.append(text)
        raise MlflowException("a database's words", error_code=BAD_REQUEST)

    with pytest.raises(MlflowException, match="a database's words"):
        set_once(refuse, "x")
    assert asked == ["x"] * 8


# -- histories that earlier releases kept in tags ------------------------------------------------------------------------


def old_history(desk: Bench, moves: str, aliases: dict[str, str]) -> None:
    """Tags and aliases as an earlier release wrote them: each version of `moves` champion in its turn."""
    client, before = desk.registry.client, ""
    for place, version in enumerate(moves):
        when = f"2026-11-01T00:00:0{place}.000000+00:00"
        entry = Transition(when, "eve", "old", "transition", version, f"d{version}", "none", "production", before=before)
        stored = {name: value for name, value in asdict(entry).items() if name != "number"}
        before = content_digest(stored)[:16]
        key = f"{tag_history.PREFIX}{when}.{before}".replace(":", "").replace("+0000", "Z")
        client.set_registered_model_tag(MODEL, key, json.dumps(stored))
    for alias, version in aliases.items():
        client.set_registered_model_alias(MODEL, alias, version)


def test_old_histories_are_read_and_carried_over(desk: Bench) -> None:
    register(desk, 4)
    old_history(desk, "123", {"champion": "3", "previous": "2"})
    history = desk.registry.history(MODEL)
    assert ([one.version for one in history.transitions], history.standing.line) == (["1", "2", "3"], ("1", "2", "3"))
    assert desk.registry.get(MODEL, "champion").version == "3"
    move(desk, "4")
    assert desk.registry.rollback(MODEL, "ada", "back").version == "3"
    assert desk.registry.rollback(MODEL, "ada", "back").version == "2"
    model = shown(desk)
    assert [one.version for one in model.history.transitions] == ["1", "2", "3", "4", "3", "4", "3", "3", "2"]
    assert [one.stage for one in model.versions.values()] == ["archived", "production", "archived", "archived"]
    assert model.history.faults == ()


def test_an_old_promotion_that_was_killed_stands_where_its_alias_stood(desk: Bench) -> None:
    register(desk, 3)
    old_history(desk, "123", {"champion": "2", "previous": "1"})
    assert desk.registry.history(MODEL).standing.line == ("1", "2")
    move(desk, "3")
    assert desk.registry.rollback(MODEL, "ada", "back").version == "2"


def test_old_entries_that_were_altered_or_removed_are_found(desk: Bench) -> None:
    register(desk, 3)
    old_history(desk, "123", {"champion": "3"})
    client = desk.registry.client
    keys = sorted(key for key in client.get_registered_model(MODEL).tags if key.startswith(tag_history.PREFIX))
    value = client.get_registered_model(MODEL).tags[keys[0]]
    client.set_registered_model_tag(MODEL, keys[0], value.replace("eve", "bob"))
    altered, orphan = desk.registry.history(MODEL).faults
    assert f"{keys[0]} was altered" in altered
    assert f"before {keys[1]} was removed or altered" in orphan
    client.set_registered_model_tag(MODEL, keys[0], value)
    move(desk, "1")
    client.delete_registered_model_tag(MODEL, keys[2])
    assert desk.registry.history(MODEL).faults == (
        "the history that tags kept before entry 1 was altered, or a part of it removed",
    )
    client.set_registered_model_tag(MODEL, keys[0], "{}")
    assert any("is not readable" in fault for fault in desk.registry.history(MODEL).faults)
    assert desk.registry.rollback(MODEL, "ada", "one that cannot be read stops nothing").version == "3"


@pytest.mark.parametrize(
    "changed",
    [
        {"when": 7},
        {"who": None},
        {"mends": 7},
        {"left": 0, "rule": 3},
        {"after": {"champion": ["1"], "challenger": "", "line": ["1"]}},
        {"after": {"champion": "1", "challenger": "", "line": "12"}},
        {"moves": [{"version": 1, "digest": "d", "source": "none", "target": "production"}]},
        {"gates": [{"gate": "g", "passed": True, "reason": "r", "value": "x"}]},
        {"found": [["alias", "champion", 3]]},
    ],
)
def test_an_entry_whose_parts_are_of_other_types_is_not_readable(changed: dict[str, object]) -> None:
    move = {"version": "1", "digest": "d", "source": "none", "target": "production"}
    after = {"champion": "1", "challenger": "", "line": ["1"]}
    told = {"id": "i", "model": 1, "follows": 0, "before": "", "when": "2026", "who": "a", "why": "b", "action": "transition"}
    whole: dict[str, object] = {**told, "moves": [move], "after": after, "gates": []}
    assert Entry.from_json(json.dumps(whole), 1).after.champion == "1"
    with pytest.raises(IntegrityError, match="history entry 1 is not readable"):
        Entry.from_json(json.dumps(whole | changed), 1)
