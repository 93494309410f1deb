"""The text in a file: decompressed, decoded, its line ends made one; what holds no text is refused by what it is.

Line ends are those of the system that wrote the file, not of the text: "\\r\\n" and "\\r" become "\\n", as Python and git read
them. The escapes inside a JSON string are the text's own and stay as they are.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from featherweight.errors import DataError
from featherweight.text.no_text import MOST_CONTROLS, PARQUET, control_share, kind_without_text, other_encoding

HEAD = 1 << 16
"""Bytes, or characters, of a file's beginning that tell what it is."""
COMPRESSED_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".zstd")

_MARKS = {  # UTF-32's little-endian mark begins with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def is_parquet(name: str, path: Path) -> bool:
    """Whether the file is Parquet, which is read as a table and not as text."""
    try:
        with path.open("rb") as raw:
            return raw.read(len(PARQUET)) == PARQUET
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror or error}") from error


@contextmanager
def open_text(name: str, path: Path) -> Iterator[TextIO]:
    """The file's characters, whatever it is compressed or encoded with. `name` is what errors call it.

    Read as a stream. Raises DataError, while it is read too, for what is no text, is damaged, or stands in no Unicode encoding.
    """
    try:
        with _binary(path) as raw:
            head = raw.read(HEAD)
        encoding = _encoding(name, head)
        with _binary(path) as raw, io.TextIOWrapper(raw, encoding=encoding, newline=None) as text:
            yield text
    except UnicodeError as error:
        raise DataError(f"{name} is not {_named(encoding)} text ({_place(path, encoding)}); {_ADVICE}") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from error


_ADVICE = "convert it, or leave it out with data.pattern"


def require_characters(name: str, text: str, line: int = 1) -> None:
    """Raise DataError for a NUL in `text`, which begins in that line of the file: no text holds one."""
    place = text.find("\0")
    if place >= 0:
        where = f"line {line + text.count(chr(10), 0, place)}"
        raise DataError(f"{name} is not text: {where} holds a NUL character, as binary files do; {_ADVICE}")


def _binary(path: Path) -> Any:
    """The file's bytes, decompressed where its first ones say that it is compressed."""
    with path.open("rb") as raw:
        head = raw.read(10)
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    if head.startswith(b"BZh") and head[4:] == b"1AY&SY":
        return bz2.open(path)
    if head.startswith(b"\xfd7zXZ\0"):
        return lzma.open(path)
    return _zstandard(path) if head.startswith(b"\x28\xb5\x2f\xfd") else path.open("rb")


def _zstandard(path: Path) -> Any:
    """Arrow carries the decompressor that Python has from 3.14 on."""
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


def _encoding(name: str, head: bytes) -> str:
    """What a byte order mark says, UTF-8 without one; DataError for what is no text."""
    if kind := kind_without_text(head):
        raise DataError(f"{name} is {kind}, not text; {_ADVICE}")
    marked = next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), None)
    if marked is None and (other := other_encoding(head)):
        raise DataError(f"{name} is not UTF-8 text: it looks like {other}; {_ADVICE}")
    if marked is None and b"\0" in head:
        raise DataError(f"{name} is not text: {_with_nul(head)}; {_ADVICE}")
    if marked is None and (share := control_share(head)) > MOST_CONTROLS:
        raise DataError(f"{name} is not text: {share:.0%} of its bytes are control characters, as in binary files; {_ADVICE}")
    return marked or "utf-8"


def _with_nul(head: bytes) -> str:
    """A text in UTF-16 has its NULs at every other byte."""
    shares = [head[start::2].count(0) / len(head[start::2] or b"\1") for start in (0, 1)]
    if max(shares) > 0.3 and min(shares) < 0.1:
        return "it looks like UTF-16 without a byte order mark"
    return f"byte {head.index(0)} is a NUL, as in binary files"


def _named(encoding: str) -> str:
    return encoding.removesuffix("-sig").upper()


def _place(path: Path, encoding: str) -> str:
    """Where decoding stops: the first wrong byte, counted from 0, and its line."""
    decoder = codecs.getincrementaldecoder(encoding)()
    done, line = 0, 1
    with _binary(path) as raw:
        while True:
            chunk = raw.read(HEAD)
            waiting = len(decoder.getstate()[0])
            try:
                line += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeDecodeError as error:
                offset = done - waiting + error.start
                return f"byte {offset}, line {line + error.object[: error.start].decode(encoding, errors='ignore').count(chr(10))}"
            except UnicodeError:
                return f"near byte {done}, line {line}"
            if not chunk:
                return f"byte {done}, line {line}"
            done += len(chunk)
