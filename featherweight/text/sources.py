"""Sources of text: the standard library, files, folders and S3 prefixes, read as documents."""

from __future__ import annotations

import hashlib
import math
import os
import re
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from featherweight.errors import DataError
from featherweight.text.documents import Document
from featherweight.text.formats import read_file
from featherweight.text.overlap import digest
from featherweight.text.spec import DataSpec

STDLIB = "python-stdlib"

# Tests; two old applications; generated tables and topics, which are data rather than code.
_STDLIB_LEFT_OUT = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "pydoc_data", "lib-dynload"}
)
LARGEST = 0.1
"""The share of a text beyond which a document is cut: whole, it would be most of a split, or of none."""
_CHUNK = (2000, 4000)
_PARAGRAPH = re.compile(r".+?(?:\n\s*\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """What was read from one source: its documents without exact copies, and how many copies there were."""

    documents: list[Document]
    duplicates: int = 0


def read_source(source: str, data: DataSpec) -> Source:
    """All documents of one source, exact copies dropped. Raises DataError where there is none.

    What a file is, its content tells (see featherweight.text.formats), but the standard library's modules are read as prose.
    """
    data = data.model_copy(update={"format": "text"}) if source == STDLIB else data
    with _local(source, data) as files:
        documents = _distinct(_capped(files, data))
    if not documents.documents:
        raise DataError(f"{source} holds no text; expected at least one document that is not blank")
    most = _longest_whole(documents.documents)
    if all(len(document.text) <= most for document in documents.documents):
        return documents
    chunks = _distinct(part for one in documents.documents for part in ([one] if len(one.text) <= most else _chunks(one)))
    return replace(chunks, duplicates=chunks.duplicates + documents.duplicates)


def _longest_whole(documents: list[Document]) -> float:
    """Characters of a document that is held out whole: each of a few would be too much of the text, as is a long one of many."""
    if any(document.judged for document in documents):
        return math.inf
    return 0 if len(documents) < 3 else max(LARGEST * sum(len(one.text) for one in documents), _CHUNK[1])


def _distinct(documents: Iterator[Document]) -> Source:
    """First copy of each document, blank ones left out."""
    kept: dict[str, Document] = {}
    seen = 0
    for document in documents:
        if document.text.strip():
            seen += 1
            kept.setdefault(digest(document.content), document)
    return Source(list(kept.values()), seen - len(kept))


def _capped(files: list[tuple[str, Path]], data: DataSpec) -> Iterator[Document]:
    """The documents of all files, in order; under `max_bytes` from a spread of files, the last document cut at a line."""
    if data.max_bytes is None:
        for name, path in files:
            yield from read_file(name, path, data)
        return
    left = data.max_bytes
    taken: list[tuple[str, list[Document]]] = []
    for name, path in sorted(files, key=lambda file: hashlib.sha256(file[0].encode()).digest()):
        taken.append((name, []))
        for document in read_file(name, path, data):
            taken[-1][1].append(_cut(document, left))
            left -= len(document.text.encode(errors="surrogatepass"))
            if left <= 0:
                break
        if left <= 0:
            break
    for _, documents in sorted(taken, key=lambda item: item[0]):
        yield from documents


def _cut(document: Document, size: int) -> Document:
    """The document's first `size` bytes, back to the last full line; whole where something else belongs to its text."""
    if document.pair is not None or isinstance(document.label, list):
        return document
    encoded = document.text.encode(errors="surrogatepass")
    if len(encoded) <= size:
        return document
    head = encoded[:size].decode(errors="ignore")
    return replace(document, text=head[: head.rfind("\n") + 1] or head)


def _chunks(document: Document) -> Iterator[Document]:
    """A document cut at blank lines into pieces of 2000 to 4000 characters; the last may be shorter."""
    for number, chunk in enumerate(_joined(_paragraphs(document.text)), 1):
        yield Document(f"{document.id}#{number}", chunk.strip("\n"))


def _joined(pieces: Iterator[str]) -> Iterator[str]:
    pending = ""
    for piece in pieces:
        if pending and len(pending) + len(piece) > _CHUNK[1]:
            yield pending
            pending = ""
        pending += piece
        if len(pending) >= _CHUNK[0]:
            yield pending
            pending = ""
    if pending:
        yield pending


def _paragraphs(content: str) -> Iterator[str]:
    """Paragraphs with the blank lines that follow them; one that is too long for a chunk, cut at a line end or a space."""
    for match in _PARAGRAPH.finditer(content):
        start, end = match.span()
        while end - start > _CHUNK[1]:
            places = (content.rfind(mark, start + 1, start + _CHUNK[1]) for mark in "\n ")
            cut = next((place for place in places if place >= 0), start + _CHUNK[1] - 1)
            yield content[start : cut + 1]
            start = cut + 1
        yield content[start:end]


@contextmanager
def _local(source: str, data: DataSpec) -> Iterator[list[tuple[str, Path]]]:
    """The files of a source, as (name, path) in the order of their names, for as long as the context lasts."""
    if source == STDLIB:
        yield _stdlib_files()
    elif source.startswith("s3://"):
        from featherweight.checkpoint.s3 import download

        with tempfile.TemporaryDirectory(prefix="featherweight-text-") as folder:
            files = Path(folder) / "files"
            download(source, files)
            yield _folder_files(files, data.pattern, source)
    else:
        yield _path_files(Path(source), data.pattern)


def _stdlib_files() -> list[tuple[str, Path]]:
    """What is left out, installed packages among it, is not walked."""
    root, files = Path(sysconfig.get_path("stdlib")), []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_LEFT_OUT]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    relative = [(path.relative_to(root), path) for path in files]
    return sorted((name.as_posix(), path) for name, path in relative if _in_stdlib(name))


def _in_stdlib(name: Path) -> bool:
    """Whether a file is the library's code, the same on every machine of that version."""
    machine = any(part.startswith(("_sysconfigdata", "config-")) for part in name.parts)
    return not machine and _STDLIB_LEFT_OUT.isdisjoint(name.parts)


def _path_files(path: Path, pattern: str) -> list[tuple[str, Path]]:
    if path.is_dir():
        return _folder_files(path, pattern, str(path))
    if not path.is_file():
        raise DataError(f"{path} does not exist (looked in {Path.cwd()}); expected a file, a folder, {STDLIB} or s3://...")
    return [(path.name, path)]


def _folder_files(folder: Path, pattern: str, source: str) -> list[tuple[str, Path]]:
    """Files that `pattern` matches; hidden ones are left out."""
    if "**" in pattern:
        _require_reached(folder, source)
    names = (path.relative_to(folder) for path in folder.glob(pattern) if path.is_file())
    files = sorted((name.as_posix(), folder / name) for name in names if not any(p.startswith(".") for p in name.parts))
    if not files:
        raise DataError(f"{source} holds no file that matches '{pattern}'; set data.pattern")
    return files


def _require_reached(folder: Path, source: str) -> None:
    """Refuse what `**` passes by without a word: folders that may not be read, and links to folders that lie elsewhere."""
    closed: list[OSError] = []
    for place, folders, _ in os.walk(folder, onerror=closed.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(place, name) for name in folders):
            if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
                shown = path.relative_to(folder).as_posix()
                raise DataError(
                    f"{source} holds {shown}, a link to a folder elsewhere, which is not followed; put the folder there"
                )
    if closed:
        raise DataError(f"{source}: {closed[0].filename} cannot be read ({closed[0].strerror}); mend its permissions, or move it")


def source_fingerprint(data: DataSpec) -> str:
    """sha256 over the names and bytes of every file that the recipe's text is read from: what a cache key must know.

    Of S3 objects the names, sizes and ETags are taken, without reading them. Raises DataError for a missing source.
    """
    found = hashlib.sha256()
    for source in (data.source, data.evaluation, data.calibration):
        if isinstance(source, str):
            found.update(_identity(source, data.pattern).encode())
    return found.hexdigest()


def _identity(source: str, pattern: str) -> str:
    if source.startswith("s3://"):
        from featherweight.checkpoint.s3 import list_objects

        lines = [f"{item.key} {item.size} {item.etag}" for item in list_objects(source)]
    else:
        files = _stdlib_files() if source == STDLIB else _path_files(Path(source), pattern)
        lines = [f"{name} {_sha256(path)}" for name, path in files]
    return "\n".join([str(len(lines)), *lines, ""])


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
