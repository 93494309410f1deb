"""Overlap between texts: exact copies under normalization, and near copies by shared word n-grams."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

NGRAM = 13
NEAR_COPY = 0.5
"""A document of which more than this share of n-grams occurs elsewhere is a near copy. Licence headers and import blocks,
common in source code, stay below it; a forked module or a lightly edited article does not."""

_WORD = re.compile(r"\w+")
_MULTIPLIER = 0x9E3779B97F4A7C15


def normalized(text: str) -> str:
    """Case and white space set aside, so that a reflowed or re-cased copy is still a copy."""
    return " ".join(text.split()).casefold()


def digest(text: str, salt: str = "") -> str:
    """sha256 of the normalized text, in hex; `salt` gives an independent one."""
    return hashlib.sha256(f"{salt}\0{normalized(text)}".encode(errors="surrogatepass")).hexdigest()


def ngrams(text: str, size: int = NGRAM) -> np.ndarray:
    """Hashes of the distinct `size`-word sequences of a text, uint64, sorted; of all its words where it has fewer.

    13 words is the length that GPT-3's contamination study (Brown et al. 2020, appendix C) and most since have used.
    The hashes hold within one process only: they build on Python's randomized `hash`.
    """
    import numpy as np

    words = np.fromiter(map(hash, _WORD.findall(text.casefold())), dtype=np.int64).view(np.uint64)
    if not len(words):
        return words
    size = min(size, len(words))
    mixed = np.zeros(len(words) - size + 1, dtype=np.uint64)
    for offset in range(size):
        mixed = mixed * np.uint64(_MULTIPLIER) + words[offset : len(words) - size + 1 + offset]
    return np.unique(mixed)


class Pool:
    """The n-grams of some documents, and which of them have been met elsewhere. Holds theirs only, however much is met."""

    def __init__(self, documents: list[np.ndarray]) -> None:
        import numpy as np

        self._documents = documents
        self._grams = np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *documents]))
        self._met = np.zeros(len(self._grams), dtype=bool)

    def meet(self, grams: np.ndarray) -> None:
        """Take note of another document's n-grams."""
        import numpy as np

        if len(self._grams):
            places = np.minimum(np.searchsorted(self._grams, grams), len(self._grams) - 1)
            self._met[places[self._grams[places] == grams]] = True

    def shares(self) -> list[float]:
        """For each document, the share [0, 1] of its n-grams that were met."""
        import numpy as np

        return [float(self._met[np.searchsorted(self._grams, grams)].mean()) if len(grams) else 0.0 for grams in self._documents]


def copied_shares(documents: list[np.ndarray]) -> list[float]:
    """For each document, the share [0, 1] of its n-grams that occur in any of the other ones."""
    import numpy as np

    pool, counts = np.unique(np.concatenate(documents), return_counts=True)
    return [float((counts[np.searchsorted(pool, grams)] > 1).mean()) if len(grams) else 0.0 for grams in documents]
