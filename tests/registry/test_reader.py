"""Who may read alone, by a real MLflow server's users: every command that reads answers, tells what is behind, writes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from featherweight.errors import Forbidden, GateError
from featherweight.registry.browsing.access import Access
from featherweight.registry.browsing.application import Page
from featherweight.registry.out_of_band import look
from featherweight.registry.promotion import gated_transition
from featherweight.registry.registry import Registry
from featherweight.registry.retention import collect
from featherweight.registry.serving.following import named
from featherweight.store.workspace import Workspace
from flows.audit import audit, audit_registry
from flows.comparing import compared
from flows.deploy import deploy
from flows.history import history_of
from flows.impact import depending
from flows.mcp_server import Reading
from flows.ui import ByHand
from tasks.summary import past_result
from tests.support.mlflow_server import mlflow_server
from tests.support.paths import ROOT
from tests.support.registering import MODEL, Bench, bench

pytestmark = [pytest.mark.slow, pytest.mark.server]
ADMIN, READER, SECRET = "admin", "reader", "a long password"
SETTINGS = ROOT / "mlflow" / "basic_auth.ini"


def become(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A champion beside another version, which somebody made MLflow's champion; and a user who may read."""
    settings = tmp_path / "basic_auth.ini"
    settings.write_text(SETTINGS.read_text().replace("sqlite:///", f"sqlite:///{tmp_path}/"))
    told = {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_AUTH_ADMIN_PASSWORD": SECRET}
    told["MLFLOW_FLASK_SERVER_SECRET_KEY"] = SECRET
    become(ADMIN, monkeypatch)
    with mlflow_server(tmp_path, f"sqlite:///{tmp_path}/mlflow.db", 1, "--app-name", "basic-auth", **told) as url:
        user = {"username": READER, "password": SECRET}
        httpx.post(f"{url}/api/2.0/mlflow/users/create", json=user, auth=(ADMIN, SECRET), timeout=60).raise_for_status()
        desk = bench(tmp_path / "desk", url, None)
        for name in ("one", "two"):
            desk.registry.register(desk.winner(name))
        gated_transition(desk.registry, MODEL, "1", who="ada", why="first")
        desk.registry.client.set_registered_model_alias(MODEL, "champion", "2")
        yield desk


def test_every_reader_is_answered_and_told_what_is_behind(moved: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", moved.registry.tracking_uri)
    before, workspace = moved.state(), Workspace.at(moved.root)
    become(READER, monkeypatch)
    with pytest.raises(Forbidden, match="does not let this user do that"):
        Registry(workspace.tracking_uri).transition(MODEL, "2", "production", who="eve", why="x")
    told = {
        "history": history_of(workspace, MODEL).to_text(),
        "lineage": audit(workspace, MODEL, True).to_text(),
        "audit": audit_registry(workspace, MODEL, False).to_text(),
        "compare": compared(workspace, f"{MODEL}/1", "2").to_text(),
        "impact": depending(workspace, "", "", "torch").to_text(),
        "deploy": deploy(workspace, MODEL, "folder", moved.root / "out", "", "").to_text(),
        "mcp": Reading(moved.root).lineage(MODEL)["behind"],
    }
    for command, text in told.items():
        words = {"audit": "alias champion  somebody set it to 2", "impact": f"out of step (`featherweight audit`): {MODEL}"}
        assert words.get(command, "alias champion went from 1 to 2") in text, (command, text)
    assert not collect(workspace, 0.0, "reader").removed
    seen, left = look(Registry(workspace.tracking_uri), MODEL)  # as `serve` does, and `watch` before each optimization
    assert named(seen, "champion").version == "1" and left is not None and left.why.endswith("not recorded: no right to write")
    with pytest.raises(GateError, match="no finished optimization"):  # as `variants` does
        past_result(workspace, "")
    on_the_page(workspace)
    with pytest.raises(Forbidden, match="does not let this user do that"):
        audit_registry(workspace, MODEL, True)
    become(ADMIN, monkeypatch)
    assert moved.state() == before
    hide_history(moved, monkeypatch)


def on_the_page(workspace: Workspace) -> None:
    """`ui` shows all, and a decision is refused in one line."""
    access = Access(4100)
    page = Page(Registry(workspace.tracking_uri), ByHand(workspace), access, "here")
    browser = TestClient(page.application(), "http://127.0.0.1:4100")
    assert "one" in browser.get("/", params={"token": access.token}).text
    shown = browser.get("/model", params={"name": MODEL})
    told = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', shown.text))
    form = {**told, "version": "2", "to": "staging", "why": "mine"}
    assert "does not let this user do that" in browser.post("/promote", data=form, headers={"origin": str(browser.base_url)}).text


def hide_history(moved: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may read the model and not what was decided of it is told so in one line, not that entries were removed."""
    url, side = moved.registry.tracking_uri, f"{MODEL}.history"
    right = {"username": READER, "resource_type": "registered_model", "resource_id": side, "permission": "DENY"}
    way = f"{url}/api/3.0/mlflow/users/permissions/grant"
    httpx.post(way, json=right, auth=(ADMIN, SECRET), timeout=60).raise_for_status()
    become(READER, monkeypatch)
    for ask in (Registry(url).all_models, lambda: history_of(Workspace.at(moved.root), MODEL)):
        with pytest.raises(Forbidden, match=rf"^MLflow does not let this user read '{side}', which holds what was decided; ask"):
            ask()
