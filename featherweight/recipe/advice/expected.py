"""What is to be expected of an offer: memory, speed and loss of quality, from the model's shape and the machine's roofs.

    seconds of a step = max(bytes read / (bandwidth * share), operations / (speed * share)) + layers * layer_s + step_s

for each generated token of all sequences, and likewise once for the prompt, of which arithmetic is the roof. Shares and seconds are
the engine's (`Reach`); where this very engine and grid were measured here on a model of this size, its bytes per second are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from featherweight.grid import grid_named
from featherweight.recipe.advice.hardware import USABLE, Roofs
from featherweight.recipe.advice.shape import Shape
from featherweight.runtimes.offers import Offer

WAITING = 0.5
"""The share of a static batch's places that is busy: it waits for its longest answer, and lengths are spread from none to that."""
MIXED_BODY = 0.5
"""The share of the body that mixed precision keeps on the finer grid (stories15M at a budget of 1 %)."""
MIXED_LOSS = 0.56
"""The share of its budget that mixed precision then loses, measured there."""
OUTLIERS_FROM, OUTLIERS_LOSS = 6.7e9, 0.005
"""From how many weights on activations have outliers (Dettmers et al. 2022, LLM.int8), and what int8 then loses, by assumption."""

LENGTHS = (128, 128)
"""Tokens of a request and of its answer, where nobody says."""


@dataclass(frozen=True)
class Asked:
    """The workload: requests of `prompt_tokens` that are answered by `new_tokens`; `sequences` at a time.

    concurrent: they come one by one and have answers of their own lengths, as from users; else they are one batch.
    """

    prompt_tokens: int = LENGTHS[0]
    new_tokens: int = LENGTHS[1]
    sequences: int = 1
    concurrent: bool = False

    @property
    def words(self) -> str:
        """In a table's heading."""
        return f"{self.sequences} requests at a time" if self.concurrent else f"batch {self.sequences}"


@dataclass(frozen=True)
class Expected:
    """Bytes of each device that shares the model (weights, cache, the rest), tokens per second of all sequences, seconds to the
    first token, and the share by which bits per byte grow."""

    weights_bytes: float
    cache_bytes: float
    other_bytes: float
    tokens_per_s: float
    ttft_s: float
    loss: float
    basis: str = ""

    @property
    def memory_bytes(self) -> float:
        """All of it."""
        return self.weights_bytes + self.cache_bytes + self.other_bytes

    def fits(self, roofs: Roofs) -> bool:
        """Whether a device holds its part."""
        return self.memory_bytes <= USABLE * roofs.memory_bytes


def bytes_of(offer: Offer, shape: Shape) -> tuple[float, float, float]:
    """Of body, head and table, as the engine holds them in memory."""
    body = offer.body_bytes or _weight_bytes(offer, offer.grid)
    if offer.mixed and not offer.body_bytes:
        body += MIXED_BODY * (_weight_bytes(offer, offer.mixed) - body)
    head = offer.head_bytes or _weight_bytes(offer, offer.head)
    return body * shape.body, head * shape.head, head * shape.table


def _weight_bytes(offer: Offer, grid: str | None) -> float:
    """Of one weight, with its share of a scale."""
    if grid is None:
        return offer.width
    found = grid_named(grid)
    return found.bits / 8 + (offer.scale / found.group_size if found.group_size else 0.0)


def expected(offer: Offer, shape: Shape, roofs: Roofs, asked: Asked, loss: float, before: float | None = None) -> Expected:
    """What is to be expected of `offer`. loss: of the rounded weights. before: bytes per second that were read here."""
    body, head, table = (size / offer.parts for size in bytes_of(offer, shape))
    position = shape.kv * offer.cache / offer.parts
    length = asked.prompt_tokens + (asked.new_tokens if shape.family != "encoder" else 0)
    cache = position * shape.cached(length) * asked.sequences if shape.family != "encoder" else 0.0
    first = _prompt_s(offer, shape, roofs, asked, body, head)
    if shape.family == "encoder":
        total, counted = first, asked.prompt_tokens
    else:
        read = position * shape.cached(asked.prompt_tokens + asked.new_tokens // 2) * asked.sequences
        step = _step_s(offer, shape, roofs, asked.sequences, body * (1 - shape.encoder), head, read, before)
        total, counted = first + asked.new_tokens * step, asked.new_tokens
    busy = WAITING if asked.concurrent and asked.sequences > 1 and offer.batching == "static" else 1.0
    waits = _first_s(offer, shape, roofs, asked, first, total)
    other = offer.base + _activations(shape, asked)
    speed = busy * asked.sequences * counted / total
    lost = offer.loss + loss + outliers(offer, shape)
    return Expected(body + head + table, cache, other, speed, waits, lost, _basis(offer, before))


def outliers(offer: Offer, shape: Shape) -> float:
    """What activations rounded to int8 lose more where some channels are far larger than others (Dettmers et al. 2022)."""
    return OUTLIERS_LOSS if offer.numbers == "int8" and shape.weights > OUTLIERS_FROM else 0.0


def _first_s(offer: Offer, shape: Shape, roofs: Roofs, asked: Asked, first: float, total: float) -> float:
    """Until a request has its first token. Of users, one's own prompt, or where batches are static half of the one before too."""
    if not asked.concurrent or asked.sequences == 1:
        return first
    if offer.batching == "static":
        return first + total / 2
    body, head, _ = (size / offer.parts for size in bytes_of(offer, shape))
    return _prompt_s(offer, shape, roofs, replace(asked, sequences=1), body, head)


def _basis(offer: Offer, before: float | None) -> str:
    return offer.reach.source if before is None else "measured in this workspace"


def _prompt_s(offer: Offer, shape: Shape, roofs: Roofs, asked: Asked, body: float, head: float) -> float:
    """Reading all prompts at once; an encoder-decoder's go through its encoder alone."""
    tokens = asked.prompt_tokens * asked.sequences
    part = shape.encoder or 1.0
    operations = 2 * tokens * shape.body * shape.computed * part + 2 * asked.sequences * shape.head
    read = roofs.read_s(body * part + head, offer.reach.memory)
    return max(operations / _speed(offer, roofs, offer.reach.reading), read) + _beside(offer, shape)


def _step_s(
    offer: Offer, shape: Shape, roofs: Roofs, sequences: int, body: float, head: float, cache: float, before: float | None
) -> float:
    """One more token of every sequence."""
    operations = 2 * sequences * (shape.decoder * shape.computed + shape.head)
    read = body * shape.read(sequences) + head
    if before is not None:  # what was measured holds what a pass takes beside
        return max((read + cache) / before, operations / _speed(offer, roofs, offer.reach.arithmetic))
    memory = roofs.read_s(read, offer.reach.memory) + cache / (roofs.bandwidth * offer.reach.memory)
    return max(memory, operations / _speed(offer, roofs, offer.reach.arithmetic)) + _beside(offer, shape)


def _speed(offer: Offer, roofs: Roofs, share: float) -> float:
    return roofs.flops[offer.numbers] * share * offer.parts


def _beside(offer: Offer, shape: Shape) -> float:
    return shape.layers * offer.reach.layer_s + offer.reach.step_s


def _activations(shape: Shape, asked: Asked) -> float:
    """Bytes of the widest layer's numbers for all prompts at once, eight of the hidden size, and of the logits of one step."""
    return 4.0 * asked.sequences * (8 * shape.hidden * min(asked.prompt_tokens, 2048) + 2 * shape.vocabulary)
