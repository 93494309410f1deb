"""One family of errors. The message names the thing, what was expected, and what to do next, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from typing import Any

from featherweight.masking import masked
from featherweight.visible import visible


def one_line(error: object, limit: int = 500) -> str:
    """An error's text in one line of at most `limit` characters, secrets masked, control characters escaped."""
    text = visible(" ".join(masked(error).split()))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def reason(error: BaseException, limit: int = 500) -> str:
    """What a library's error says, in one line; of a missing entry its text is the entry's name alone."""
    if isinstance(error, KeyError) and len(error.args) == 1 and len(str(error.args[0]).split()) < 2:
        return one_line(f"there is no {error.args[0]!r}", limit)
    return one_line(error, limit)


def nearest(name: str, known: Collection[str]) -> str:
    """What an unknown name may have been meant for: the nearest known one, or one of all."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"


def was_interrupted(error: BaseException | None) -> bool:
    """Whether an error is a Ctrl-C, or what a library made of one that came in the midst of its work, as pydantic does."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        if type(error).__name__ == "PydanticSerializationError" and KeyboardInterrupt.__name__ in str(error):
            return True  # of one inside another it keeps the words alone
        error = error.__cause__
    return error is not None


class FeatherweightError(Exception):
    """Anything that Featherweight refuses or fails at; `exit_code` is what the command line returns.

    The message is masked here, so that none carries a secret, whoever writes it.
    """

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(masked(message))


class RecipeError(FeatherweightError):
    """The recipe is malformed, or asks for something impossible."""

    exit_code = 2


class CheckpointError(FeatherweightError):
    """The checkpoint is missing, truncated, corrupt, unsafe or inconsistent."""

    exit_code = 3


class DataError(FeatherweightError):
    """The text is missing or empty, or fails a critical expectation."""

    exit_code = 4


class StageError(FeatherweightError):
    """A stage failed: divergence, a library's refusal, a bound that was not kept."""

    exit_code = 5


class DivergenceError(StageError):
    """Training ran away. `losses` is the curve up to then, one value a step, in nats per token."""

    def __init__(self, message: str, losses: tuple[float, ...] = ()) -> None:
        super().__init__(message)
        self.losses = losses


class ParityError(StageError):
    """An exported variant does not compute what its PyTorch source computes."""


class ServiceError(FeatherweightError):
    """A server or a store is down, refuses the credentials, or has no room left."""

    exit_code = 6


class Unreachable(ServiceError):
    """A server or a database does not answer. It may come back, so that it is worth waiting for."""


class Forbidden(ServiceError):
    """A server knows who asks, and does not let them do this."""


class ToolchainError(FeatherweightError):
    """A toolchain is not installed, or this machine cannot run it."""

    exit_code = 7


class GateError(FeatherweightError):
    """A promotion gate refused the candidate."""

    exit_code = 8


class Stopped(FeatherweightError):
    """Ctrl-C; what was finished stays finished."""

    exit_code = 130


class IntegrityError(FeatherweightError):
    """An artifact's bytes are not those that its manifest records."""

    exit_code = 9


def refused(check: Callable[..., object], *arguments: Any) -> str | None:
    """What a check that raises says, as a reason; None where it lets the arguments through."""
    try:
        check(*arguments)
    except FeatherweightError as error:
        return str(error)
    return None


def told(error: BaseException) -> str:
    """An error in one line, its type told where the message alone does not."""
    return one_line(error, 2000) if isinstance(error, FeatherweightError) else one_line(f"{type(error).__name__}: {error}")
