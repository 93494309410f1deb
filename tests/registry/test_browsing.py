"""The page over all models and runs: what it shows, whom it answers, and that it decides as the commands do."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from featherweight.registry.browsing import application
from featherweight.registry.browsing.access import OWN_PAGE, Access
from featherweight.registry.browsing.application import Page
from featherweight.store.workspace import Workspace
from flows.listening import answering, listening
from flows.ui import ByHand
from tests.support.browser import CHROMIUM, browser
from tests.support.registering import METRICS, MODEL, Bench, bench

BASE = "http://127.0.0.1:4100"
EVIL = "<script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Two champions one after the other, one version that waits for a person, one with a hostile name, and a run with a report."""
    found = bench(tmp_path_factory.mktemp("shelf"))
    registry = found.registry
    for name in ("one", "two"):
        registry.register(found.winner(name))
        registry.transition(MODEL, str(len(registry.versions(MODEL))), "production", who="ada", why=f"made {name}")
    better = METRICS | {"speedup_1": 9.9, "speedup_1_low": 9.5, "speedup_1_high": 10.3}
    registry.register(found.winner("three", promote={"approval": "required"}, metrics=better))
    registry.transition(MODEL, "3", "staging", who="ada", why="it waits")
    registry.client.create_model_version(MODEL, "nowhere", tags={"featherweight.variant": EVIL, "featherweight.metrics": "[1]"})
    for key, value in {"kind": "optimization", "recipe": EVIL, "winner": "two"}.items():
        registry.client.set_tag(found.run_id, f"featherweight.{key}", value)
    registry.client.log_text(found.run_id, "<h1>the report</h1>", "report.html")
    registry.client.set_terminated(found.run_id)
    return found


def page_of(shelf: Bench, access: Access) -> Page:
    workspace = Workspace(shelf.root, shelf.registry.tracking_uri)
    return Page(shelf.registry, ByHand(workspace), access, "here", lambda: {"Prefect": "http://127.0.0.1:4200", "MLflow": ""})


@pytest.fixture(scope="module")
def access() -> Access:
    return Access(4100)


@pytest.fixture(scope="module")
def client(shelf: Bench, access: Access) -> TestClient:
    """A browser that came by the printed address."""
    found = TestClient(page_of(shelf, access).application(), BASE, follow_redirects=True)
    assert found.get("/", params={"token": access.token}).url == f"{BASE}/"
    return found


def form(client: TestClient, action: str, model: str = MODEL) -> dict[str, str]:
    """The hidden fields of a form of the model's page."""
    page = client.get("/model", params={"name": model}).text
    found = re.search(f'action="/{action}".*?</form>', page, re.DOTALL)
    assert found is not None
    return {name: unescape(value) for name, value in re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', found[0])}


def send(client: TestClient, action: str, origin: str = BASE, **fields: str) -> Any:
    return client.post(f"/{action}", data={**form(client, action), **fields}, headers={"origin": origin})


def test_all_is_shown_and_what_others_named_is_text(client: TestClient) -> None:
    home = client.get("/")
    assert f"{MODEL}/3, three: approve or refuse" in home.text and "1 model, 1 run" in home.text
    assert EVIL not in home.text and "&lt;script&gt;" in home.text and "<script" not in home.text
    assert home.headers["content-security-policy"] == OWN_PAGE and home.headers["referrer-policy"] == "same-origin"
    model = client.get("/model", params={"name": MODEL})
    assert "it waits" in model.text and "Go back to version 1, one" in model.text and EVIL not in model.text
    version = client.get("/version", params={"model": MODEL, "number": "3"})
    assert "What it is made of" in version.text and "text/evaluation" in version.text
    assert ".card" in client.get("/style.css").text


def test_what_is_left_out_is_told(client: TestClient, shelf: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "SHOWN", 1)
    assert "1 model, the latest 1 run<" in client.get("/").text
    shelf.registry.client.create_registered_model("theirs")
    try:
        page = client.get("/model", params={"name": "theirs"}).text
        assert "no version to decide about" in page and 'action="/promote"' not in page
    finally:
        shelf.registry.client.delete_registered_model("theirs")


def test_a_report_has_no_origin_and_no_other_file_is_one(client: TestClient, shelf: Bench) -> None:
    report = client.get("/report", params={"run": shelf.run_id})
    assert report.text == "<h1>the report</h1>"
    assert report.headers["content-security-policy"].startswith("sandbox allow-scripts; default-src 'none'")
    for run in ("", "../mlflow.db", shelf.run_id[:-1], "0" * 32, f"{shelf.run_id}/../../mlflow.db"):
        assert client.get("/report", params={"run": run}).status_code == 404
    assert client.get("/../mlflow.db").status_code == 404
    assert client.get("/model", params={"name": "nobody"}).status_code == 404


def test_only_who_came_by_the_address_is_answered(shelf: Bench, access: Access) -> None:
    stranger = TestClient(page_of(shelf, access).application(), BASE, follow_redirects=False)
    for path in ("/", f"/model?name={MODEL}", "/style.css", "/?token=wrong", "/nowhere"):
        assert stranger.get(path).status_code == 403
    assert stranger.post("/rollback", headers={"origin": BASE}).status_code == 403
    assert access.token not in repr(access) and access.session not in repr(access)
    stranger.cookies.set(access.cookie, access.session)
    assert stranger.get("/").status_code == 200
    assert stranger.get("/", headers={"host": "evil.example:4100"}).status_code == 421


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:5000", "null", ""])
def test_no_other_page_decides(client: TestClient, shelf: Bench, origin: str) -> None:
    before = shelf.state()
    assert send(client, "rollback", origin, why="not yours").status_code == 403
    assert shelf.state() == before


@pytest.mark.parametrize("wrong", [{"form": "guessed"}, {"form": ""}, {"why": "x" * 20_000}])
def test_no_other_form_decides(client: TestClient, shelf: Bench, wrong: dict[str, str]) -> None:
    before = shelf.state()
    assert send(client, "rollback", **{"why": "not yours", **wrong}).status_code == 403
    assert client.post("/rollback", json=form(client, "rollback"), headers={"origin": BASE}).status_code == 403
    assert client.get("/rollback").status_code == 405
    assert shelf.state() == before


def test_what_the_gates_refuse_is_refused_and_told(client: TestClient, shelf: Bench) -> None:
    before = shelf.registry.history(MODEL).head
    told = send(client, "promote", version="3", to="production", why="past the person").text
    assert 'role="alert"' in told and "wants a person" in told and '<b class="bad">refused</b> approval' in told
    assert "unknown stage" in send(client, "promote", version="3", to="heaven", why="x").text
    assert "needs who does it and why" in send(client, "promote", version="4", to="archived", why=" ").text
    assert 'role="alert"' in send(client, "promote", version="4", to="production", why="hostile").text
    assert shelf.registry.history(MODEL).head == before


def test_what_was_shown_is_what_is_decided_about(client: TestClient, shelf: Bench) -> None:
    """A form sent twice, or from a page of before another's decision, decides nothing more."""
    first, again = form(client, "rollback"), form(client, "rollback")
    assert first["head"] == again["head"]
    for fields, told in ((first, "is now in production: too slow"), (again, "the history went on since the page was shown")):
        assert told in client.post("/rollback", data={**fields, "why": "too slow"}, headers={"origin": BASE}).text
    last = shelf.registry.history(MODEL).transitions[-1]
    assert (last.action, last.why) == ("rollback", "too slow")
    assert shelf.registry.champion(MODEL).version == "1"


def test_the_start_prints_the_address_and_ends_on_a_signal(shelf: Bench) -> None:
    import signal
    import subprocess
    import sys

    import httpx

    command = [sys.executable, "-m", "flows.cli", "ui", "-w", str(shelf.root), "--port", "0", "--no-browser", "--no-servers"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[-1]
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{43}", address)
            home = httpx.get(address, follow_redirects=True, timeout=300)
            assert (home.status_code, MODEL in home.text, "token" in str(home.url)) == (200, True, False)
            process.send_signal(signal.SIGTERM)
            assert process.wait(300) == 0
        finally:
            process.kill()


LABELLED = "[...document.querySelectorAll('input:not([type=hidden]), select')].every(e => e.labels.length)"
HEADED = "[...document.querySelectorAll('table')].every(t => t.querySelector('th[scope=col], th[scope=row]'))"


def test_a_person_approves_by_clicks_and_goes_back_by_keys(tmp_path: Path, shelf: Bench) -> None:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: the page was not used in a browser")
    with listening("127.0.0.1", 0) as listener:
        access = Access(listener.getsockname()[1])
        base = f"http://127.0.0.1:{access.port}"
        with answering(page_of(shelf, access).application(), listener), browser(tmp_path) as tab:
            tab.go(f"{base}/?token={access.token}")
            tab.shows("location.search === '' && document.querySelector('h1') !== null")
            assert tab.see("document.title") == "Models and runs · Featherweight"
            assert tab.see("getComputedStyle(document.body).fontSize") == "15px"  # its style is let through
            tab.click(".waiting a")
            tab.shows("document.title.startsWith('little-llama/3')")
            assert tab.see(LABELLED) and tab.see(HEADED) and tab.see("document.querySelectorAll('main, header, nav').length") == 3
            tab.click("[action='/approve'] [name=smoke]")
            tab.click("[action='/approve'] [name=why]")
            tab.write("tried <b>it</b>")
            tab.click("[action='/approve'] [value=approve]")
            tab.shows("document.title.startsWith('Done')")
            assert tab.see("document.querySelector('[role=status] p').textContent").endswith("in production: tried <b>it</b>")
            assert tab.see(LABELLED) and tab.see(HEADED)
            tab.see("document.querySelector('[action=\"/rollback\"] [name=why]').focus()")
            tab.write("slower at night")
            tab.press("Tab")
            assert tab.see("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            tab.press("Enter")
            tab.shows("document.querySelector('[role=status] p')?.textContent.endsWith('slower at night')")
            tab.click("[action='/audit'] button")
            tab.shows(
                "/not ok|all \\d+ ok/.test(document.querySelector('[aria-labelledby=audit-title] [role=status]')?.textContent)"
            )
            tab.go(f"{base}/report?run={shelf.run_id}")
            assert tab.see("origin") == "null"
    assert [one.why for one in shelf.registry.history(MODEL).transitions[-1:]] == ["slower at night"]
