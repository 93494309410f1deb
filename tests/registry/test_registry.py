"""The registry: what is stored, what is linked, who is champion, and a history that nobody rewrites."""

from __future__ import annotations

import hashlib
import json
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.entities.model_registry import ModelVersion

from featherweight.errors import GateError, IntegrityError, ServiceError
from featherweight.registry import registry
from featherweight.registry.history import GateResult
from featherweight.registry.registry import Registry
from featherweight.store import artifact
from featherweight.system.processes import held_port
from tests.support.mlflow_server import mlflow_server
from tests.support.registering import METRICS, MODEL, Bench, bench, desk
from tests.support.stores import empty_store

pytestmark = pytest.mark.slow

__all__ = ["desk"]


def three_versions(desk: Bench) -> None:
    for name in ("one", "two", "three"):
        desk.registry.register(desk.winner(name))


def move(desk: Bench, version: str, to: str, why: str = "a test") -> registry.RegisteredVersion:
    return desk.registry.transition(MODEL, version, to, who="ada", why=why)


# -- registering -------------------------------------------------------------------------------------------------------


def test_registered_version_tells_all_of_the_winner(desk: Bench) -> None:
    winner = desk.winner(recipe="r1", checkpoint="c1", evaluation="e1", constraints={"max_quality_loss": 0.01}, threads=2)
    version = desk.registry.register(winner)
    assert (version.new, version.version, version.stage, version.aliases) == (True, "1", "none", ())
    assert (version.digest, version.variant, version.run_id) == (winner.digest, "w8/torch", desk.run_id)
    assert version.metrics == METRICS
    told = {name: version.tag(name) for name in ("engine", "recipe", "checkpoint", "evaluation", "objective")}
    assert told == {"engine": "torch", "recipe": "r1", "checkpoint": "c1", "evaluation": "e1", "objective": "speedup@1"}
    assert json.loads(version.tag("constraints")) == {"max_quality_loss": 0.01}
    assert version.tag("lineage") == hashlib.sha256(winner.lineage.encode()).hexdigest()
    assert desk.registry.get(MODEL, "1").tags == version.tags
    outputs = desk.registry.client.get_run(desk.run_id).outputs.model_outputs
    assert [one.model_id for one in outputs] == [version.tag("model_id")]


def test_weights_lie_on_disk_once(desk: Bench) -> None:
    winner = desk.winner()
    version = desk.registry.register(winner)
    served = desk.registry.served_folder(version, desk.root)
    assert served.is_relative_to(desk.root / "artifacts")
    assert (served / "model.safetensors").samefile(winner.served / "model.safetensors")
    artifact.verify(served, winner.digest)
    copied = sum(p.stat().st_size for p in served.parents[1].rglob("*") if p.is_file() and p.stat().st_nlink == 1)
    assert copied < 10_000  # MLmodel, requirements, the model's code, lineage


def test_same_digest_is_registered_once(desk: Bench) -> None:
    winner = desk.winner()
    first = desk.registry.register(winner)
    before = desk.state()
    again = desk.registry.register(winner)
    assert (again.version, again.new) == (first.version, False)
    assert desk.state() == before


def test_winning_variant_keeps_its_logged_model(desk: Bench) -> None:
    client = desk.registry.client
    model_id = desk.registry.log_variant(desk.run_id, "d1/w8.x:y/torch", METRICS, {"grid": "int8"}, {"k": "v"})
    logged = client.get_logged_model(model_id)
    assert {metric.key: metric.value for metric in logged.metrics} == METRICS
    assert (logged.params, logged.name, str(logged.status)) == ({"grid": "int8"}, "d1-w8-x-y-torch", "READY")
    assert logged.tags["featherweight.variant"] == "d1/w8.x:y/torch"
    version = desk.registry.register(desk.winner(model_id=model_id))
    assert version.tag("model_id") == model_id
    assert [one.model_id for one in client.search_logged_models([desk.experiment])] == [model_id]


def test_folder_that_is_not_served_leaves_nothing_behind(desk: Bench) -> None:
    winner = desk.winner()
    (winner.served / "serving.json").unlink()
    before = desk.state()
    with pytest.raises(IntegrityError, match=r"not a served variant: it has no serving\.json"):
        desk.registry.register(winner)
    assert desk.state() == before


def test_artifact_store_without_room_leaves_nothing_behind(desk: Bench) -> None:
    (desk.root / "artifacts").mkdir()
    (desk.root / "artifacts" / "models").write_text("a file where MLflow wants a folder")
    before = desk.state()
    with pytest.raises(ServiceError, match=r"MLflow at sqlite:.* failed: .*Not a directory"):
        desk.registry.register(desk.winner())
    assert desk.state() == before


def test_unknown_run_registers_nothing(desk: Bench) -> None:
    before = desk.state()
    with pytest.raises(ServiceError, match="Run with id=nowhere not found"):
        desk.registry.register(desk.winner(run_id="nowhere"))
    assert desk.state() == before


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "it's", "-x", "x.history"])
def test_impossible_model_names_are_refused(desk: Bench, name: str) -> None:
    with pytest.raises(GateError, match="cannot name a registered model"):
        desk.registry.register(desk.winner(model=name))


def test_s3_store_holds_the_files_and_gives_them_back(s3_server, tmp_path: Path) -> None:
    desk = bench(tmp_path, artifacts=f"s3://{s3_server.bucket}/mlflow")
    winner = desk.winner()
    version = desk.registry.register(winner)
    assert version.source.startswith(f"s3://{s3_server.bucket}/mlflow/models/")
    assert desk.registry.lineage_json(version) == winner.lineage
    (tmp_path / "got").mkdir()
    artifact.verify(desk.registry.served_folder(version, tmp_path / "got"), winner.digest)


# -- promotion ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_promotion_moves_aliases_tags_and_stages(desk: Bench) -> None:
    three_versions(desk)
    assert desk.registry.champion(MODEL) is None
    assert move(desk, "1", "staging").aliases == ("challenger",)
    assert move(desk, "challenger", "production").aliases == ("champion",)
    assert move(desk, "2", "production").aliases == ("champion",)
    first, second, third = desk.registry.versions(MODEL)
    assert (first.stage, first.aliases, second.stage, third.stage) == ("archived", ("previous",), "production", "none")
    assert [one.tag("stage") for one in (first, second, third)] == ["archived", "production", "none"]
    stages = [desk.registry.client.get_model_version(MODEL, one).current_stage for one in "123"]
    assert stages == ["Archived", "Production", "None"]
    champion = desk.registry.champion(MODEL)
    assert champion is not None
    assert champion.version == "2"


@pytest.mark.slow
def test_history_tells_who_when_why_and_the_gates(desk: Bench) -> None:
    three_versions(desk)
    move(desk, "1", "production", "the first")
    gates = [GateResult("quality", True, "2.02 is fine", 2.02, 2.05)]
    desk.registry.transition(MODEL, "2", "production", who="ada", why="é better", gates=gates)
    first, second, displaced = desk.registry.history(MODEL).transitions
    assert (first.version, first.source, first.target, first.why) == ("1", "none", "production", "the first")
    assert (second.who, second.why, second.gates) == ("ada", "é better", tuple(gates))
    assert second.digest == desk.registry.get(MODEL, "2").digest
    assert (displaced.version, displaced.source, displaced.target) == ("1", "production", "archived")
    assert (displaced.action, displaced.why) == ("displaced", "displaced by version 2")
    assert first.when < second.when == displaced.when
    assert first.when.endswith("+00:00")


@pytest.mark.slow
def test_transition_to_where_it_stands_is_no_transition(desk: Bench) -> None:
    three_versions(desk)
    move(desk, "1", "production")
    before = desk.state()
    assert move(desk, "1", "production").stage == "production"
    assert desk.state() == before


@pytest.mark.slow
def test_staging_displaces_the_challenger_and_archiving_clears_the_alias(desk: Bench) -> None:
    three_versions(desk)
    move(desk, "1", "staging")
    move(desk, "2", "staging")
    assert [one.stage for one in desk.registry.versions(MODEL)] == ["none", "staging", "none"]
    move(desk, "2", "archived")
    assert desk.registry.get(MODEL, "2").aliases == ()
    with pytest.raises(GateError, match="no version or alias 'challenger'; versions: 1, 2, 3; aliases: none"):
        desk.registry.get(MODEL, "challenger")


@pytest.mark.slow
def test_rollback_goes_back_one_champion_at_a_time(desk: Bench) -> None:
    three_versions(desk)
    for version in "123":
        move(desk, version, "production")
    assert desk.registry.rollback(MODEL, "ada", "3 is slow").version == "2"
    assert [one.aliases for one in desk.registry.versions(MODEL)] == [("previous",), ("champion",), ()]
    assert desk.registry.rollback(MODEL, "ada", "2 as well").version == "1"
    before = desk.state()
    with pytest.raises(GateError, match="no previous champion to go back to"):
        desk.registry.rollback(MODEL, "ada", "and 1")
    assert desk.state() == before
    move(desk, "3", "production", "repaired")
    assert desk.registry.rollback(MODEL, "ada", "no").version == "1"
    assert desk.registry.history(MODEL).standing.line == ("1",)
    assert [one.stage for one in desk.registry.versions(MODEL)] == ["production", "archived", "archived"]


@pytest.mark.slow
def test_champion_that_changed_meanwhile_stops_a_promotion(desk: Bench) -> None:
    three_versions(desk)
    move(desk, "1", "production")
    before = desk.state()
    with pytest.raises(GateError, match=r"version 1 of 'little-llama' became champion meanwhile \(.*\); promote again"):
        desk.registry.transition(MODEL, "2", "production", who="ada", why="x", expect_champion="")
    assert desk.state() == before
    moved = desk.registry.transition(MODEL, "2", "production", who="ada", why="x", expect_champion="1")
    assert moved.stage == "production"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "who", "why", "said"),
    [
        ("prod", "ada", "x", "no stage 'prod'; stages: none, staging, production, archived"),
        ("production", " ", "x", "who does it and why"),
        ("production", "ada", "", "who does it and why"),
        ("production", "ada", "x" * 1001, "at most 1000 characters"),
    ],
)
def test_transitions_without_a_stage_or_a_reason_are_refused(desk: Bench, to: str, who: str, why: str, said: str) -> None:
    three_versions(desk)
    before = desk.state()
    with pytest.raises(GateError, match=said):
        desk.registry.transition(MODEL, "1", to, who=who, why=why)
    assert desk.state() == before


@pytest.mark.slow
def test_stages_of_mlflow_are_set_without_a_warning(desk: Bench) -> None:
    three_versions(desk)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        move(desk, "1", "production")
    assert desk.registry.client.get_model_version(MODEL, "1").current_stage == "Production"


# -- servers -----------------------------------------------------------------------------------------------------------


def test_server_that_is_down_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Registry, "client", property(lambda _: pytest.fail("MLflow's client would try again for minutes")))
    with (
        held_port() as port,
        pytest.raises(ServiceError, match=rf"the MLflow server at http://127.0.0.1:{port} does not answer") as caught,
    ):
        Registry(f"http://127.0.0.1:{port}").check()
    assert "\n" not in str(caught.value)


def test_server_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PING_S", 0.3)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        with pytest.raises(ServiceError, match="does not answer") as caught:
            Registry(f"http://ada:secret@127.0.0.1:{mute.getsockname()[1]}").check()
    assert "secret" not in str(caught.value)


def test_store_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is not a database, but it is long enough to be read as one" * 20)
    with pytest.raises(ServiceError, match=r"MLflow at sqlite:.* failed: ") as caught:
        Registry(f"sqlite:///{tmp_path}/mlflow.db").check()
    assert "\n" not in str(caught.value)


def test_unknown_models_and_versions_name_the_known(desk: Bench) -> None:
    with pytest.raises(GateError, match="no registered model 'nobody'; registered: none"):
        desk.registry.champion("nobody")
    desk.registry.register(desk.winner())
    with pytest.raises(GateError, match="no registered model 'nobody'; registered: little-llama"):
        desk.registry.versions("nobody")
    with pytest.raises(GateError, match="no version or alias '7'; versions: 1; aliases: none"):
        desk.registry.get(MODEL, "7")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server that keeps artifacts itself (mlflow-artifacts:)."""
    root = tmp_path_factory.mktemp("server")
    (root / "mlflow.db").write_bytes(empty_store())
    with mlflow_server(root, f"sqlite:///{root}/mlflow.db") as url:
        yield url


@pytest.mark.server
def test_everything_works_through_a_server(server: str, tmp_path: Path) -> None:
    proxied, linked = bench(tmp_path / "proxied", server, None), bench(tmp_path / "linked", server)
    for desk in (proxied, linked):  # noqa: F402
        winner = desk.winner(desk.root.name)
        version = desk.registry.register(winner)
        assert desk.registry.register(winner).version == version.version
        assert desk.registry.lineage_json(version) == winner.lineage
        (desk.root / "got").mkdir()
        served = desk.registry.served_folder(version, desk.root / "got")
        artifact.verify(served, winner.digest)
        assert (served / "model.safetensors").samefile(winner.served / "model.safetensors") == (desk is linked)
        move(desk, version.version, "production")
        model_id = desk.registry.log_variant(desk.run_id, "x/y", METRICS)
        assert len(desk.registry.client.get_logged_model(model_id).metrics) == len(METRICS)
    assert desk.registry.rollback(MODEL, "ada", "back").version == "1"
    assert [one.stage for one in desk.registry.versions(MODEL)] == ["production", "archived"]
    assert desk.registry.history(MODEL).faults == ()
    with pytest.raises(GateError, match="no registered model 'nobody'"):
        desk.registry.get("nobody", "champion")


def test_a_version_whose_time_was_taken_out_of_the_database_is_read() -> None:
    found = registry.RegisteredVersion.of(ModelVersion("m", 1, creation_timestamp=None), {})
    assert (found.version, found.created_s) == ("1", 0)
