"""What somebody moves in MLflow is seen at the next look, judged, recorded once, and undone, kept or told."""

from __future__ import annotations

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from featherweight.errors import Forbidden
from featherweight.registry import smoke
from featherweight.registry.commit import placed
from featherweight.registry.history import GateResult
from featherweight.registry.mlflow_store import MlflowStore
from featherweight.registry.out_of_band import OutOfBand
from featherweight.registry.out_of_band import look as patient_look
from featherweight.registry.promotion import gated_transition
from featherweight.store.workspace import Workspace
from flows.history import history_of
from tests.support.registering import METRICS, MODEL, Bench, desk

pytestmark = pytest.mark.slow

__all__ = ["desk"]
SLOW = METRICS | {name: value * 0.5 for name, value in METRICS.items() if name.startswith("speedup")}
FAST = METRICS | {name: value * 2 for name, value in METRICS.items() if name.startswith("speedup")}


def look(desk: Bench) -> OutOfBand | None:
    return patient_look(desk.registry, MODEL, settle_s=0)[1]


def aliases(desk: Bench) -> dict[str, int]:
    return {name: int(number) for name, number in desk.registry.client.get_registered_model(MODEL).aliases.items()}


def promoted(desk: Bench, rule: str) -> None:
    """Three versions of one, half and double speed; the first is champion, under a rule."""
    for name, metrics in (("one", METRICS), ("slow", SLOW), ("fast", FAST)):
        desk.registry.register(desk.winner(name, metrics=metrics))
    gated_transition(desk.registry, MODEL, "1", who="ada", why="first", rule=rule)  # type: ignore[arg-type]


def test_a_history_that_is_repaired_tells_what_was_moved(desk: Bench) -> None:
    promoted(desk, "")
    desk.registry.client.set_registered_model_alias(MODEL, "champion", "2")
    assert history_of(Workspace.at(desk.root), MODEL).moved is None
    told = history_of(Workspace.at(desk.root), MODEL, repair=True)
    assert "out of band, entry 2: alias champion went from 1 to 2; undone" in told.to_text()
    assert (told.history.entries[-1].action, aliases(desk)["champion"]) == ("out of band", 1)


def test_what_was_moved_is_undone_and_recorded_once_with_the_gate(desk: Bench) -> None:
    promoted(desk, "")
    client, whole = desk.registry.client, {"champion": 1, "production": 1}
    client.set_registered_model_alias(MODEL, "champion", "2")
    found = look(desk)
    assert found is not None
    assert (found.outcome, found.entry) == ("undone", 2)
    assert found.why.startswith("alias champion went from 1 to 2; undone, and the gate refuses it: objective speedup@1: speed 4")
    assert any(not gate.passed for gate in found.gates)
    assert (aliases(desk), look(desk)) == (whole, None)
    for do, told in (
        (lambda: client.delete_registered_model_alias(MODEL, "champion"), "alias champion went from 1 to nothing; undone"),
        (
            lambda: client.set_model_version_tag(MODEL, "3", "featherweight.stage", "production"),
            "the stage tag of version 3 went from none to production; undone",
        ),
        (
            lambda: client.transition_model_version_stage(MODEL, "3", "Production"),
            "MLflow's stage of version 3 went from None to Production; undone",
        ),
    ):
        do()
        found = look(desk)
        assert found is not None
        assert found.why == told
        assert (aliases(desk), look(desk)) == (whole, None)
    history = desk.registry.history(MODEL)
    assert [entry.action for entry in history.entries] == ["transition", *["out of band"] * 4]
    assert "out of band, by somebody in MLflow, seen by" in history_of(Workspace.at(desk.root), MODEL).to_text()
    assert history.faults == ()


def test_what_the_gate_lets_pass_is_kept_where_the_recipe_says_so(desk: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    promoted(desk, "keep")
    monkeypatch.setattr(smoke, "smoke_gate", lambda *_: GateResult("smoke", True, "answered"))
    client = desk.registry.client
    client.set_registered_model_alias(MODEL, "champion", "2")
    found = look(desk)
    assert found is not None
    assert (found.outcome, aliases(desk)["champion"]) == ("undone", 1)
    client.set_registered_model_alias(MODEL, "champion", "3")
    found = look(desk)
    assert found is not None
    assert (found.outcome, [gate.passed for gate in found.gates]) == ("kept", [True] * 4)
    assert aliases(desk) == {"champion": 3, "production": 3, "previous": 1}
    assert desk.registry.get(MODEL, "1").stage == "archived"
    client.set_registered_model_alias(MODEL, "challenger", "2")
    assert getattr(look(desk), "outcome", "") == "kept"
    client.delete_registered_model_alias(MODEL, "challenger")
    client.delete_registered_model_alias(MODEL, "champion")
    assert getattr(look(desk), "outcome", "") == "kept"
    assert desk.registry.champion(MODEL) is None
    assert desk.registry.model(MODEL).behind() == []


def test_a_champion_that_is_kept_and_does_not_answer_is_taken_back(desk: Bench) -> None:
    """These artifacts hold no tokenizer."""
    promoted(desk, "keep")
    desk.registry.client.set_registered_model_alias(MODEL, "champion", "3")
    found = look(desk)
    assert found is not None
    assert (found.outcome, [gate.passed for gate in found.gates][-1]) == ("taken back", False)
    assert "taken back: smoke request failed, it did not answer" in found.why and found.why.endswith("version 1 is champion")
    assert aliases(desk) == {"champion": 1, "production": 1}
    assert [entry.action for entry in desk.registry.history(MODEL).entries] == ["transition", "out of band", "rollback"]
    desk.registry.register(desk.winner("quiet", metrics=FAST | {"size_bytes": 1.0}, promote={"smoke": False}))
    desk.registry.client.set_registered_model_alias(MODEL, "champion", "4")
    assert getattr(look(desk), "outcome", "") == "kept"


def test_who_may_only_read_is_told_how_things_should_be(desk: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    promoted(desk, "")

    def denied(*_: object, **told: object) -> None:
        raise MlflowException("Permission denied", PERMISSION_DENIED)

    desk.registry.client.set_registered_model_alias(MODEL, "champion", "2")
    with monkeypatch.context() as patched:
        for write in ("create_model_version", "set_registered_model_alias", "set_model_version_tag"):
            patched.setattr(MlflowClient, write, denied)
        patched.setattr(desk.registry, "client", desk.registry.client)
        found = look(desk)
        assert found is not None
        assert (found.entry, found.outcome) == (0, "left as it is")
        assert found.to_text() == "out of band: alias champion went from 1 to 2; not recorded: no right to write"
        told = history_of(Workspace.at(desk.root), MODEL)
        assert told.to_dict()["behind"].startswith("out of step: alias champion went from 1 to 2; this look changes nothing")
        with pytest.raises(Forbidden, match="does not let this user do that"):
            gated_transition(desk.registry, MODEL, "3", who="ada", why="a reader")
    assert getattr(look(desk), "outcome", "") == "undone"


def test_what_is_only_told_stays_until_the_next_decision(desk: Bench) -> None:
    promoted(desk, "tell")
    desk.registry.client.set_registered_model_alias(MODEL, "champion", "3")
    found = look(desk)
    assert found is not None
    assert (found.outcome, aliases(desk)["champion"], look(desk)) == ("left as it is", 3, None)
    assert getattr(desk.registry.champion(MODEL), "version", "") == "1"
    gated_transition(desk.registry, MODEL, "3", who="ada", why="indeed")
    assert aliases(desk) == {"champion": 3, "production": 3, "previous": 1}


def test_a_killed_writer_and_a_model_of_others_moved_nothing(desk: Bench) -> None:
    promoted(desk, "")
    store = MlflowStore(desk.registry.client, MODEL)
    seen = store.read()
    store.append(placed(seen.transition(seen.pick("3"), "production", "bob", "killed", ()), seen.history))
    assert (look(desk), aliases(desk)["champion"]) == (None, 3)
    client = desk.registry.client
    client.create_registered_model("theirs")
    client.create_model_version("theirs", "somewhere:/else", await_creation_for=0)
    client.set_registered_model_alias("theirs", "champion", "1")
    assert patient_look(desk.registry, "theirs", settle_s=0)[1] is None
    assert client.get_registered_model("theirs").aliases
    desk.registry.register(desk.winner("other", model="fresh"))
    client.set_registered_model_alias("fresh", "champion", "1")
    found = patient_look(desk.registry, "fresh", settle_s=0)[1]
    assert found is not None
    assert (found.why, client.get_registered_model("fresh").aliases) == ("alias champion went from nothing to 1; undone", {})


def test_versions_that_others_made_are_not_written_to_one_by_one(desk: Bench) -> None:
    """A decision about a model of a thousand of them took a request for each; a stage that they are given is still undone."""
    promoted(desk, "")
    client = desk.registry.client
    for _ in range(3):
        client.create_model_version(MODEL, "s3://elsewhere/x")
    assert desk.registry.model(MODEL).behind() == []
    desk.registry.transition(MODEL, "3", "production", who="ada", why="faster")
    assert [client.get_model_version(MODEL, str(number)).tags for number in (4, 5, 6)] == [{}] * 3
    client.set_model_version_tag(MODEL, "5", "featherweight.stage", "production")
    assert getattr(look(desk), "why", "") == "the stage tag of version 5 went from none to production; undone"
    assert client.get_model_version(MODEL, "5").tags == {"featherweight.stage": "none"}
