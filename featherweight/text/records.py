"""Records: the JSON values, table rows and Parquet rows of a file, each with the text that its field holds."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from featherweight.errors import DataError
from featherweight.text.documents import Document, Label
from featherweight.text.opening import HEAD, open_text, require_characters
from featherweight.text.spec import DataSpec

DELIMITERS = ",\t;|"
_SHOWN, _SHOWN_CHARACTERS = 8, 40
_SPACE = re.compile(r"[ \t\n\r]*")
_MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})
_SURROGATE = re.compile("[\ud800-\udfff]")
# The longest thing that a cut-off end of the text can spoil before json says so: a \\uXXXX pair.
_LOOK_AHEAD = 12


@dataclass(frozen=True)
class Record:
    """One value of a file; `where` is its place in words, `number` tells it from the file's other ones."""

    name: str
    number: int | str
    where: str
    value: Any

    def document(self, data: DataSpec) -> Document:
        """The record as a document. Raises DataError where its field holds no text."""
        if isinstance(self.value, str) and len(data.columns) == 1:
            return Document(f"{self.name}#{self.number}", self._whole(self.value, "the text"))
        text = self._words(data.field) if data.label else self._text(data.field, "field")
        target, pair = (key and self._text(key, option) for option, key in (("target", data.target), ("pair", data.pair)))
        if data.target and text.strip() and not (target or "").strip():
            raise self.without_text(data.target, "target")
        return Document(f"{self.name}#{self.number}", text, target, pair, data.label and self._label(data.label))

    def _words(self, key: str) -> str:
        """A text, or one of words in a list."""
        value = _under(self.value, key)
        if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
            return self._whole(" ".join(value), f"'{key}'")
        return self._text(key, "field")

    def _label(self, key: str) -> Label:
        value = _under(self.value, key)
        if isinstance(value, bool):
            return int(value)
        if isinstance(value, str | int) or (isinstance(value, list) and all(isinstance(one, str | int) for one in value)):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
        raise self.without_text(key, "label", "label")

    def _text(self, key: str, option: str) -> str:
        value = _under(self.value, key)
        if isinstance(value, str):
            return self._whole(value, f"'{key}'")
        raise self.without_text(key, option)

    def _whole(self, text: str, what: str) -> str:
        half = _SURROGATE.search(text)
        if half:
            code = f"\\u{ord(half.group()):04x}"
            raise DataError(
                f"{self.name} {self.where}: {what} holds {code}, half of a surrogate pair and no character; "
                f"mend it (U+FFFD is the usual mark), or leave the line out"
            )
        return text

    def without_text(self, key: str, option: str, what: str = "text") -> DataError:
        """What to say where there is no text, or label, under `key`: what is there instead, or what keys there are."""
        if _is_conversation(self.value) or (isinstance(self.value, Mapping) and _is_conversation(self.value.get(key))):
            return DataError(
                f"{self.name} {self.where} holds messages of a conversation, and no text; write each conversation as one "
                "text, as the model's chat template does (tokenizer.apply_chat_template with tokenize=False)"
            )
        if not isinstance(self.value, Mapping):
            found = f"it is {_kind(self.value)}"
        elif key in self.value:
            found = f"it holds {'nothing but white space' if _is_blank(self.value[key]) else _kind(self.value[key])}"
        else:
            found = f"found: {listed(self.value)}"
        return DataError(f"{self.name} {self.where} has no {what} under '{key}' ({found}); set data.{option}, or leave it out")


def _under(value: Any, key: str) -> Any:
    """What stands under a key, or under one in another with a dot between, as `translation.en`; None where nothing does."""
    if not isinstance(value, Mapping) or key in value:
        return value[key] if isinstance(value, Mapping) else None
    first, _, rest = key.partition(".")
    return _under(value.get(first), rest) if rest else None


def _is_conversation(value: Any) -> bool:
    """Whether it is a message as OpenAI's API or ShareGPT has them, or a list of some."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping) and any(keys <= first.keys() for keys in _MESSAGE_KEYS)


def listed(names: Iterable[object]) -> str:
    """Names of columns, in order and cut where they are many or long."""
    shown = [str(name) if len(str(name)) <= _SHOWN_CHARACTERS else f"{str(name)[:_SHOWN_CHARACTERS]}..." for name in names]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return " ".join(", ".join(sorted(shown[:_SHOWN])).split()) + more


def _is_blank(value: object) -> bool:
    """Whether it is a text of nothing, as a cell of a table that was left empty."""
    return isinstance(value, str) and not value.strip()


def _kind(value: object) -> str:
    kinds = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        str: "a text",
    }
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def read_json(name: str, path: Path, data: DataSpec) -> Iterator[Document]:
    """JSON Lines, an array, an object with a list or with columns, or several objects one after another."""
    with open_text(name, path) as stream:
        reader = JsonReader(name, stream, _decoder(set(data.columns.values())))
        for record in reader.array() if reader.peek() == "[" else reader.values():
            for part in _parts(record, data):
                yield part.document(data)


def _parts(record: Record, data: DataSpec) -> Iterable[Record]:
    """The records of a top-level value: of its one list, of its columns, or itself."""
    value = record.value
    if not isinstance(value, dict):
        return [record]
    if (found := _under(value, data.field)) is not None or data.field in value:
        words = data.label is not None and _are_words(found)
        return _columns(record, data) if isinstance(found, (list, dict)) and not words else [record]
    lists = {key: items for key, items in value.items() if isinstance(items, list) and items and _are_records(items)}
    if any(isinstance(items, list) and items and not _are_records(items) for items in value.values()):
        lists = {key: items for key, items in lists.items() if not isinstance(items[0], str)}  # names of what stands in the others
    if len(lists) > 1:
        raise DataError(
            f"{record.name} {record.where} has several lists that could be meant ({listed(lists)}); keep one of them in the file"
        )
    return _numbered(record, *lists.popitem()) if lists else [record]


def _are_words(value: Any) -> bool:
    """Whether a list holds the words of one text: where labels are read, each text of a column would have a space."""
    return isinstance(value, list) and all(isinstance(word, str) and " " not in word for word in value)


def _are_records(items: list[Any]) -> bool:
    return all(isinstance(item, (dict, str)) for item in items)


def _numbered(record: Record, key: str, items: list[Any]) -> Iterator[Record]:
    for number, item in enumerate(items, 1):
        yield Record(record.name, f"{record.number}.{number}", f"{record.where}, item {number} of '{key}'", item)


def _columns(record: Record, data: DataSpec) -> Iterable[Record]:
    """Columns by name, as pandas writes a table: each a list, or an object of values by row."""
    names = list(data.columns.values())
    columns = [_cells(record, option, name) for option, name in data.columns.items()]
    lengths = {len(column) for column in columns}
    if len(lengths) > 1:
        raise DataError(f"{record.name} {record.where} has columns of different lengths: {listed(names)}")
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return _numbered(record, data.field, rows)


def _cells(record: Record, option: str, name: str) -> list[Any]:
    """Those of a column. An object whose keys number no rows is refused: each language of a translation would be its own text."""
    column = _under(record.value, name)
    if not isinstance(column, dict):
        return column if isinstance(column, list) else []
    odd = next((key for key in column if not key.isdigit()), None)
    if odd is not None:
        raise DataError(
            f"{record.name} {record.where} holds an object under '{name}' (found: {listed(column)}); name one of its texts, such "
            f"as data.{option}: {name}.{odd}"
        )
    return list(column.values())


class _Repeated(ValueError):
    """A key that is read stands twice in one object, so that its value is anyone's guess."""


def _decoder(keys: set[str]) -> json.JSONDecoder:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [key for key, _ in pairs]
            twice = [key for key in names if key in keys and names.count(key) > 1]
            if twice:
                raise _Repeated(f"the key '{twice[0]}' stands twice in one object")
        return found

    return json.JSONDecoder(object_pairs_hook=once)


@dataclass
class JsonReader:
    """The JSON values in a stream, read no further than each one needs. `line` is the line of the next character."""

    name: str
    stream: TextIO
    decoder: json.JSONDecoder
    text: str = ""
    place: int = 0
    line: int = 1
    seen: int = field(default=0, init=False)

    def peek(self) -> str:
        """The next character that is no white space; '' at the end."""
        while True:
            match = _SPACE.match(self.text, self.place)
            self._go_to(match.end() if match else self.place)
            if self.place < len(self.text) or not self._more():
                return self.text[self.place : self.place + 1]

    def array(self) -> Iterator[Record]:
        """The elements of the array that begins here."""
        self._take("[")
        if self.peek() == "]":
            self._take("]")
        else:
            yield from self._elements()
        if self.peek():
            raise self._error("more follows the end of the array")

    def _elements(self) -> Iterator[Record]:
        while True:
            self.seen += 1
            line, value = self._value()
            yield Record(self.name, self.seen, f"item {self.seen} (line {line})", value)
            if self._take(",]") == "]":
                return

    def values(self) -> Iterator[Record]:
        """Values one after another: a line each (JSON Lines), or over several lines."""
        by_line = self._line_is_whole()
        while self.peek():
            line, value = self._value_of_line() if by_line else self._value()
            yield Record(self.name, line, f"line {line}", value)

    def _line_is_whole(self) -> bool:
        """Whether the first line holds a value, as in JSON Lines: then every line does, and an error is one of its line."""
        self._complete_line()
        try:
            self.decoder.decode(self._rest_of_line())
        except json.JSONDecodeError:
            return self.name.lower().split(".")[-1] in ("jsonl", "ndjson")
        except (ValueError, RecursionError):
            return True
        return True

    def _complete_line(self) -> None:
        while self.text.find("\n", self.place) < 0 and self._more():
            pass

    def _rest_of_line(self) -> str:
        end = self.text.find("\n", self.place)
        return self.text[self.place : end if end >= 0 else len(self.text)]

    def _value_of_line(self) -> tuple[int, Any]:
        self._complete_line()
        line, text = self.line, self._rest_of_line()
        value = self._decoded(lambda: self.decoder.decode(text))
        self._go_to(self.place + len(text))
        return line, value

    def _value(self) -> tuple[int, Any]:
        """The line and the value that begin here, over as many lines as it takes."""
        self.peek()
        line = self.line
        while True:
            try:
                value, end = self._decoded(lambda: self.decoder.raw_decode(self.text, self.place))
            except _Incomplete:
                continue
            if end == len(self.text) and self._more():
                continue  # a number may go on
            self._go_to(end)
            return line, value

    def _decoded(self, decode: Callable[[], Any]) -> Any:
        """What `decode` gives; _Incomplete where the stream held the rest, DataError where this is no JSON."""
        try:
            return decode()
        except json.JSONDecodeError as error:
            cut = error.doc is self.text and (error.msg.startswith("Unterminated") or error.pos + _LOOK_AHEAD >= len(self.text))
            if cut and self._more():
                raise _Incomplete from error
            passed = self.text.count("\n", self.place, error.pos) if error.doc is self.text else 0
            raise self._error(error.msg, self.line + passed) from error
        except _Repeated as error:
            raise DataError(f"{self.name} line {self.line}: {error}; keep one") from error
        except (ValueError, RecursionError) as error:
            raise self._error(str(error)) from error

    def _take(self, wanted: str) -> str:
        """Step over the next character, which must be one of `wanted`."""
        found = self.peek()
        if not found or found not in wanted:
            expected = " or ".join(f"'{character}'" for character in wanted)
            raise self._error(f"expected {expected}, found " + (f"'{found}'" if found else "the end of the file"))
        self._go_to(self.place + 1)
        return found

    def _error(self, message: str, line: int | None = None) -> DataError:
        place = f"{self.name} line {line or self.line}"
        return DataError(f"{place} is not JSON: {message}; mend it, or set data.format to 'text' if the file is prose")

    def _go_to(self, place: int) -> None:
        self.line += self.text.count("\n", self.place, place)
        self.place = place

    def _more(self) -> bool:
        """Read on, as much again as is held, and let go of what has been passed."""
        rest = self.text[self.place :]
        read = self.stream.read(max(HEAD, len(rest)))
        self.text, self.place = rest + read, 0
        return bool(read)


class _Incomplete(Exception):
    """The value goes on beyond what has been read, which now is more."""


def read_table(name: str, path: Path, data: DataSpec) -> Iterator[Document]:
    """Rows of values between commas, tabs or semicolons, below a line with the names of the columns."""
    csv.field_size_limit(2**31 - 1)
    with open_text(name, path) as stream:
        header = next((line for line in stream if line.strip()), "")
        lines = _checked_lines(name, chain([header], stream))
        rows = csv.reader(lines, delimiter=delimiter_of(header, name, data.field), strict=True)
        columns = next(rows, [])
        _require_columns(name, columns, data)
        for number, record in enumerate(_rows(name, rows, columns), 1):
            yield Record(name, number, record.where, record.value).document(data)


def _checked_lines(name: str, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        require_characters(name, line, number)
        yield line


def _rows(name: str, rows: Any, columns: list[str]) -> Iterator[Record]:
    """The rows that are not blank; DataError for one that has not as many values as there are columns."""
    try:
        for row in rows:
            where = f"line {rows.line_num}"
            if row and len(row) != len(columns):
                raise DataError(f"{name} {where} has {len(row)} values, but the first line names {len(columns)} columns")
            if row:
                yield Record(name, 0, where, dict(zip(columns, row, strict=True)))
    except csv.Error as error:
        raise DataError(f"{name} line {rows.line_num} is not CSV: {error}") from error


def _require_columns(name: str, columns: list[str], data: DataSpec) -> None:
    for option, column in data.columns.items():
        if columns.count(column) != 1:
            how = "no column" if column not in columns else "more than one column"
            raise DataError(f"{name} has {how} '{column}' (columns: {listed(columns)}); set data.{option}")


def delimiter_of(header: str, name: str, field: str) -> str:
    """What separates the names in a table's first line: by the file's name, by where `field` is one of them, by frequency."""
    if re.search(r"\.tsv(\.|$)", name.lower()):
        return "\t"
    return max(DELIMITERS, key=lambda mark: (field in next(csv.reader([header], delimiter=mark), []), header.count(mark)))


def is_table(start: str, name: str, field: str) -> bool:
    """Whether the beginning of a file reads as a table: a column of that name, and as many values in each of some rows."""
    lines = list(StringIO(start))  # `splitlines` would split at more than line feeds
    lines = lines[:-1] if len(start) >= HEAD else lines
    if len(lines) < 2 or field not in lines[0]:
        return False
    try:
        rows = [row for row in csv.reader(lines, delimiter=delimiter_of(lines[0], name, field), strict=True) if row]
    except csv.Error:
        return False
    return len(rows) > 1 and len(rows[0]) > 1 and field in rows[0] and {len(row) for row in rows} == {len(rows[0])}


def read_parquet(name: str, path: Path, data: DataSpec) -> Iterator[Document]:
    """The rows of a Parquet file, in batches; only the columns that are needed are read."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    wanted = list(data.columns.values())
    try:
        with ParquetFile(path) as file:
            names, paths = file.schema_arrow.names, [file.schema.column(place).path for place in range(len(file.schema.names))]
            _require_columns(name, [*names, *(path for path in paths if path in wanted and path not in names)], data)
            rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(1024, columns=wanted))
            for number, row in enumerate(rows, 1):
                yield Record(name, number, f"row {number}", row).document(data)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {name} as Parquet: {' '.join(str(error).split())}") from error
