"""A witness that a team keeps: who rewrites everything in MLflow, and has no keys of ours, is found out from there."""

from __future__ import annotations

from pathlib import Path

import pytest

from featherweight.errors import IntegrityError, ServiceError
from featherweight.registry.keys import Keys
from featherweight.registry.shared_witness import WITNESS, Record, last
from featherweight.store.workspace import Workspace
from flows.audit import audit_registry
from tests.support.registering import MODEL, Bench, desk, plain_versions

pytestmark = pytest.mark.slow

__all__ = ["desk"]
SIDE = f"{MODEL}.history"


def decided(desk: Bench, count: int = 2) -> None:
    plain_versions(desk.registry.client, MODEL, count)
    for number in range(1, count + 1):
        desk.registry.transition(MODEL, str(number), "production", who="ada", why="a test")


def truncated(desk: Bench) -> None:
    """The newest entry, and every mark of it in MLflow, as somebody removes them who may write everything there."""
    client = desk.registry.client
    client.delete_model_version(SIDE, "2")
    client.delete_registered_model_tag(MODEL, "featherweight.history_head")


def found_out(desk: Bench) -> None:
    found = audit_registry(Workspace.at(desk.root), MODEL, False)
    assert any("history entry 2, which was seen" in one.reason for one in found.wrong)
    with pytest.raises(IntegrityError, match="nothing is decided on it"):
        desk.registry.rollback(MODEL, "eve", "x")
    repaired = audit_registry(Workspace.at(desk.root), MODEL, True)
    assert "entry 2 was removed or altered: what is left counts" in repaired.to_text()
    desk.registry.transition(MODEL, "2", "production", who="ada", why="again")
    assert desk.registry.champion(MODEL).version == "2"  # type: ignore[union-attr]


def test_a_file(desk: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine, which never saw the history, finds it out too: it has no witness of its own."""
    monkeypatch.setenv("FEATHERWEIGHT_KEYS", str(tmp_path / "none"))
    monkeypatch.setenv(WITNESS, str(tmp_path / "team" / "witness.jsonl"))
    decided(desk)
    truncated(desk)
    found_out(desk)


@pytest.mark.server
def test_an_s3_prefix(desk: Bench, s3_server, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv(WITNESS, f"s3://{s3_server.bucket}/witness")
    decided(desk)
    assert len(list((s3_server.root / s3_server.bucket / "witness").rglob("*.json"))) == 2
    truncated(desk)
    found_out(desk)
    monkeypatch.setenv(WITNESS, "s3://no-such-bucket/witness")
    with pytest.raises(ServiceError):
        desk.registry.rollback(MODEL, "ada", "nobody knows what was seen")


def test_what_others_write_there_hides_nothing(desk: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Junk, a record of no trusted key, and an old one that is copied behind the last."""
    path = tmp_path / "witness.jsonl"
    monkeypatch.setenv("FEATHERWEIGHT_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv(WITNESS, str(path))
    Keys.here().make()
    decided(desk)
    first, second = path.read_text().splitlines()
    (record,) = last(desk.registry.model(MODEL).born, Keys.here())
    assert Record.from_json(second, Keys.here()) == record and record.place == 2
    forged = Record(record.born, 9, "1:forged").to_json(Keys(tmp_path / "nobody"))
    path.write_text("\n".join([first, second, first, forged, "{", '{"text": "[1]"}', ""]))
    (tmp_path / "keys" / "witness.json").unlink()
    assert last(record.born, Keys.here()) == [record]
    truncated(desk)
    found_out(desk)
