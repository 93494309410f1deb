"""Entities in a text, from the labels of its tokens: as transformers' pipeline groups them ("simple")."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

OUTSIDE = "O"


@dataclass(frozen=True)
class Entity:
    """Some of a text's characters and their label; `score` is a mean over tokens of its probability."""

    entity: str
    score: float
    word: str
    start: int
    end: int


def entities(config: Any, text: str, told: Any, rows: Sequence[Sequence[float]], aggregate: bool) -> list[dict[str, Any]]:
    """The entities of `text`, whose tokens are `told` and their logits `rows`; what is outside of any is left out."""
    tokens = list(_tokens(config, text, told, rows))
    found = _grouped(text, tokens) if aggregate else tokens
    return [asdict(one) for one in found if one.entity != OUTSIDE]


def _tokens(config: Any, text: str, told: Any, rows: Sequence[Sequence[float]]) -> Iterator[Entity]:
    """Every token but those of the frame, with its likeliest label."""
    for row, (start, end), special in zip(rows, told["offset_mapping"], told["special_tokens_mask"], strict=True):
        if special:
            continue
        best = max(range(len(row)), key=row.__getitem__)
        score = 1 / math.fsum(math.exp(logit - row[best]) for logit in row)
        yield Entity(config.id2label[best], score, text[start:end], start, end)


def _grouped(text: str, tokens: Sequence[Entity]) -> Iterator[Entity]:
    """Neighbours of one kind as one entity; one that begins (B-) begins another."""
    group: list[Entity] = []
    for token in tokens:
        if group and (_kind(token) != _kind(group[-1]) or token.entity.startswith("B-")):
            yield _joined(text, group)
            group = []
        group.append(token)
    if group:
        yield _joined(text, group)


def _kind(token: Entity) -> str:
    """A label without its place in the entity."""
    return token.entity[2:] if token.entity.startswith(("B-", "I-")) else token.entity


def _joined(text: str, group: Sequence[Entity]) -> Entity:
    start, end = group[0].start, group[-1].end
    score = math.fsum(one.score for one in group) / len(group)
    return Entity(group[0].entity.split("-", 1)[-1], score, text[start:end], start, end)  # S- and E- are places too
