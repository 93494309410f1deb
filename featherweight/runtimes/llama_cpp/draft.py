"""A smaller model that drafts what a larger one writes next, each text in the same slot of its own context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from featherweight.runtimes.llama_cpp.loaded import LlamaCppModel

Entry = tuple[int, int, int, bool]
"""A token that goes through the layers, its position, its slot, and whether its logits are wanted."""
AT_ONCE = 512
"""Tokens that go through the layers together; llama.cpp's own default."""
FEW = 2
"""Tokens that a draft has not read where all that it drafted was accepted: its last, and the one behind it."""


class Draft:
    """read: the tokens of each slot's text that the draft has read, what it drafted itself included."""

    def __init__(self, model: LlamaCppModel) -> None:
        self.model = model
        self.read: dict[int, list[int]] = {}

    def propose(self, asked: Mapping[int, tuple[list[int], int]]) -> dict[int, list[int]]:
        """The likeliest tokens behind each slot's text, so many of each."""
        unread = {slot: self._catch_up(slot, tokens) for slot, (tokens, _) in asked.items()}
        drafted: dict[int, list[int]] = {slot: [] for slot in asked}
        while more := [slot for slot, (_, most) in asked.items() if len(drafted[slot]) < most]:
            entries = [entry for slot in more for entry in self._entries(slot, unread[slot])]
            for slot, row in zip(more, self.model.decode(entries), strict=True):
                self.read[slot] += unread[slot]
                unread[slot] = [int(row.argmax())]
                drafted[slot] += unread[slot]
        return drafted

    def _entries(self, slot: int, tokens: list[int], last: bool = True) -> list[Entry]:
        """Tokens behind what the slot has read; last: the logits behind the last of them are wanted."""
        start = len(self.read[slot])
        return [(token, start + at, slot, last and at == len(tokens) - 1) for at, token in enumerate(tokens)]

    def _catch_up(self, slot: int, tokens: list[int]) -> list[int]:
        """Forget what was drafted and not accepted, and read the text up to its last tokens, which are given back."""
        read = self.read.get(slot, [])
        same = next((at for at, (one, other) in enumerate(zip(read, tokens[:-1], strict=False)) if one != other), len(read))
        same = min(same, len(tokens) - 1)
        self.model.forget(slot, same)
        self.read[slot] = tokens[:same]
        while (left := len(tokens) - len(self.read[slot])) > FEW:
            unread = tokens[len(self.read[slot]) :][: min(AT_ONCE, left - 1)]
            self.model.decode(self._entries(slot, unread, last=False))
            self.read[slot] += unread
        return tokens[len(self.read[slot]) :]
