"""The front: one address that stays while the versions behind it change. It passes requests on, and tells reasons, not traces."""

from __future__ import annotations

import asyncio
import hmac
import re
import threading
from collections.abc import Collection
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from featherweight.errors import one_line
from featherweight.registry.serving.backend import ANSWER_S, Backend
from featherweight.registry.serving.parameters import unknown
from featherweight.registry.serving.reasons import reason, refusal
from featherweight.registry.serving.scoring import BODY_BYTES

if TYPE_CHECKING:
    import httpx
    from starlette.requests import Request
    from starlette.responses import Response

REASON_BYTES = 2**20
IDLE_S = 2.0  # below the 5 s after which servers close a connection that idles: none is taken that is being closed
BODY_S = 60.0
VERSION_HEADER = "x-featherweight-version"
ASCII_BUT_PERCENT = "".join(map(chr, range(32, 127))).replace("%", "")
METHODS = ("GET", "POST")
MODELS = "/v1/models"
"""Answered here: engines tell where the weights lie, too."""
HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([\w.-]+))(?::\d{1,5})?", re.ASCII)
CONTENT_TYPE = re.compile(r"[ -~]{0,200}")


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
        path = request.scope["path"]
        if self._hosts and _host(request) not in self._hosts:
            return refusal(421, "BAD_REQUEST", "this server answers to the address that it was started with")
        if path in ("/health", "/ping"):
            return self._health()
        if request.method not in METHODS:
            return refusal(405, "BAD_REQUEST", f"this server takes {' and '.join(METHODS)}")
        if self._token and not hmac.compare_digest(
            request.headers.get("authorization", "").encode(), f"Bearer {self._token}".encode()
        ):
            return refusal(401, "UNAUTHENTICATED", "give the token: Authorization: Bearer ...")
        if not CONTENT_TYPE.fullmatch(request.headers.get("content-type", "")):
            return refusal(415, "BAD_REQUEST", "the content type is none; send application/json")
        try:
            body = await asyncio.wait_for(_body(request), BODY_S)
        except TimeoutError:
            return refusal(408, "BAD_REQUEST", f"the request did not come within {BODY_S:.0f} s")
        if body is None:
            return refusal(413, "BAD_REQUEST", f"a request holds at most {BODY_BYTES // 2**20} MiB")
        return await self._asked(request, path, body)

    async def _asked(self, request: Request, path: str, body: bytes) -> Response:
        """What the active backend answers, where it serves the path."""
        backend = self._taken()
        if backend is None:
            return refusal(503, "TEMPORARILY_UNAVAILABLE", "the model is not loaded yet; try again in a moment")
        served = backend.server.paths
        if MODELS in served and path == f"{MODELS}/{backend.copy.version.model}":
            backend.release()
            return _answered(backend, _model(backend))
        if path not in served:
            backend.release()
            shown = one_line(path, 100)
            return refusal(404, "ENDPOINT_NOT_FOUND", f"nothing is served at {shown}; paths: {', '.join(served)}")
        if path == MODELS:
            backend.release()
            return _answered(backend, {"object": "list", "data": [_model(backend)]})
        if wrong := unknown(path, body, backend.known):
            backend.release()
            return refusal(400, "INVALID_PARAMETER_VALUE", wrong)
        return await self._passed_on(backend, request, path, body)

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

    async def _passed_on(self, backend: Backend, request: Request, path: str, body: bytes) -> Response:
        """The backend's answer, piece by piece as it comes; what it says of an error in one line."""
        import httpx

        client = self._clients.get(backend) or self._clients.setdefault(backend, _client(backend))
        try:
            kept = {"content-type": kind} if (kind := request.headers.get("content-type")) else {}
            asked = client.build_request(request.method, f"http://backend{path}", headers=kept, content=body)
            answer = await client.send(asked, stream=True)
            if answer.status_code < 400:
                return _passed(answer, backend)
            told = await _reason(answer)
            await answer.aclose()
        except httpx.HTTPError as error:
            late = isinstance(error, httpx.TimeoutException)
            why = f"no answer within {ANSWER_S:.0f} s" if late else "the engine ended while it answered; it is started anew"
            told = refusal(504 if late else 502, "TEMPORARILY_UNAVAILABLE", why)
        except BaseException:
            backend.release()
            raise
        backend.release()
        return told


def _model(backend: Backend) -> dict[str, Any]:
    """The one model that requests may name, as OpenAI's API tells of one."""
    version = backend.copy.version
    return {"id": version.model, "object": "model", "created": int(version.created_s), "owned_by": "featherweight"}


def _answered(backend: Backend, told: dict[str, Any]) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(told, headers=_answered_by(backend))


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

    headers = _answered_by(backend) | {"content-type": answer.headers.get("content-type", "")}
    return Passed(answer.aiter_bytes(), answer.status_code, headers)


def _answered_by(backend: Backend) -> dict[str, str]:
    version = backend.copy.version
    return {VERSION_HEADER: header_word(f"{version.model}/{version.version}")}


def header_word(text: str) -> str:
    """A text as a header carries it: what is no ASCII written as in an address (%C3%BC), for a model may have any name."""
    return quote(text, safe=ASCII_BUT_PERCENT)


async def _body(request: Request) -> bytes | None:
    """A request's body, None where it is too long."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > BODY_BYTES:
            return None
        parts.append(part)
    return b"".join(parts)


async def _reason(answer: httpx.Response) -> Response:
    """What a server says of an error, as far as it is no longer than a reason may be."""
    said = b""
    async for piece in answer.aiter_bytes():
        said += piece
        if len(said) > REASON_BYTES:
            break
    return reason(answer.status_code, said)


def _host(request: Request) -> str:
    """The name or number in `Host`, '' for what is none."""
    found = HOST.fullmatch(request.headers.get("host", ""))
    return found[1] or found[2] if found else ""
