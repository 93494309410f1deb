"""Text sources and splits."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from featherweight.errors import DataError, FeatherweightError, RecipeError
from featherweight.text.documents import read_documents
from featherweight.text.overlap import Pool, copied_shares, digest, ngrams
from featherweight.text.sources import read_source, source_fingerprint
from featherweight.text.spec import DataSpec, TextSpec
from tasks.text import SPLITS, split_text, text

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def prose(seed: int, words: int = 60) -> str:
    """Text of its own: no 13 words of it occur in another seed's."""
    dice = random.Random(seed)
    return " ".join(f"{dice.choice(['red', 'blue', 'old', 'new'])}{dice.randrange(10**6)}" for _ in range(words))


def jsonl(path: Path, texts: list[str], field: str = "text") -> DataSpec:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return DataSpec(source=str(path), field=field, evaluation=0.2, calibration=0.2)


def test_splits_are_whole_disjoint_and_complete(tmp_path):
    texts = [prose(n) for n in range(50)]
    splits = split_text(jsonl(tmp_path / "d.jsonl", texts))
    parts = [[document.text for document in getattr(splits, name)] for name in SPLITS]
    assert sorted(text for part in parts for text in part) == sorted(texts)
    assert all(5 <= len(part) <= 20 for part in parts[1:])
    assert all([texts.index(t) for t in part] == sorted(texts.index(t) for t in part) for part in parts)


def test_seed_moves_documents_and_new_documents_do_not(tmp_path):
    texts = [prose(n) for n in range(60)]
    data = jsonl(tmp_path / "d.jsonl", texts)
    before = {document.text for document in split_text(data).evaluation}
    assert before != {document.text for document in split_text(data, seed=1).evaluation}
    grown = split_text(jsonl(tmp_path / "d.jsonl", [prose(n) for n in range(1000, 1040)] + texts))
    assert before == {document.text for document in grown.evaluation} & set(texts)


def test_exact_copies_are_dropped_once_and_counted(tmp_path):
    texts = [prose(n) for n in range(20)]
    data = jsonl(tmp_path / "d.jsonl", [*texts, texts[3].upper(), "  " + texts[4].replace(" ", "\n"), "   "])
    splits = split_text(data)
    assert sum(len(getattr(splits, name)) for name in SPLITS) == 20
    assert splits.metrics("train")["duplicates_dropped"] == 2


def test_near_copies_are_never_held_out(tmp_path):
    original = prose(0, 200)
    texts = [original, original + " and one more ending", *(prose(n) for n in range(1, 30))]
    for seed in range(20):
        splits = split_text(jsonl(tmp_path / "d.jsonl", texts), seed)
        assert splits.near_copies == 2
        assert {original, texts[1]} <= {document.text for document in splits.train}


def test_the_stage_writes_its_split(tmp_path):
    data = jsonl(tmp_path / "d.jsonl", [prose(n) for n in range(12)])
    splits = split_text(data, seed=7)
    for name in SPLITS:
        out = tmp_path / name
        out.mkdir()
        metrics = text(TextSpec(data=data, split=name), out=out, seed=7)
        assert metrics == splits.metrics(name)
        assert metrics["documents"] > 0
        assert list(read_documents(out)) == getattr(splits, name)


@pytest.mark.parametrize("seed", range(8))
def test_smallest_source_fills_all_three(tmp_path, seed):
    data = jsonl(tmp_path / "d.jsonl", [prose(n) for n in range(3)]).model_copy(update={"evaluation": 0.45, "calibration": 0.45})
    splits = split_text(data, seed)
    assert [len(getattr(splits, name)) for name in SPLITS] == [1, 1, 1]


def test_too_few_distinct_documents_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"1 documents.* too few to hold out evaluation and calibration"):
        split_text(jsonl(tmp_path / "d.jsonl", ["just one line of text"]))


def test_shares_that_leave_nothing(tmp_path):
    data = jsonl(tmp_path / "d.jsonl", [prose(n) for n in range(9)]).model_copy(update={"evaluation": 0.7, "calibration": 0.3})
    with pytest.raises(RecipeError, match="leave nothing to train on"):
        split_text(data)


def test_evaluation_and_calibration_of_their_own(tmp_path):
    for name, first in (("train", 0), ("eval", 100), ("calib", 200)):
        jsonl(tmp_path / f"{name}.jsonl", [prose(n) for n in range(first, first + 5)])
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "eval", "calib")}
    splits = split_text(DataSpec(source=paths["train"], evaluation=paths["eval"], calibration=paths["calib"]))
    assert [document.text for document in splits.train] == [prose(n) for n in range(5)]
    assert [document.text for document in splits.evaluation] == [prose(n) for n in range(100, 105)]
    assert [document.text for document in splits.calibration] == [prose(n) for n in range(200, 205)]


def test_one_long_file_is_cut_at_blank_lines(tmp_path):
    paragraphs = [prose(n, 40 + n % 50) for n in range(100)] + [prose(500, 2000)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    documents = read_source(str(tmp_path / "book.txt"), DataSpec(source="-")).documents
    assert len(documents) > 10
    assert all(len(document.text) <= 4000 for document in documents)
    assert all(len(document.text) >= 1900 for document in documents[:-20])
    assert " ".join(" ".join(d.text for d in documents).split()) == " ".join(" ".join(paragraphs).split())
    assert len({document.id for document in documents}) == len(documents)


def test_files_of_which_one_is_most_of_the_text_are_held_out_by_their_bytes(tmp_path):
    (tmp_path / "README").write_text("What lies here.")
    (tmp_path / "LICENSE").write_text("All rights are given.")
    (tmp_path / "notes.txt").write_text(prose(7, 500))
    (tmp_path / "train.txt").write_text("\n\n".join(prose(n, 60) for n in range(800)))
    splits = split_text(DataSpec(source=str(tmp_path), evaluation=0.2, calibration=0.2))
    sizes = [splits.metrics(split)["bytes"] for split in SPLITS]
    assert all(0.1 < size / sum(sizes) < 0.3 for size in sizes[1:])
    whole = {document.id for split in SPLITS for document in getattr(splits, split)}
    assert {"README", "LICENSE", "notes.txt"} < whole and "train.txt#1" in whole


def test_chunks_respect_lines_without_blank_ones(tmp_path):
    (tmp_path / "log.txt").write_text("\n".join(prose(n, 10) for n in range(200)))
    documents = read_source(str(tmp_path / "log.txt"), DataSpec(source="-")).documents
    lines = [line for document in documents for line in document.text.splitlines() if line]
    assert lines == [prose(n, 10) for n in range(200)]


def test_a_line_without_end_is_cut_at_spaces_or_where_it_must_be(tmp_path):
    line = " ".join(map(str, range(2000))) + "".join(map(str, range(2000)))
    (tmp_path / "line.txt").write_text(line)
    documents = read_source(str(tmp_path / "line.txt"), DataSpec(source="-")).documents
    assert all(len(document.text) <= 4000 for document in documents)
    assert "".join(document.text for document in documents) == line
    assert documents[0].text.endswith(" ")


def test_separator(tmp_path):
    (tmp_path / "stories.txt").write_text("\n<|end|>\n".join(prose(n) for n in range(9)))
    documents = read_source(str(tmp_path / "stories.txt"), DataSpec(source="-", separator="<|end|>")).documents
    assert [document.text for document in documents] == [prose(n) for n in range(9)]


def test_folder_with_pattern_skips_hidden_files(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.md", "sub/a.md", ".hidden.md", "c.bin"):
        (tmp_path / name).write_text(prose(len(name)))
    documents = read_source(str(tmp_path), DataSpec(source="-", pattern="**/*.md")).documents
    assert {document.id.split("#")[0] for document in documents} == {"b.md", "sub/a.md"}


@pytest.mark.parametrize("pattern", ["/etc/*", "**.txt", ""])
def test_a_pattern_that_is_none_is_refused_in_the_recipe(pattern):
    with pytest.raises(ValueError, match="is no pattern of names below the source"):
        DataSpec(source="-", pattern=pattern)


def test_a_linked_folder_elsewhere_is_not_passed_by_in_silence(tmp_path):
    for name in ("data", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(prose(len(name)))
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    data = DataSpec(source=str(tmp_path / "data"))
    assert read_source(data.source, data).documents
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="holds more, a link to a folder elsewhere, which is not followed; put the folder there"):
        source_fingerprint(data)
    assert read_source(data.source, DataSpec(source="-", pattern="*.txt")).documents


def test_max_bytes_takes_a_spread_of_files_up_to_the_cap(tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(prose(number, 100))
    data = DataSpec(source=str(tmp_path), max_bytes=10_000)
    documents = read_source(data.source, data).documents
    assert 9_000 <= sum(len(document.text) for document in documents) <= 10_000
    assert [document.id for document in documents] == sorted(document.id for document in documents)
    assert documents[-1].id > "20.txt", "a cap must not mean 'the first files of the alphabet'"


@pytest.mark.slow
def test_standard_library():
    data = DataSpec(source="python-stdlib", max_bytes=1_000_000)
    splits = split_text(data)
    names = [document.id for name in SPLITS for document in getattr(splits, name)]
    assert len(names) > 30
    assert not any(part in name.split("/") for name in names for part in ("test", "idlelib", "site-packages", "encodings"))
    whole = read_source("python-stdlib", DataSpec(source="python-stdlib")).documents
    assert {"asyncio/base_events.py", "json/decoder.py", "argparse.py"} <= {document.id for document in whole}
    assert next(d for d in whole if d.id == "this.py").text.startswith('s = """Gur Mra bs Clguba')


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"  \n\n ", r"empty.txt holds no text"),
        ("latin.txt", "caf\xe9 noir".encode("latin-1"), r"latin.txt is not UTF-8 text \(byte 3, line 1\)"),
        (
            "a.jsonl",
            b'{"text": "ok"}\n{"body": ""}\n',
            r"a.jsonl line 2 has no text under 'text' \(found: body\)",
        ),
        ("b.jsonl", b'{"text": "ok"}\n{"text": \n', r"b.jsonl line 2 is not JSON"),
        ("c.jsonl", b'{"text": 7}\n', r"c.jsonl line 1 has no text under 'text'"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        split_text(DataSpec(source=str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist"):
        split_text(DataSpec(source=str(tmp_path / "nowhere.txt")))
    with pytest.raises(DataError, match=r"no file that matches '\*\*/\*\.md'"):
        split_text(DataSpec(source=str(tmp_path), pattern="**/*.md"))
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist"):
        source_fingerprint(DataSpec(source=str(tmp_path / "nowhere.txt")))


def test_fingerprint_follows_content_not_time(tmp_path):
    data = jsonl(tmp_path / "d.jsonl", [prose(1)])
    before = source_fingerprint(data)
    (tmp_path / "d.jsonl").touch()
    assert source_fingerprint(data) == before
    jsonl(tmp_path / "d.jsonl", [prose(2)])
    assert source_fingerprint(data) != before


def test_s3_prefix_and_object(s3_server):
    (s3_server.folder / "texts").mkdir()
    for number in range(5):
        (s3_server.folder / "texts" / f"{number}.txt").write_text(prose(number))
    data = DataSpec(source=f"s3://{s3_server.bucket}/texts")
    assert [document.text for document in read_source(data.source, data).documents] == [prose(n) for n in range(5)]
    before = source_fingerprint(data)
    (s3_server.folder / "texts" / "4.txt").write_text(prose(40))
    assert source_fingerprint(data) != before
    (one,) = read_source(f"{data.source}/4.txt", data).documents
    assert one.text == prose(40)
    with pytest.raises(FeatherweightError, match="holds no objects"):
        read_source(f"s3://{s3_server.bucket}/nowhere", data)


def test_overlap_counts_word_sequences():
    words = prose(1, 60).split()
    half = " ".join(words[:36] + prose(2, 24).split())
    pool = Pool([ngrams(half), ngrams(""), ngrams("Short, but COPIED")])
    assert pool.shares() == [0.0, 0.0, 0.0]
    for other in (prose(1, 60), prose(3), "short but copied", ""):
        pool.meet(ngrams(other))
    assert pool.shares() == [pytest.approx(24 / 48), 0.0, 1.0]
    Pool([]).meet(ngrams("nothing to compare with"))
    assert copied_shares([ngrams("a b c"), ngrams("d e f"), ngrams("A b, c")]) == [1.0, 0.0, 1.0]
    assert digest("One  Two\n") == digest("one two") != digest("one two", salt="1")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize(("name", "least"), [("tinystories-excerpt/tinystories.txt", 60), ("tinyshakespeare/input.txt", 300)])
def test_real_files_split_well(name, least):
    splits = split_text(DataSpec(source=str(SHARED / name), evaluation=0.3, calibration=0.1))
    sizes = [len(getattr(splits, split)) for split in SPLITS]
    assert sum(sizes) > least
    assert 0.2 < sizes[2] / sum(sizes) < 0.4
