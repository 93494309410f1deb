"""The front: one address that stays while the versions behind it change. It passes requests on, and tells reasons, not traces."""

from __future__ import annotations

import asyncio
import hmac
import json
import sys
import threading
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import one_line
from featherweight.registry.serving.backend import ANSWER_S, Backend

if TYPE_CHECKING:
    import httpx
    from starlette.requests import Request
    from starlette.responses import Response

BODY_BYTES = 32 * 2**20
REASON_BYTES = 2**20
IDLE_S = 2.0  # below the 5 s after which servers close a connection that idles: none is taken that is being closed
VERSION_HEADER = "x-featherweight-version"
ROOTS = tuple(
    sorted({str(Path(root).resolve()) for root in (sys.prefix, sys.base_prefix, Path(__file__).parents[3])}, reverse=True)
)


class Front:
    """An ASGI application that passes requests to the active backend.

    hosts: the only values of `Host` that are answered, any for none: a page of another site cannot reach a server on this
    machine by a name of its own. token: what `Authorization: Bearer` has to hold, '' for no such header.
    """

    def __init__(self, hosts: Collection[str] = (), token: str = "") -> None:
        self._hosts, self._token = hosts, token
        self._active: Backend | None = None
        self._note = "starting"
        self._lock = threading.Lock()
        self._clients: dict[Backend, httpx.AsyncClient] = {}

    def switch(self, backend: Backend) -> Backend | None:
        """Let a backend answer every request from now on; returns the one before, which still answers those that it has."""
        with self._lock:
            before, self._active = self._active, backend
            return before

    def note(self, text: str) -> None:
        """What health tells beside the version, '' where all is well."""
        self._note = text

    def forget(self, backend: Backend) -> None:
        """Let go of the connections to a backend that has no request any more."""
        self._clients.pop(backend, None)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        from starlette.requests import ClientDisconnect, Request

        if scope["type"] != "http":
            return
        try:
            response = await self._answer(Request(scope, receive))
        except ClientDisconnect:
            return
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path = request.url.path
        if self._hosts and (request.url.hostname or "") not in self._hosts:
            return _refusal(421, "BAD_REQUEST", "this server answers to the address that it was started with")
        if path in ("/health", "/ping"):
            return self._health()
        if self._token and not hmac.compare_digest(
            request.headers.get("authorization", "").encode(), f"Bearer {self._token}".encode()
        ):
            return _refusal(401, "UNAUTHENTICATED", "give the token: Authorization: Bearer ...")
        body = await _body(request)
        if body is None:
            return _refusal(413, "BAD_REQUEST", f"a request holds at most {BODY_BYTES // 2**20} MiB")
        backend = self._taken()
        if backend is None:
            return _refusal(503, "TEMPORARILY_UNAVAILABLE", "the model is not loaded yet; try again in a moment")
        if path not in backend.server.paths:
            backend.release()
            return _refusal(
                404, "ENDPOINT_NOT_FOUND", f"nothing is served at {path[:100]}; paths: {', '.join(backend.server.paths)}"
            )
        return await self._passed_on(backend, request, body)

    def _taken(self) -> Backend | None:
        """The active backend, with one request more."""
        with self._lock:
            if self._active is not None:
                self._active.take()
            return self._active

    def _health(self) -> Response:
        from starlette.responses import JSONResponse

        backend = self._active
        if backend is None or not backend.alive:
            return JSONResponse({"status": "starting", "note": self._note}, 503)
        version = backend.copy.version
        told = {"model": version.model, "version": version.version, "variant": version.variant, "engine": version.tag("engine")}
        return JSONResponse({"status": "ready", **told, "note": self._note})

    async def _passed_on(self, backend: Backend, request: Request, body: bytes) -> Response:
        """The backend's answer, piece by piece as it comes; what it says of an error in one line."""
        import httpx

        client = self._clients.get(backend) or self._clients.setdefault(backend, _client(backend))
        kept = {name: value for name in ("content-type", "accept") if (value := request.headers.get(name))}
        url = httpx.URL("http://backend", path=request.url.path, query=request.url.query.encode())
        try:
            answer = await client.send(client.build_request(request.method, url, headers=kept, content=body), stream=True)
            if answer.status_code >= 400:
                reason = await _reason(answer, backend)
                await answer.aclose()
                backend.release()
                return reason
        except httpx.HTTPError as error:
            backend.release()
            late = isinstance(error, httpx.TimeoutException)
            why = f"no answer within {ANSWER_S:.0f} s" if late else "the engine ended while it answered; it is started anew"
            return _refusal(504 if late else 502, "TEMPORARILY_UNAVAILABLE", why)
        except BaseException:
            backend.release()
            raise
        return _passed(answer, backend)


def _client(backend: Backend) -> httpx.AsyncClient:
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=IDLE_S)
    transport = httpx.AsyncHTTPTransport(uds=str(backend.socket), limits=limits)
    return httpx.AsyncClient(transport=transport, timeout=httpx.Timeout(ANSWER_S, connect=30.0), trust_env=False)


def _passed(answer: httpx.Response, backend: Backend) -> Response:
    """An answer on its way to who asked; the request is in flight until that ends, however it does."""
    from starlette.responses import StreamingResponse

    class Passed(StreamingResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await super().__call__(scope, receive, send)
            finally:
                backend.release()
                await asyncio.shield(answer.aclose())

    version = backend.copy.version
    headers = {VERSION_HEADER: f"{version.model}/{version.version}", "content-type": answer.headers.get("content-type", "")}
    return Passed(answer.aiter_bytes(), answer.status_code, headers)


async def _body(request: Request) -> bytes | None:
    """A request's body, None where it is too long."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > BODY_BYTES:
            return None
        parts.append(part)
    return b"".join(parts)


async def _reason(answer: httpx.Response, backend: Backend) -> Response:
    """What a server says of an error: the reason in one line, without a trace, the request's own words at length, or a path."""
    said = b""
    async for piece in answer.aiter_bytes():
        said += piece
        if len(said) > REASON_BYTES:
            break
    code, text = _told(said)
    for root in (str(backend.copy.folder.parent), *ROOTS):
        text = text.replace(root, "...")
    return _refusal(answer.status_code, code, text)


def _told(said: bytes) -> tuple[str, str]:
    """Code and reason in the body of an error of MLflow's server, or of one that speaks as OpenAI's."""
    try:
        body: Any = json.loads(said)
    except ValueError:
        body = said.decode(errors="replace")
    if isinstance(body, dict):
        body = body.get("error", body) if isinstance(body.get("error", body), dict) else {"message": body["error"]}
        code = str(body.get("error_code") or body.get("type") or "BAD_REQUEST")
        body = body.get("message") or body.get("detail") or "the request was refused"
    else:
        code = "BAD_REQUEST"
    return code, one_line(str(body).partition("; its last words")[0].partition("Traceback (most recent")[0], 400)


def _refusal(status: int, code: str, reason: str) -> Response:
    from starlette.responses import JSONResponse

    headers = {"retry-after": "5"} if status == 503 else None
    return JSONResponse({"error_code": code, "message": reason}, status, headers)
