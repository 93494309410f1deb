"""What MLflow's webhooks deliver is believed where it is signed, new and ours; a move is undone by the look that it asks for."""

from __future__ import annotations

import base64
import hmac
import json
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import pytest
from mlflow.entities.webhook import WebhookEvent
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore
from mlflow.webhooks import delivery as delivery_of_mlflow

from featherweight.errors import ServiceError
from featherweight.registry.guarding.deliveries import Deliveries, Refused
from featherweight.registry.guarding.guard import Guard
from featherweight.registry.guarding.receiver import BODY_BYTES, Receiver
from featherweight.registry.guarding.subscription import NAME, Subscription, owners_secret
from featherweight.registry.registry import Registry
from featherweight.system.servers import LOCAL
from flows.listening import answering, listening
from tests.support.registering import MODEL, plain_versions
from tests.support.stores import empty_store

SECRET, NOW = "s" * 64, 1_800_000_000
MOVED = {"entity": "model_version_alias", "action": "created", "data": {"name": MODEL, "alias": "champion", "version": "2"}}


def delivery(body: bytes, id: str = "1", sent: object = NOW, secret: str = SECRET) -> dict[str, str]:
    """The headers that MLflow sends with a body."""
    digest = hmac.new(secret.encode(), f"{id}.{sent}.".encode() + body, "sha256").digest()
    signature = "v1," + base64.b64encode(digest).decode()
    return {"x-mlflow-delivery-id": id, "x-mlflow-timestamp": str(sent), "x-mlflow-signature": signature}


def told(headers: dict[str, str], body: bytes, deliveries: Deliveries | None = None) -> str | int:
    """The model that a delivery names, or the status by which it is refused."""
    try:
        return (deliveries or Deliveries(SECRET, lambda: NOW)).model(headers, body)
    except Refused as refused:
        return refused.status


def body_of(changes: dict[str, Any]) -> bytes:
    return json.dumps(MOVED | changes).encode()


def test_a_delivery_is_believed_once_and_only_as_it_was_signed() -> None:
    body = body_of({})
    right = delivery(body)
    forged = {
        "another secret": delivery(body, secret="t" * 64),
        "no secret": delivery(body, secret=""),
        "no signature": {**right, "x-mlflow-signature": ""},
        "another version of the signature": {**right, "x-mlflow-signature": right["x-mlflow-signature"].replace("v1", "v2")},
        "two signatures": {**right, "x-mlflow-signature": f"{right['x-mlflow-signature']} v1,x"},
        "another id": {**right, "x-mlflow-delivery-id": "2"},
        "no id": delivery(body, id=""),
        "another time": {**right, "x-mlflow-timestamp": str(NOW + 1)},
        "letters beyond ASCII": {**right, "x-mlflow-signature": "v1,\xe9"},
        "nothing": {},
    }
    assert {name: told(headers, body) for name, headers in forged.items()} == dict.fromkeys(forged, 401)
    assert told(right, body.replace(b'"2"', b'"3"')) == 401
    for sent in (NOW - 1, NOW + 301, "", "nan", "-1", "1e9", "9" * 400, "٣"):
        assert told(delivery(body, sent=sent), body) == 403, sent
    deliveries = Deliveries(SECRET, lambda: NOW)
    assert [told(right, body, deliveries) for _ in range(3)] == [MODEL, 409, 409]
    assert told(delivery(body, id="2"), body, deliveries) == MODEL


def test_what_was_taken_is_forgotten_once_its_time_alone_refuses_it() -> None:
    clock = [NOW]
    deliveries = Deliveries(SECRET, lambda: clock[0])
    for id in range(50):
        assert told(delivery(body_of({}), id=str(id)), body_of({}), deliveries) == MODEL
    clock[0] += 301
    assert told(delivery(body_of({}), id="1"), body_of({}), deliveries) == 403
    assert deliveries._taken == {}


def test_only_what_the_history_decides_is_looked_at() -> None:
    def asked(body: bytes) -> str | int:
        return told(delivery(body), body)

    tag = {"entity": "model_version_tag", "data": {"name": MODEL, "version": "2", "key": "featherweight.stage", "value": "none"}}
    assert asked(body_of(tag)) == MODEL
    assert asked(body_of({"data": {"name": MODEL, "alias": "mine"}})) == ""
    assert asked(body_of({**tag, "data": {**tag["data"], "key": "note"}})) == ""  # type: ignore[dict-item]
    shapes = [body_of(one) for one in ({"data": []}, {"data": {}}, {"entity": 1})]
    for nonsense in (b"", b"[]", b'"a"', b"\xff", b"[" * 100_000, *shapes):
        assert asked(nonsense) == 400


def test_the_secret_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "guard" / "secret"
    secret = owners_secret(path)
    assert (len(secret), owners_secret(path), path.stat().st_mode & 0o777) == (64, secret, 0o600)
    path.chmod(0o640)
    with pytest.raises(ServiceError, match=r"others may read .*secret"):
        owners_secret(path)


@pytest.mark.slow
def test_mlflows_own_delivery_undoes_what_was_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sender and its store, without the server around them."""
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    monkeypatch.setattr(delivery_of_mlflow, "_webhook_cache", None)  # of the whole process, for a minute
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    address = f"sqlite:///{tmp_path}/mlflow.db"
    registry, heard = Registry(address), SimpleQueue[str]()
    plain_versions(registry.client, MODEL, 2)
    registry.transition(MODEL, "1", "production", who="ada", why="first")
    said: list[tuple[str, str]] = []
    with listening(LOCAL, 0) as listener, answering(Receiver(Deliveries(SECRET), heard.put), listener):
        url = f"http://{LOCAL}:{listener.getsockname()[1]}"
        guard = Guard(registry, Subscription(registry.client, f"{url}/mlflow", SECRET), 3600, lambda *one: said.append(one))
        guard.turn()
        assert [(one.name, one.url) for one in registry.client.list_webhooks()] == [(NAME, f"{url}/mlflow")]
        registry.client.set_registered_model_alias(MODEL, "champion", "2")
        event: Any = WebhookEvent.from_str("model_version_alias.created")
        delivery_of_mlflow.deliver_webhook(event=event, payload=MOVED["data"], store=SqlAlchemyStore(address))  # type: ignore[arg-type]
        guard.hear(heard.get(timeout=300))
        guard.turn()
        assert httpx.post(f"{url}/mlflow", json=MOVED).status_code == 401
        assert httpx.post(f"{url}/mlflow", content=b"x" * (BODY_BYTES + 1)).status_code == 413
        assert (httpx.get(f"{url}/health").status_code, httpx.get(f"{url}/mlflow").status_code) == (200, 404)
    assert registry.client.get_model_version_by_alias(MODEL, "champion").version == 1
    assert [event for event, _ in said] == ["moved"]
    assert said[0][1].startswith(f"{MODEL}: out of band, entry 2: alias champion went from 1 to 2; undone")
    assert heard.empty()


@pytest.mark.slow
def test_what_no_webhook_tells_is_seen_by_the_look_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's own stages, and everything where it sends no webhooks; a webhook that was changed or removed is made again."""
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    registry = Registry(f"sqlite:///{tmp_path}/mlflow.db")
    plain_versions(registry.client, MODEL, 2)
    registry.transition(MODEL, "1", "production", who="ada", why="first")
    said: list[tuple[str, str]] = []
    guard = Guard(registry, Subscription(registry.client, "http://localhost:1/mlflow", SECRET), 30, lambda *one: said.append(one))
    registry.client.transition_model_version_stage(MODEL, "2", "Production")
    guard.look_at_all()
    guard.look_at_all()
    assert [event for event, _ in said] == ["note", "moved"]
    assert (
        "moves are seen every 30 s only" in said[0][1] and "stage of version 2 went from None to Production; undone" in said[1][1]
    )
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    guard.look_at_all()
    client = registry.client
    client.update_webhook(client.list_webhooks()[0].webhook_id, status="DISABLED")
    guard.look_at_all()
    assert [str(one.status) for one in client.list_webhooks()] == ["ACTIVE"]
    client.delete_webhook(client.list_webhooks()[0].webhook_id)
    monkeypatch.setattr(Registry, "all_models", lambda _: (_ for _ in ()).throw(ServiceError("MLflow is away")))
    guard.look_at_all()
    guard.look_at_all()
    assert len(client.list_webhooks()) == 1
    assert [text for _, text in said[2:]] == ["no look at the registered models: MLflow is away"]
