"""What an engine's own server takes in a request, as it tells itself: what it would leave out without a word is refused by name.

vLLM answers a request with a parameter that it has not, misspelt or of an older release, as if it had not been asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from featherweight.errors import one_line

DESCRIPTION = "/openapi.json"
WITHOUT_EFFECT = {"metadata", "store", "service_tier", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
"""What OpenAI's clients send beside what an answer depends on."""
Parameters = Mapping[str, frozenset[str]]
"""The names that each path takes; of a path that is not among them nothing is known."""


def described(description: Any, paths: Iterable[str]) -> Parameters:
    """What a server tells of some of its paths, in OpenAPI; nothing of one that it does not tell of in objects with named keys."""
    found = {}
    for path in paths:
        try:
            body = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
            names = frozenset(name for one in _schemas(description, body) for name in one["properties"])
        except (KeyError, TypeError, AttributeError, IndexError):
            continue
        found[path] = names
    return found


def _schemas(description: Any, schema: Any) -> Iterator[Any]:
    """A schema, or those that it is one of, each where it is defined."""
    for one in schema.get("anyOf") or schema.get("oneOf") or [schema]:
        name = one.get("$ref", "").rpartition("/")[2]
        yield description["components"]["schemas"][name] if name else one


def unknown(path: str, body: bytes, known: Parameters) -> str | None:
    """That a request names what the path does not take; None where it does not, or where its server is to say what is wrong."""
    if path not in known:
        return None
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return None
    names = sorted(asked.keys() - known[path] - WITHOUT_EFFECT) if isinstance(asked, dict) else []
    if not names:
        return None
    near = get_close_matches(names[0], known[path], n=1)
    return f"no parameter '{one_line(names[0], 60)}' is taken at {path}" + (f"; did you mean '{near[0]}'?" if near else "")
