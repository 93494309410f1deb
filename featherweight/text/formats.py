"""What a file of text is, told by its content, and the documents in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import TextIO

from featherweight.errors import DataError
from featherweight.text.documents import Document
from featherweight.text.opening import COMPRESSED_ENDINGS, HEAD, is_parquet, open_text, require_characters
from featherweight.text.records import is_table, read_json, read_parquet, read_table
from featherweight.text.spec import DataSpec, Format

_KEY = r"\{\s*(\"(\\.|[^\"\\])*\"\s*:|\})"
_JSON = re.compile(rf"\s*({_KEY}|\[\s*({_KEY}|\"(\\.|[^\"\\])*\"\s*[,\]]))")
_MARKUP = re.compile(r"\s*(?:<!--(?:[^-]|-(?!->))*-->\s*)*<(?:!doctype\s+html\b|html[\s>]|(?P<xml>\?xml\s))", re.IGNORECASE)
_FRONT = re.compile(
    r"(?P<fence>---|\+\+\+)[ \t]*\n(?:[ \t]*(?:#.*)?\n)*(?P<key>[\w-]+[ \t]*[:=]).*\n(?:.*\n)*?(?P=fence)[ \t]*(?:\n|\Z)"
)
"""What a page of a site begins with: keys of YAML or TOML between two lines of marks."""
_SETTINGS = {".yaml": "YAML", ".yml": "YAML", ".toml": "TOML"}
_TAGS = {".html": "HTML", ".htm": "HTML", ".xhtml": "HTML", ".xml": "XML", ".svg": "XML"}
_ENDINGS: dict[str, Format] = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv"}


def read_file(name: str, path: Path, data: DataSpec) -> Iterator[Document]:
    """The documents of one file: those of its records, or of its prose. Raises DataError, in one line, for anything else."""
    readers = {"json": read_json, "csv": read_table, "parquet": read_parquet, "text": _read_prose}
    yield from readers[data.format or format_of(name, path, data)](name, path, data)


def format_of(name: str, path: Path, data: DataSpec) -> Format:
    """Parquet by its magic bytes; JSON by its first value and a table by its columns, or by the file's name; else prose.

    Raises DataError for HTML, XML, YAML and TOML, whose tags and keys nobody means to be learnt who does not say so.
    """
    if is_parquet(name, path):
        return "parquet"
    with open_text(name, path) as stream:
        start = stream.read(HEAD)
    if _JSON.match(start):
        return "json"
    if kind := _markup(name, start):
        raise DataError(f"{name} is {kind}, whose tags would be read as text; take the text out of it, or say data.format: text")
    if settings := "front matter" if _FRONT.match(start) else _SETTINGS.get(_ending(name)):
        what = "begins with front matter" if settings == "front matter" else f"is {settings}"
        raise DataError(f"{name} {what}, whose keys would be read as text; take the text out of it, or say data.format: text")
    named = _ENDINGS.get(_ending(name))
    return named or ("csv" if is_table(start, name, data.field) else "text")


def _markup(name: str, start: str) -> str | None:
    """HTML or XML, by how it begins; or by its name, where it begins with any tag."""
    if begun := _MARKUP.match(start):
        return "XML" if begun["xml"] else "HTML"
    return _TAGS.get(_ending(name)) if start.lstrip().startswith("<") else None


def _ending(name: str) -> str:
    """What the file is called after its last dot, compression left out, in small letters."""
    path = PurePath(name.lower())
    return PurePath(path.stem).suffix if path.suffix in COMPRESSED_ENDINGS else path.suffix


def _read_prose(name: str, path: Path, data: DataSpec) -> Iterator[Document]:
    """The whole file, or the documents between separators. Of a file larger than `max_bytes` no more than that is read."""
    with open_text(name, path) as stream:
        if data.separator is not None:
            yield from _between(name, stream, data.separator)
            return
        content = stream.read(-1 if data.max_bytes is None else data.max_bytes + 1)
    require_characters(name, content)
    yield Document(name, content)


def _between(name: str, stream: TextIO, separator: str) -> Iterator[Document]:
    number, line, rest, chunk = 0, 1, "", "more"
    while chunk:
        chunk = stream.read(max(HEAD, len(rest)))
        *pieces, rest = (rest + chunk).split(separator)
        for piece in [*pieces, *([] if chunk else [rest])]:
            require_characters(name, piece, line)
            yield Document(f"{name}#{number}", piece.strip("\n"))
            number, line = number + 1, line + piece.count("\n") + separator.count("\n")
