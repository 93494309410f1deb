"""Errors as whoever asked is told them: a code and a reason in one line, without a trace or a path of the machine."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from featherweight.errors import one_line

if TYPE_CHECKING:
    from starlette.responses import Response

CODE = re.compile(r"[A-Za-z][\w.]{0,63}", re.ASCII)
PATH = re.compile(r"(?<![\w:/.])(?:/[\w.@+-]+){2,}/?")
LONGEST = 4_000  # characters that are looked at: MLflow repeats the request in its errors
BEHIND_DATA = "Failed to predict data"
"""MLflow's words before the whole request, which stands before the reason."""


def reason(status: int, said: bytes) -> Response:
    """What the body of a server's error amounts to."""
    return refusal(status, *_told(said))


def refusal(status: int, code: str, why: str) -> Response:
    """An answer that says why there is none, as MLflow's servers do."""
    from starlette.responses import JSONResponse

    headers = {"retry-after": "5"} if status == 503 else None
    return JSONResponse({"error_code": code, "message": why}, status, headers)


def plain(text: str) -> str:
    """The reason in an error's text."""
    if text.startswith(BEHIND_DATA):
        text = text.rpartition("\nError: ")[2]
    text = text[:LONGEST].partition("; its last words")[0].partition("Traceback (most recent")[0]
    return PATH.sub("...", one_line(text, 400)) or "the request was refused"


def _told(said: bytes) -> tuple[str, str]:
    """Code and reason in the body of an error of MLflow's server, or of one that speaks as OpenAI's."""
    body: Any = said.decode(errors="replace")
    with suppress(ValueError, RecursionError):  # text, or cut
        body = json.loads(said)
    if not isinstance(body, dict):
        return "BAD_REQUEST", plain(str(body))
    body = body.get("error", body) if isinstance(body.get("error", body), dict) else {"message": body["error"]}
    code = str(body.get("error_code") or body.get("type") or "")
    why = body.get("message") or body.get("detail") or ""
    return code if CODE.fullmatch(code) else "BAD_REQUEST", plain(str(why))
