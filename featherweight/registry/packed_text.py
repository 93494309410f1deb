"""A text in a tag of MLflow's, for who would ask for a file otherwise: gzip in base64, which `base64 -d | zcat` reads."""

from __future__ import annotations

import base64
import gzip
import zlib

PACKED = "lineage_gzip"
TAG_LIMIT = 100_000  # characters that MLflow takes
TEXT_LIMIT = 16 * 2**20  # bytes: a tag of that size can hold a thousand times as much


def packed(text: str) -> dict[str, str]:
    """The tag that holds a text; none where it is too long for one."""
    told = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    return {PACKED: told} if len(told) <= TAG_LIMIT else {}


def unpacked(told: str) -> str:
    """What a tag holds, '' where that is no such text: whoever asks holds it to a digest."""
    reader = zlib.decompressobj(wbits=31)
    try:
        return reader.decompress(base64.b64decode(told, validate=True), TEXT_LIMIT).decode()
    except (ValueError, zlib.error):
        return ""
