"""The address that MLflow's webhooks call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from featherweight.registry.guarding.deliveries import Deliveries, Refused

PATH, HEALTH = "/mlflow", "/health"
BODY_BYTES = 2**17  # the longest tag that MLflow takes, several times


class Receiver:
    """An ASGI application. heard: is given the name of each model that a believed delivery is about, and returns at once."""

    def __init__(self, deliveries: Deliveries, heard: Callable[[str], None]) -> None:
        self._deliveries, self._heard = deliveries, heard

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            return
        try:
            status, text = await self._answer(Request(scope, receive))
        except ClientDisconnect:
            return
        await PlainTextResponse(f"{text}\n", status)(scope, receive, send)

    async def _answer(self, request: Any) -> tuple[int, str]:
        if (request.method, request.url.path) == ("GET", HEALTH):
            return 200, "ready"
        if (request.method, request.url.path) != ("POST", PATH):
            return 404, f"MLflow's webhooks go to {PATH}"
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > BODY_BYTES:
                return 413, "too long"
        try:
            model = self._deliveries.model(dict(request.headers), body)
        except Refused as refused:
            return refused.status, str(refused)
        if model:
            self._heard(model)
        return 202, "thank you"
