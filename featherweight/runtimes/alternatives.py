"""What to take instead of an engine that refuses: of the others, those that were asked and do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, get_args

from featherweight.errors import RecipeError
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.spec import ServingSpec

ELSEWHERE = "take another engine"
"""What the refusals say for which another engine may be the way out."""
FIRST = ("ctranslate2", "onnxruntime-genai", "llama.cpp", "openvino", "vllm", "onnxruntime", "torch-compile", "torch")
"""In which order engines are named; the others come behind these."""
MOST = 3
NUMBERS = ("precision", "compute_type")
"""The keys of an engine that say in which numbers it serves."""


def advised(reason: str, spec: ServingSpec, serves: Callable[[ServingSpec], bool]) -> str:
    """`reason`, why `spec` is refused, naming engines that serve the same where it says that another one may.

    serves: whether an engine does, as it is told to.
    """
    if ELSEWHERE not in reason:
        return reason
    able = list(islice((name for name in _others(spec.engine) if any(serves(way) for way in _ways(name, spec))), MOST))
    if able:
        return reason.replace(ELSEWHERE, f"take {_listed(able)}")
    for before in (", or ", "; "):
        reason = reason.replace(f"{before}{ELSEWHERE}", "" if before == ", or " else "; no engine here serves it")
    return reason


def _listed(names: list[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _others(engine: str) -> Iterator[str]:
    """The engines that can be written for and started here."""
    known = [*(name for name in FIRST if name in RUNTIMES), *(name for name in RUNTIMES if name not in FIRST)]
    return (name for name in known if name != engine and RUNTIMES[name].unwritable() is None)


def _ways(engine: str, asked: ServingSpec) -> Iterator[ServingSpec]:
    """How an engine may be told to serve what another was asked to: in the same numbers if it knows them, by default, in others."""
    kind: Any = RUNTIMES[engine].spec
    told = {"engine": engine, "max_tokens": asked.max_tokens, "device": asked.device, "speculation": asked.speculation}
    for key in (key for key in NUMBERS if key in kind.model_fields):
        same = next((getattr(asked, name) for name in NUMBERS if hasattr(asked, name)), None)
        for value in dict.fromkeys((same, kind.model_fields[key].default, *get_args(kind.model_fields[key].annotation))):
            with suppress(ValueError, RecipeError):
                yield kind.model_validate({**told, key: value})
        return
    yield kind.model_validate(told)
