"""Who is answered: a browser that came by the address with the token, by this machine's own names, and no other page's forms."""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

OWN_PAGE = "default-src 'none'; style-src 'self'; img-src data:; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
"""Of every answer; each brings a Content-Security-Policy of its own, or gets that of our pages. Without a referrer at all browsers
post forms with the origin `null`."""
NAMES = ("127.0.0.1", "localhost", "[::1]")
TOKEN = "token"


@dataclass(frozen=True)
class Access:
    """The secrets of one start. token: in the address that is printed. session: in the cookie. form: in every form."""

    port: int
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    session: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    form: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    @property
    def cookie(self) -> str:
        """Name of the cookie: browsers send those of one machine to all of its ports."""
        return f"featherweight-{self.port}"

    def knows_host(self, host: str) -> bool:
        """Whether a `Host` is this machine at our port: a foreign name that leads here is another site's (DNS rebinding)."""
        return host in {f"{name}:{self.port}" for name in NAMES}

    def own_origin(self, origin: str, host: str) -> bool:
        """Whether a form comes from a page of ours: browsers name the page's origin with whatever it posts."""
        try:
            return urlsplit(origin) == urlsplit(f"http://{host}")
        except ValueError:  # half of an IPv6 address
            return False

    def knows(self, cookies: Any) -> bool:
        """Whether a browser has come by the address with the token."""
        return _same(cookies.get(self.cookie, ""), self.session)

    def opens(self, token: str) -> bool:
        """Whether it is the token of the address."""
        return _same(token, self.token)

    def own_form(self, form: str) -> bool:
        """Whether a form is one that we made."""
        return _same(form, self.form)


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


class Guarded:
    """An ASGI application behind `access`: whoever may not ask is told so, and the application is not called."""

    def __init__(self, application: Any, access: Access) -> None:
        self._application, self._access = application, access

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, every answer with the headers that keep a browser from doing more with it."""
        if scope["type"] == "http":
            answer = self._refusal(scope) or self._application
            await answer(scope, receive, _with_headers(send))

    def _refusal(self, scope: Any) -> Any:
        """What is answered instead, None for who may ask."""
        from starlette.requests import Request
        from starlette.responses import PlainTextResponse, RedirectResponse

        asked, access = Request(scope), self._access
        host = asked.headers.get("host", "")
        if not access.knows_host(host):
            return PlainTextResponse("this page is of this machine alone: open the address that was printed\n", 421)
        if asked.method == "POST" and not access.own_origin(asked.headers.get("origin", ""), host):
            return PlainTextResponse("this form is of another page\n", 403)
        if asked.method == "GET" and TOKEN in asked.query_params and access.opens(asked.query_params[TOKEN]):
            begun = RedirectResponse("/", 303)
            begun.set_cookie(access.cookie, access.session, httponly=True, samesite="lax")
            return begun
        if not access.knows(asked.cookies):
            return PlainTextResponse("open the address that `featherweight ui` printed: it holds a token\n", 403)
        return None


def _with_headers(send: Any) -> Any:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            told = {name.lower() for name, _ in message["headers"]}
            ours = {"content-security-policy": OWN_PAGE, **HEADERS}
            more = [(name.encode(), value.encode()) for name, value in ours.items() if name.encode() not in told]
            message = {**message, "headers": [*message["headers"], *more]}
        await send(message)

    return sending
