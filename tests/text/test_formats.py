"""A file is what its content says, whatever it is called; what is not read is refused in one line."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import pickle
import quopri
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.errors import DataError
from featherweight.text.records import JsonReader, _decoder
from featherweight.text.sources import read_source
from featherweight.text.spec import DataSpec, TextSpec
from tasks.text import text

TEXTS = ['A river, a "stone" and a lamp.', "Zwei Zeilen\nund {eine} Klammer", "第三 🙂 text\u2028with its own line end"]
LINES = "".join(json.dumps({"id": n, "text": one}) + "\n" for n, one in enumerate(TEXTS))
OBJECTS = [{"id": n, "text": one} for n, one in enumerate(TEXTS)]
CSV = (
    'id,text\n0,"A river, a ""stone"" and a lamp."\n1,"Zwei Zeilen\nund {eine} Klammer"\n'
    "2,第三 🙂 text\u2028with its own line end\n"
)


def zstandard(content: bytes) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def parquet(columns: dict[str, list]) -> bytes:
    import pyarrow
    from pyarrow.parquet import write_table

    sink = io.BytesIO()
    write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


def read(path: Path, content: bytes | str, **options: object) -> list[str]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [document.text for document in read_source(str(path), DataSpec(source="-", **options)).documents]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.ndjson", LINES),
        ("text.JSONL", LINES),
        ("text.txt", LINES),
        ("noname", LINES),
        ("crlf.jsonl", ("\ufeff" + LINES.replace("\n", "\r\n")).encode()),
        ("mac.jsonl", LINES.replace("\n", "\r")),
        ("utf16.jsonl", LINES.encode("utf-16")),
        ("utf32.jsonl", LINES.encode("utf-32")),
        ("array.json", json.dumps(OBJECTS, indent=1)),
        ("small.json", json.dumps(OBJECTS, separators=(",", ":"))),
        ("strings.json", json.dumps(TEXTS)),
        ("array.jsonl", json.dumps(OBJECTS)),
        ("held.json", json.dumps({"version": 1, "data": OBJECTS, "tags": []})),
        ("pretty.json", "\n".join(json.dumps(one, indent=2) for one in OBJECTS)),
        ("columns.json", json.dumps({"id": [0, 1, 2], "text": TEXTS})),
        ("pandas.json", json.dumps({"text": dict(enumerate(TEXTS)), "id": {"0": 0, "1": 1, "2": 2}})),
        ("text.csv", CSV),
        ("TEXT.CSV", CSV.encode("utf-8-sig")),
        ("unnamed.txt", CSV),
        ("crlf.csv", CSV.replace("\n", "\r\n")),
        ("semicolons.csv", CSV.replace("id,", "id;").replace('0,"', '0;"').replace('1,"', '1;"').replace("2,第", "2;第")),
        ("text.tsv", CSV.replace("id,", "id\t").replace('0,"', '0\t"').replace('1,"', '1\t"').replace("2,第", "2\t第")),
        ("text.parquet", parquet({"id": [0, 1, 2], "text": TEXTS})),
        ("parquet.txt", parquet({"id": [0, 1, 2], "text": TEXTS})),
        ("text.jsonl.gz", gzip.compress(LINES.encode())),
        ("array.JSON.GZ", gzip.compress(json.dumps(OBJECTS).encode())),
        ("text.csv.bz2", bz2.compress(CSV.encode())),
        ("text.jsonl.xz", lzma.compress(LINES.encode())),
        ("text.jsonl.zst", zstandard(LINES.encode())),
    ],
)
def test_the_texts_inside_are_read(tmp_path: Path, name: str, content: bytes | str) -> None:
    assert read(tmp_path / name, content) == TEXTS


def test_prose_stays_prose_and_takes_one_kind_of_line_end(tmp_path: Path) -> None:
    prose = '"Who?" she said, 1,2\n[Verse 1]\n{not json}\n'
    for number, content in enumerate([prose, prose.replace("\n", "\r\n"), prose.encode("utf-16"), gzip.compress(prose.encode())]):
        assert read(tmp_path / f"{number}.txt", content, separator="\n[")[0] == '"Who?" she said, 1,2'
    assert read(tmp_path / "bracket.md", "[a](b)\n", separator="#") == ["[a](b)"]
    assert read(tmp_path / "brace.tex", "{\\bf a}", separator="#") == ["{\\bf a}"]
    assert read(tmp_path / "commas.txt", "one, two\nthe text, said he\n", separator="#") == ["one, two\nthe text, said he"]
    assert read(tmp_path / "json.txt", LINES, format="text", separator="###") == [LINES.strip("\n")]


def test_markup_is_text_where_the_recipe_says_so_or_where_it_does_not_begin_with_it(tmp_path: Path) -> None:
    assert read(tmp_path / "a.html", "<html><p>a", format="text") == ["<html><p>a"]
    assert read(tmp_path / "b.txt", "<htmlish> is <no> tag") == ["<htmlish> is <no> tag"]


def test_json_keeps_the_line_ends_that_it_spells(tmp_path: Path) -> None:
    assert read(tmp_path / "a.jsonl", json.dumps({"text": "one\r\ntwo"}) + "\r\n") == ["one\r\ntwo"]


def test_each_file_of_a_folder_is_read_as_what_it_is(tmp_path: Path) -> None:
    for name, content in {"a.jsonl": LINES.split("\n")[0], "b.csv": "text\nsecond\n", "c.txt": "third"}.items():
        (tmp_path / name).write_text(content)
    documents = read_source(str(tmp_path), DataSpec(source="-")).documents
    assert {document.id.split("#")[0]: document.text for document in documents} == {
        "a.jsonl": TEXTS[0],
        "b.csv": "second",
        "c.txt": "third",
    }


def test_a_target_is_read_beside_the_text(tmp_path: Path) -> None:
    pairs = {"de": ["ein Haus", "ein Baum", "ein Tag"], "en": ["a house", "a tree", "a day"]}
    rows = list(zip(*pairs.values(), strict=True))
    contents: dict[str, bytes] = {
        "a.parquet": parquet(pairs),
        "a.csv": ("de,en\n" + "".join(f"{a},{b}\n" for a, b in rows)).encode(),
        "a.json": json.dumps(pairs).encode(),
        "a.jsonl": "".join(json.dumps({"de": a, "en": b}) + "\n" for a, b in rows).encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        found = read_source(str(tmp_path / name), DataSpec(source="-", field="de", target="en")).documents
        assert [(one.text, one.target) for one in found] == rows


def test_what_lies_in_an_object_is_named_with_a_dot(tmp_path: Path) -> None:
    """As collections of translations have it."""
    pairs = [{"en": "a house", "de": "ein Haus"}, {"en": "a tree", "de": "ein Baum"}]
    lines = [{"id": place, "translation": pair} for place, pair in enumerate(pairs)]
    contents = {
        "a.parquet": parquet({"translation": pairs, "id": [0, 1]}),
        "a.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode(),
        "a.json": json.dumps({"translation": {name: [pair[name] for pair in pairs] for name in ("en", "de")}}).encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        data = DataSpec(source="-", field="translation.en", target="translation.de")
        found = read_source(str(tmp_path / name), data).documents
        assert [(one.text, one.target) for one in found] == [(pair["en"], pair["de"]) for pair in pairs]


def archive(make: Callable[..., object]) -> bytes:
    sink = io.BytesIO()
    if make is zipfile.ZipFile:
        with zipfile.ZipFile(sink, "w") as zipped:
            zipped.writestr("a.txt", "text")
    else:
        with tarfile.open(fileobj=sink, mode="w:gz") as tarred:
            tarred.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(b""))
    return sink.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,body\n1,x\n", r"a.csv has no column 'text' \(columns: body, id\); set data.field"),
        ("a.csv", "text,text\n1,x\n", r"a.csv has more than one column 'text'"),
        ("a.csv", "id,text\n1,x\n2\n", r"a.csv line 3 has 1 values, but the first line names 2 columns"),
        ("a.csv", 'id,text\n1,"x"y\n', r"a.csv line 2 is not CSV"),
        ("a.csv", 'id,text\n1,"x\n', r"a.csv line 2 is not CSV"),
        ("a.parquet", parquet({"id": [1], "body": ["x"]}), r"a.parquet has no column 'text' \(columns: body, id\); set data.field"),
        ("a.parquet", parquet({"text": ["x", None]}), r"a.parquet row 2 has no text under 'text' \(it holds null\)"),
        ("a.parquet", parquet({"text": [1, 2]}), r"a.parquet row 1 has no text under 'text' \(it holds a number\)"),
        ("a.parquet", parquet({"text": ["x"]})[:-9], r"cannot read a.parquet as Parquet"),
        ("a.json", '{"train": [{"text": "a"}], "test": [{"text": "b"}]}', r"a.json line 1 has several lists .*\(test, train\)"),
        (
            "a.json",
            '{"columns": ["text"], "data": [["a"], ["b"]]}',
            r"no text under 'text' \(found: columns, data\); set data.field",
        ),
        ("a.json", '{"body": "a", "id": 1}', r"a.json line 1 has no text under 'text' \(found: body, id\); set data.field"),
        ("a.json", '[{"text": "a"},\n{"text": null}]', r"a.json item 2 \(line 2\) has no text under 'text' \(it holds null\)"),
        ("a.json", '[{"text": "a"},\n{"text": "b"', r"a.json line 2 is not JSON: Expecting ',' delimiter"),
        ("a.json", '[{"text": "a"}]\n[1]', r"a.json line 2 is not JSON: more follows the end of the array"),
        ("a.json", "Once upon a time", r"a.json line 1 is not JSON: Expecting value"),
        ("a.txt", LINES + "prose", r"a.txt line 4 is not JSON: .* set data.format to 'text'"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"a.jsonl line 2 has no text under 'text' \(it is a list\)"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', r"a.jsonl line 1: the key 'text' stands twice"),
        ("a.jsonl", LINES + '{"text": "cut \\ud83d off"}\n', r"a.jsonl line 4: 'text' holds \\ud83d, half of a surrogate pair"),
        ("a.jsonl", "[" * 100_000, r"a.jsonl line 1 is not JSON: .*recursion"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", r"a.jsonl line 1 is not JSON: .*4300 digits"),
        ("a.txt", "\n<!DOCTYPE html>\n<p>a", r"a.txt is HTML, whose tags would be read as text; .* say data.format: text"),
        ("a.htm", "<html lang='en'>", r"a.htm is HTML, whose tags would be read as text"),
        ("a.md", "---\ntitle: b\ntags: [c]\n---\n# d\n", r"a.md begins with front matter, whose keys would be read as text"),
        ("a.md", "+++\ntitle = 'b'\n+++\nd\n", r"a.md begins with front matter"),
        ("a.yml", "text: a\n", r"a.yml is YAML, whose keys would be read as text"),
        ("a.txt", "<?xml version='1.0'?><a/>", r"a.txt is XML, whose tags would be read as text"),
        ("a.xml", "<doc><p>a</p></doc>", r"a.xml is XML, whose tags would be read as text"),
        ("a.svg.gz", gzip.compress(b"<svg><text>a</text></svg>"), r"a.svg.gz is XML, whose tags would be read as text"),
        ("a.jsonl", json.dumps({"messages": [{"role": "user", "content": "a"}]}), r"line 1.* holds messages of a conversation"),
        ("a.json", json.dumps([{"text": [{"from": "human", "value": "a"}]}]), r"item 1.* conversation, .*apply_chat_template"),
        ("a.parquet", parquet({"text": [[{"role": "user", "content": "a"}]]}), r"a.parquet row 1 holds messages of a conversation"),
        ("a.txt", archive(zipfile.ZipFile), r"a.txt is a zip archive or an Office document, not text"),
        ("a.txt", archive(tarfile.open), r"a.txt is a tar archive, not text"),
        ("a.txt", b"\x89PNG\r\n\x1a\n" + b"\0" * 9, r"a.txt is a PNG image, not text"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1f\nsize 9\n", r"'git lfs pull' puts the file, not"),
        ("a.txt", ("naïve café — 你好\n" * 9).encode("utf-7"), r"a.txt is not UTF-8 text: it looks like UTF-7"),
        ("a.txt", ("你好世界 abc\n" * 9).encode("hz"), r"a.txt is not UTF-8 text: it looks like HZ, a Chinese encoding"),
        ("a.txt", quopri.encodestring(("Käse für Ærø " * 20).encode()), r"a.txt is not UTF-8 text: .* mail in quoted-printable"),
        ("a.txt", base64.encodebytes(b"a river" * 40), r"a.txt is not UTF-8 text: it looks like base64"),
        ("a.txt", pickle.dumps(["a river"], protocol=0), r"a.txt is a pickle, which can run code and is not opened, not text"),
        ("a.txt", b"\n%PDF-1.4\n1 0 obj\n", r"a.txt is a PDF document, not text"),
        ("a.txt", b"ORC\x11\0\0\n\x06\x12\x04", r"a.txt is an ORC file, which Parquet can take the place of, not text"),
        ("a.txt", b"Obj\x01\x04\x14avro.codec", r"a.txt is an Avro file, which Parquet can take the place of, not text"),
        ("a.txt", b"RIFF\x24\x08\x01\x01WAVEfmt ", r"a.txt is a recording or an image"),
        ("a.txt", b"\x11\x02some" * 9, r"a.txt is not text: 33% of its bytes are control characters, as in binary files"),
        ("a.txt", "<!-- a -->\n<!DOCTYPE html>\n<p>a", r"a.txt is HTML, whose tags would be read as text"),
        (
            "a.txt",
            "日本語の文".encode("iso2022_jp"),
            r"a.txt is not UTF-8 text: it looks like ISO-2022, as Japanese mail is written in",
        ),
        (
            "a.jsonl",
            json.dumps({"text": {"en": "a", "de": "b"}}),
            r"a.jsonl line 1 holds an object under 'text' \(found: de, en\); name .* as data.field: text.en",
        ),
        ("a.txt", "prose".encode("utf-16-le"), r"a.txt is not text: it looks like UTF-16 without a byte order mark"),
        ("a.txt", b"some text\n" * 9 + bytes(range(40)), r"a.txt is not text: byte 90 is a NUL"),
        ("a.txt", b"some text\n" * 9000 + b"\0", r"a.txt is not text: line 9001 holds a NUL"),
        ("a.txt", b"ab\n" * 50_000 + "caf\xe9".encode("latin-1"), r"a.txt is not UTF-8 text \(byte 150003, line 50001\)"),
        ("a.txt", "text\n".encode("utf-16") + b"\0", r"a.txt is not UTF-16 text"),
        ("a.txt.gz", gzip.compress(b"text " * 10_000)[:-20], r"cannot read a.txt.gz: Compressed file ended"),
    ],
)
def test_what_is_not_read_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes | str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name, content)
    assert "\n" not in str(caught.value)
    (tmp_path / "00.txt").write_text("a good file beside it")
    with pytest.raises(DataError, match=name):
        read_source(str(tmp_path), DataSpec(source="-"))


def test_the_stage_refuses_half_a_surrogate_pair(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{n} \ud83d"}) + "\n" for n in range(9)))
    with pytest.raises(DataError, match=r"a\.jsonl line 1"):
        text(TextSpec(data=DataSpec(source=str(tmp_path / "a.jsonl")), split="train"), out=tmp_path / "out")
    assert not (tmp_path / "out" / "documents.jsonl").exists()


class Counted(io.StringIO):
    """A stream that knows how much of it was read at most at once."""

    taken = 0

    def read(self, size: int | None = -1, /) -> str:
        assert size is not None and size > 0
        self.taken += size
        return super().read(size)


def test_a_long_array_in_one_line_is_read_as_it_goes() -> None:
    stream = Counted(json.dumps([{"text": "x" * 1000}] * 10_000))
    reader = JsonReader("a.json", stream, _decoder({"text"}))
    next(reader.array())
    assert stream.taken < 200_000
    wrong = Counted('[{"text": nothing}, ' + json.dumps(["x" * 1000] * 10_000)[1:])
    with pytest.raises(DataError, match="Expecting value"):
        list(JsonReader("a.json", wrong, _decoder({"text"})).array())
    assert wrong.taken < 200_000


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1), st.integers(1, 9), st.sampled_from([None, 1]))
def test_json_in_any_pieces_is_the_same(texts: list[str], size: int, indent: int | None) -> None:
    class Drops(io.StringIO):
        def read(self, _: int | None = -1, /) -> str:
            return super().read(size)

    values = [*texts, {"text": texts}, 12345, True, None, [-1.5e3]]
    reader = JsonReader("a", Drops(json.dumps(values, indent=indent)), _decoder({"text"}))
    assert [record.value for record in reader.array()] == values


@pytest.mark.parametrize(
    "prose",
    [
        "a+b-c is 1+1- and C++ -- x+AN8 y+=1\n" * 9,
        "if x == CAFE or y = BABE:\n    z=D3AD\n" * 9,
        "\x1b[31mred\x1b[0m\tand\x0c plain\n" * 9,
        "begin 1 of the words\n~{ and ~}\n" * 9,
        "<!-- a note --> in prose\n" * 9,
        "ORCHIDS bloom in May.\n",
        "GGUF is a file format.\n",
        "GIF89a has more than one picture.\n",
    ],
)
def test_prose_that_looks_a_little_like_something_else_is_read(tmp_path: Path, prose: str) -> None:
    assert read(tmp_path / "a.txt", prose) == [prose.strip("\n")]


def test_a_row_without_a_translation_is_told_by_its_line(tmp_path: Path) -> None:
    """A model would learn to write nothing; a row without a source is left out, as blank documents are."""
    with pytest.raises(DataError, match=r"a.csv line 3 has no text under 'de' \(it holds nothing but white space\)"):
        read(tmp_path / "a.csv", "en,de\na,b\nc, \n", field="en", target="de")
    assert read(tmp_path / "b.csv", "en,de\na,b\n,\n", field="en", target="de") == ["a"]
