"""Conversations that a served model is asked to go on with: messages as OpenAI's API and transformers' chat templates have them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from featherweight.errors import DataError, one_line

Message = Mapping[str, Any]
ROLE, CONTENT, CALLS = "role", "content", "tool_calls"
PART, TEXT = "type", "text"
MARK = "a mark that no template writes"


def require_messages(messages: Any) -> None:
    """Raise DataError for what is no conversation, or holds more than texts."""
    right = isinstance(messages, Sequence) and bool(messages)
    if not right or not all(isinstance(one, Mapping) and isinstance(one.get(ROLE), str) for one in messages):
        raise _none_at_all()
    for one in messages:
        content = one.get(CONTENT)
        if isinstance(content, list | tuple) and content:
            _require_texts(content)
        elif not isinstance(content, str) and not (content is None and one.get(CALLS)):
            raise _none_at_all()


def _none_at_all() -> DataError:
    return DataError("a prompt is a text, or a conversation: a list of messages with a 'role' and a 'content', both texts")


def _require_texts(parts: Sequence[Any]) -> None:
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get(TEXT), str) or part.get(PART) != TEXT:
            kind = part.get(PART) if isinstance(part, Mapping) else part
            raise DataError(
                f"a part of a message of type '{one_line(kind, 60)}': this model reads texts; a part is a 'text' of type 'text'"
            )


def said(messages: Sequence[Message]) -> list[str]:
    """All texts that a template may write of a conversation, and a space for each message that may be empty."""
    return [" ".join([*_texts(one), ""]) for one in messages]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)


def spelt(message: Message, tokenizer: Any) -> dict[str, Any]:
    """A message as the tokenizer's chat template takes it: its parts in a row where the template knows of no parts, which it would
    write as Python does, brackets and all.
    """
    told = dict(message)
    if isinstance(told.get(CONTENT), list | tuple) and not _takes_parts(tokenizer):
        told[CONTENT] = "\n".join(part[TEXT] for part in told[CONTENT])
    return told


def _takes_parts(tokenizer: Any) -> bool:
    """Whether the template writes the texts of parts, and them alone."""
    try:
        found = tokenizer.apply_chat_template([{ROLE: "user", CONTENT: [{PART: TEXT, TEXT: MARK}]}], tokenize=False)
    except Exception:  # a template is a program of the checkpoint's own, and raises what it likes
        return False
    return MARK in found and f"'{TEXT}'" not in found and f'"{TEXT}"' not in found
