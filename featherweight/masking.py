"""Secrets in what is shown: addresses with passwords or tokens, wherever they stand in a text. The one masking of the project.

Every FeatherweightError masks its own message. What else leaves the process (tags, artifacts, the copy of a recipe, lines on a
terminal) goes through `masked` or `masked_tree`. Where it cannot be told what belongs to the password, more is hidden, not less.
"""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
ALIASED = ("models", ":/")
"""How MLflow's names of registered models begin, in which an alias stands behind the `@`."""
_QUOTES = "\"'`<>"
# An address ends at a space, and at a quote unless the text goes on behind it as a password would. A path takes one of its slashes.
_ADDRESS = re.compile(rf"([A-Za-z][A-Za-z0-9+.-]{{1,40}})(://?)((?:[^\s{_QUOTES}]|[{_QUOTES}](?=[^\s{_QUOTES},:;.)\]}}]))+)")
_SECRET = r"passw(?:or)?d|passphrase|pwd|secret|api[_-]?key|access[_-]?key(?:[_-]?id)?|account[_-]?key"
_PARAMETER = re.compile(rf"(?i)([?&;][\w.-]*(?:{_SECRET}|token|signature|credential|sig))=[^&\s{_QUOTES}]+")
_SETTING = re.compile(rf"(?i)(?<![\w.?&;-])([\w.-]*(?:{_SECRET}|(?-i:TOKEN)))=('[^']*'|\"[^\"]*\"|[^\s,;&{_QUOTES}]+)")


def masked(text: object) -> str:
    """A text, or an address, without its secrets: what stands before an address's `@`, and what settings like `password=` hold.

    The user goes with the password: to many servers it is the token.
    """
    told = _ADDRESS.sub(_without_user, str(text))
    return _SETTING.sub(rf"\1={HIDDEN}", _PARAMETER.sub(rf"\1={HIDDEN}", told))


def masked_tree(value: Any) -> Any:
    """JSON-like values with every text in them masked."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        return {name: masked_tree(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [masked_tree(one) for one in value]
    return value


def _without_user(match: re.Match[str]) -> str:
    """One address. A password that nobody escaped may hold `/`, `?` and `@` itself, so that its end is the last `@`."""
    scheme, slashes, rest = match.groups()
    first = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if (scheme, slashes) == ALIASED:
        return match.group()
    if "@" in rest and ("@" in first or _is_cut_password(scheme, first)):
        rest = f"{HIDDEN}@{rest.rpartition('@')[2]}"
    return f"{scheme}{slashes}{rest}"


def _is_cut_password(scheme: str, first: str) -> bool:
    """Whether `user:password` was cut at a `/` of the password; behind the colon of a web server's host there is its port."""
    host, colon, behind = first.rpartition(":")
    if not colon or host.startswith("["):
        return False
    return not (scheme.lower() in ("http", "https") and behind.isdigit())
