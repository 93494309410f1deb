"""Which tokens a text may be written in, by the tokens of its source: CTranslate2's vocabulary map.

The decoder's last product, which is most of a step where a vocabulary is large, is made for those alone (Jean et al. 2015, "On
Using Very Large Target Vocabulary for Neural Machine Translation", section 3.3); of a batch, for those of all its texts. What a
model would have written in others it writes otherwise: its scores stay what they are, its texts may not, which the share of
changed answers tells.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

FILE = "vmap.txt"
"""Of CTranslate2: lines of a source token, a tab, and target tokens; those of no source token are for every text."""

Pairs = Iterable[tuple[Sequence[int], Sequence[int]]]


def likely_targets(pairs: Pairs, most: int) -> tuple[list[int], dict[int, list[int]]]:
    """The `most` commonest target tokens, and for each source token as many that stand in its texts' targets most markedly.

    pairs: (source ids, target ids) of texts and what became of them. By Dice's coefficient: twice the texts that have both, over
    those that have the one and those that have the other.
    """
    sources, targets = Counter[int](), Counter[int]()
    together: dict[int, Counter[int]] = defaultdict(Counter)
    for source, target in pairs:
        there, written = set(source), set(target)
        sources.update(there)
        targets.update(written)
        for token in there:
            together[token].update(written)

    def dice(token: int, other: int) -> float:
        return 2 * together[token][other] / (sources[token] + targets[other])

    common = [token for token, _ in sorted(targets.items(), key=lambda one: (-one[1], one[0]))[:most]]
    chosen = {
        token: sorted(found, key=lambda other, token=token: (-dice(token, other), other))[:most]  # type: ignore[misc]
        for token, found in sorted(together.items())
    }
    return common, chosen


def write_shortlist(
    folder: Path, pairs: Pairs, sources: Sequence[str], targets: Sequence[str], most: int, always: Collection[int]
) -> None:
    """Write the map of `pairs` into a converted `folder`. sources, targets: spellings by id. always: ids that every text may use.

    A source token that is a target token too may be copied.
    """
    ids = {token: place for place, token in enumerate(targets)}
    common, chosen = likely_targets(pairs, most)
    copied = {token: [ids[sources[token]]] if sources[token] in ids else [] for token in range(len(sources))}
    lines = [("", [*always, *common])]
    lines += [(sources[token], [*found, *chosen.get(token, [])]) for token, found in copied.items()]
    told = ((source, [targets[one] for one in dict.fromkeys(found) if _spellable(targets[one])]) for source, found in lines)
    kept = [f"{source}\t{' '.join(found)}\n" for source, found in told if found and _spellable(source or "-")]
    (folder / FILE).write_text("".join(kept), encoding="utf-8")


def _spellable(token: str) -> bool:
    """Whether a line of the map can hold it."""
    return not any(letter.isspace() for letter in token)
