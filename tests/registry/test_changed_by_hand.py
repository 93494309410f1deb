"""What other hands did to the registry in MLflow: each is told in one line with the way out, and nobody is locked out."""

from __future__ import annotations

import sqlite3
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from featherweight.errors import CheckpointError, Forbidden, GateError, ServiceError, Unreachable
from featherweight.registry.promotion import gated_transition
from featherweight.store.mlflow_errors import mlflow_explained
from featherweight.store.tracking import open_artifacts
from featherweight.store.workspace import Workspace
from tests.support.registering import MODEL, Bench, desk, empty_store

pytestmark = pytest.mark.slow

__all__ = ["desk"]


def champions(desk: Bench, count: int) -> None:
    """Register versions 1 to `count`, each champion in its turn."""
    for number in range(1, count + 1):
        version = desk.registry.register(desk.winner(f"v{number}"))
        desk.registry.transition(MODEL, version.version, "production", who="ada", why="a test")


def delete_but_keep_alias(desk: Bench, version: str, alias: str) -> None:
    """Delete a version as MLflow servers before 3.17 do over REST: its alias stays."""
    desk.registry.client.delete_model_version(MODEL, version)
    with sqlite3.connect(desk.root / "mlflow.db") as base:
        names = [row[1] for row in base.execute("pragma table_info(registered_model_aliases)")]
        values = {"alias": alias, "version": int(version), "name": MODEL, "workspace": "default"}
        marks = ",".join("?" * len(names))
        base.execute(f"insert into registered_model_aliases ({','.join(names)}) values ({marks})", [values[one] for one in names])


@pytest.mark.slow
def test_a_deleted_champion_is_named_and_another_is_promoted(desk: Bench) -> None:
    champions(desk, 2)
    delete_but_keep_alias(desk, "2", "champion")
    with pytest.raises(
        GateError, match="version 2 of 'little-llama', its champion, was deleted in MLflow; promote another"
    ) as told:
        desk.registry.get(MODEL, "champion")
    assert "\n" not in str(told.value)
    assert gated_transition(desk.registry, MODEL, "1", who="ada", why="the other is gone").changed
    champion = desk.registry.champion(MODEL)
    assert champion is not None
    assert champion.version == "1"
    assert desk.registry.history(MODEL).faults == ()


def test_a_deleted_champion_is_rolled_back_from(desk: Bench) -> None:
    champions(desk, 2)
    delete_but_keep_alias(desk, "2", "champion")
    assert desk.registry.rollback(MODEL, "ada", "gone").version == "1"


def test_there_is_no_rolling_back_to_a_deleted_version(desk: Bench) -> None:
    champions(desk, 2)
    delete_but_keep_alias(desk, "1", "previous")
    with pytest.raises(GateError, match="version 1 of 'little-llama', its previous, was deleted in MLflow"):
        desk.registry.rollback(MODEL, "ada", "back")
    assert desk.registry.get(MODEL, "champion").version == "2"


@pytest.mark.slow
def test_a_renamed_model_is_named_where_its_old_name_is_asked_for(desk: Bench) -> None:
    champions(desk, 2)
    desk.registry.client.rename_registered_model(MODEL, "llama-of-may")
    before = desk.state()
    line = "'little-llama' was renamed to 'llama-of-may' in MLflow; rename it back, or write `promote: {model: llama-of-may}`"
    for ask in (
        lambda: desk.registry.get(MODEL, "champion"),
        lambda: desk.registry.rollback(MODEL, "ada", "back"),
        lambda: desk.registry.register(desk.winner("v3")),
    ):
        with pytest.raises(GateError, match=line):
            ask()
    assert desk.state() == before
    assert desk.registry.rollback("llama-of-may", "ada", "back").version == "1"
    desk.registry.register(desk.winner("v4", model="llama-of-may"))
    desk.registry.register(desk.winner("v5"))  # the old name is free again


def test_a_deleted_experiment_is_told_with_the_way_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    workspace = Workspace.at(tmp_path)
    client = workspace.client()
    id = workspace.experiment(client, "ops")
    client.delete_experiment(id)
    with pytest.raises(ServiceError, match=rf"experiment 'ops' was deleted in MLflow; .*restore --experiment-id {id}`"):
        workspace.experiment(client, "ops")
    client.restore_experiment(id)
    assert workspace.experiment(client, "ops") == id


def test_errors_of_mlflow_are_one_line_and_those_of_others_pass(desk: Bench) -> None:
    client, uri = desk.registry.client, "postgresql://ada:hunter2@db/mlflow"
    with (
        pytest.raises(CheckpointError, match=r"there is no such run \(.*absent.*\)"),
        mlflow_explained(uri, CheckpointError("there is no such run")),
    ):
        client.get_run("absent")
    with (
        pytest.raises(ServiceError, match=r"^MLflow at postgresql://\*\*\*@db/mlflow failed: .*absent") as told,
        mlflow_explained(uri),
    ):
        client.get_run("absent")
    assert "\n" not in str(told.value)
    with pytest.raises(ZeroDivisionError), mlflow_explained(uri, CheckpointError("no"), files=True):
        1 / 0  # noqa: B018
    with pytest.raises(FileNotFoundError), mlflow_explained(uri):
        Path("absent").read_text()


def test_a_file_that_a_store_lists_and_does_not_give_is_named() -> None:
    """As MLflow's repositories of artifacts tell of it, in several lines."""
    from mlflow.exceptions import MlflowException

    said = (
        "The following failures occurred while downloading one or more artifacts from s3://b/m:\n##### File served/x.bin #####\n500"
    )
    line = r"^MLflow at http://mlflow has a file that its artifact store does not give: 'served/x.bin' of s3://b/m .*: 500$"
    with pytest.raises(ServiceError, match=line), mlflow_explained("http://mlflow"):
        raise MlflowException(said)


def test_such_a_file_is_asked_for_twice_at_each_try_of_mlflow(tmp_path: Path) -> None:
    """Its server sends clients to the store itself, where MLflow's own way is six times in a minute, and that three times."""
    from mlflow.utils.request_utils import download_chunk

    asked: list[str] = []

    class Failing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(500)

        def log_message(self, *_: object) -> None:
            pass

    open_artifacts(tmp_path.as_uri(), f"sqlite:///{tmp_path}/mlflow.db")
    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/x.bin"
        with pytest.raises(Exception, match="500"):
            download_chunk(range_start=0, range_end=9, headers={}, download_path=str(tmp_path / "x.bin"), http_uri=url)
        server.shutdown()
    assert asked == ["/x.bin"] * 2


@pytest.mark.parametrize(
    ("status", "kind"),
    [(403, Forbidden), (401, ServiceError), (404, ServiceError), (429, Unreachable), (502, Unreachable), (503, Unreachable)],
)
def test_what_a_server_says_without_json_is_no_server_that_is_away(status: int, kind: type[ServiceError]) -> None:
    """MLflow's own basic auth answers so, as gateways do."""
    from mlflow.utils.rest_utils import verify_rest_response
    from requests import Response

    answer = Response()
    answer.status_code, answer._content = status, b"Permission denied"
    with pytest.raises(ServiceError) as told, mlflow_explained("http://mlflow"):
        verify_rest_response(answer, "/api/2.0/mlflow/model-versions/create")
    assert type(told.value) is kind
