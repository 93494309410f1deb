"""Which entries of a history may decide: where keys are trusted, those that one of them signed, once any did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from featherweight.registry.history import History
from featherweight.registry.keys import Keys


def unvouched(history: History, stored: Mapping[int, tuple[str, str]], keys: Keys, seen: int = 0) -> list[int]:
    """Numbers of the entries that count and that no trusted key vouches for; none where no key is trusted here.

    stored: text and signature of each entry, by number. seen: number of the entry up to which this history was seen from here:
    up to there its digests vouch for it, and from there on every entry has to be signed. Before the first signed one none has to.
    """
    return list(_unvouched(history, stored, keys, seen)) if keys.public else []


def _unvouched(history: History, stored: Mapping[int, tuple[str, str]], keys: Keys, seen: int) -> Iterator[int]:
    began = seen > 0
    for entry in history.entries:
        if entry.number <= seen:
            continue
        text, signature = stored.get(entry.number, ("", ""))
        if signature and keys.signed(text, signature):
            began = True
        elif began or signature:
            yield entry.number
