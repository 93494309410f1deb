"""The smoke request: a registered version is asked something short on the engine that serves it."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from featherweight.errors import StageError, one_line
from featherweight.registry.answering import Answering, open_answering
from featherweight.registry.decisions import withdrawal_decision
from featherweight.registry.gate import GatesRefused
from featherweight.registry.history import WHY_LIMIT, GateResult
from featherweight.registry.labeller import Labeller
from featherweight.registry.registry import RegisteredVersion, Registry
from featherweight.registry.versions import CHAMPION
from featherweight.store.served_folder import verified_tokens

SMOKE = "smoke"
TEXT, TEXT_TOKENS, NEW_TOKENS = "The", 4, 4
"""What is asked, the most tokens that a tokenizer cuts it into, its own beginning and end counted, and how many are to come."""


def smoke_gate(registry: Registry, version: RegisteredVersion) -> GateResult:
    """Whether a version answers: its files as they are registered, in a worker process of its own."""
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            ask(registry.served_folder(version, Path(scratch)))
    except StageError as error:
        return GateResult(SMOKE, False, one_line(error))
    return GateResult(SMOKE, True, f"answered on {version.tag('engine')} after {time.monotonic() - began:.1f} s")


def smoked(registry: Registry, champion: RegisteredVersion, who: str) -> GateResult:
    """The gate that a new champion answers on its engine. Where it does not, the former one is champion again: GatesRefused."""
    gate = smoke_gate(registry, champion)
    if gate.passed:
        return gate
    why = f"smoke request failed, {gate.reason}"[:WHY_LIMIT]
    after = registry.decide(champion.model, withdrawal_decision(champion.version, who, why, (gate,)))
    holder = after.holder(CHAMPION)
    back = f"version {holder.version} is champion" if holder else "there is no champion"
    raise GatesRefused(
        f"version {champion.version} ({champion.variant}) of '{champion.model}' was champion and taken back: {why}; {back}", (gate,)
    )


def ask(served: Path) -> None:
    """Let a served folder answer one short text by its task. Raises StageError where it does not, whatever stops it."""
    try:
        answering = open_answering(served)
        try:
            answers = _answers(answering, max(1, min(NEW_TOKENS, verified_tokens(served) - TEXT_TOKENS)))
        finally:
            answering.close()
    except Exception as error:  # an engine or tokenizer that cannot read its files raises what it likes
        raise StageError(f"it did not answer: {one_line(error)}") from error
    if len(answers) != 1 or not all(map(math.isfinite, _numbers(answers))):
        raise StageError("it answered with numbers that are not finite")


def _answers(answering: Answering, new_tokens: int) -> Any:
    if isinstance(answering, Labeller):
        return answering([TEXT])
    return answering([TEXT], max_new_tokens=new_tokens, stop_at_end=False)


def _numbers(answer: Any) -> Iterable[float]:
    """Every number in an answer: of vectors, scores, entities."""
    if isinstance(answer, float):
        yield answer
    elif isinstance(answer, dict):
        for one in answer.values():
            yield from _numbers(one)
    elif not isinstance(answer, str | bytes) and hasattr(answer, "__iter__"):
        for one in answer.tolist() if hasattr(answer, "tolist") else answer:
            yield from _numbers(one)
