"""Data gates: suites on text and on metrics."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from featherweight.errors import DataError, StageError
from featherweight.report.result import gate_rows
from featherweight.text.documents import Document, write_documents
from featherweight.text.spec import GateSpec
from tasks.gate import check_metrics, gate

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def prose(seed: int, words: int = 200) -> str:
    dice = random.Random(seed)
    return " ".join(f"word{dice.randrange(10**6)}" for _ in range(words))


@pytest.fixture
def texts(tmp_path):
    """Writes the three splits, each given as {id: text}, and returns what `gate` takes."""

    def write(**splits: dict[str, str]) -> dict[str, Path]:
        start = {"train": 0, "calibration": 100, "evaluation": 200}
        for name, first in start.items():
            own = {f"{name}{n}": prose(first + n) for n in range(8)} if splits.get(name) != {} else {}
            documents = own | splits.get(name, {})
            write_documents(tmp_path / name, [Document(id, text) for id, text in documents.items()])
        (tmp_path / "out").mkdir()
        return {name: tmp_path / name for name in [*start, "out"]}

    return write


def refused(folders: dict[str, Path]) -> str:
    with pytest.raises(DataError) as caught:
        gate(GateSpec(), **folders)
    assert "\n" not in str(caught.value)
    assert json.loads((folders["out"] / "validation.json").read_text())["success"] is False
    assert "✘ failed" in (folders["out"] / "validation.html").read_text()
    return str(caught.value)


@pytest.mark.slow
def test_clean_text_passes_with_its_figures_and_no_word_of_the_library(texts, caplog):
    folders = texts()
    metrics = gate(GateSpec(), **folders)
    assert metrics["evaluation_documents"] == 8
    assert metrics["evaluation_largest_overlap_with_train"] == 0
    assert metrics["warnings"] == 0
    tree = json.loads((folders["out"] / "validation.json").read_text())
    assert tree["success"] is True
    assert [suite["name"] for suite in tree["suites"]] == ["train text", "calibration text", "evaluation text"]
    assert len(tree["great_expectations"]) == 3
    assert not [record for record in caplog.records if record.name.startswith("great_expectations")]


@pytest.mark.slow
def test_exact_copy_in_calibration_is_named_with_its_twin(texts):
    message = refused(texts(calibration={"leak.py": prose(203).upper().replace(" ", "\n")}))
    assert "evaluation text: expected no same text in calibration: evaluation3 (leak.py)" in message


@pytest.mark.slow
def test_copy_inside_a_longer_training_document(texts):
    message = refused(texts(train={"anthology": prose(1000) + " " + prose(205) + " " + prose(1001)}))
    assert "overlap with train at most 0.5: evaluation5 (100%)" in message


@pytest.mark.slow
def test_near_copy_above_the_bound_and_below(texts):
    words = prose(206).split()
    edited = " ".join(words[:150] + prose(1002, 50).split())
    folders = texts(train={"edited": edited})
    assert "evaluation6 (73%)" in refused(folders)
    assert gate(GateSpec(max_overlap=0.8), **folders)["evaluation_largest_overlap_with_train"] == pytest.approx(138 / 188)


def test_shared_licence_header_is_no_overlap(texts):
    licence = prose(3000, 60)
    splits = {name: {f"{name}.py": f"{licence} {prose(first)}"} for name, first in [("train", 4000), ("evaluation", 4001)]}
    metrics = gate(GateSpec(), **texts(**splits))
    assert 0.1 < metrics["evaluation_largest_overlap_with_train"] < 0.3


def test_five_documents_are_named_and_the_rest_counted(texts):
    message = refused(texts(train={f"copy{n}": prose(200 + n) for n in range(8)}))
    assert all(f"evaluation{n} (copy{n})" in message for n in range(5))
    assert "evaluation5" not in message
    assert "and 3 more" in message


def test_empty_split(texts):
    folders = texts(evaluation={})
    assert "evaluation text: expected at least 1 rows, found 0" in refused(folders)


@pytest.mark.slow
def test_blank_and_binary_documents(texts):
    assert "expected words at least 1: hollow (0)" in refused(texts(train={"hollow": " \n "}))


def test_binary_document(texts):
    assert "expected control at most 0.1: core (67%)" in refused(texts(evaluation={"core": "\x00\x01a" * 300}))


def test_duplicates_and_short_documents_only_warn(texts):
    folders = texts(train={"twin": prose(3), **{f"tiny{n}": f"only {n}" for n in range(4)}})
    assert gate(GateSpec(), **folders)["warnings"] == 2
    found = json.loads((folders["out"] / "validation.json").read_text())["suites"][0]["findings"]
    assert [(f["text"], f["critical"]) for f in found] == [
        ("expected words at least 8 in 90% of the rows", False),
        ("expected no exact copies", False),
    ]
    assert set(found[1]["rows"]) == {"train3", "twin"}
    rows = gate_rows(folders["out"] / "validation.json")
    assert [(row.suite, row.evaluated, row.failed_critical) for row in rows] == [
        ("train text", 7, ()),
        ("calibration text", 7, ()),
        ("evaluation text", 11, ()),
    ]
    assert rows[0].failed_warning[1] == "expected no exact copies: train3, twin"
    assert rows[0].facts["documents"] == 13


def test_training_text_may_be_absent(texts):
    folders = texts()
    del folders["train"]
    assert "train_documents" not in gate(GateSpec(), **folders)


@pytest.mark.slow
def test_page_is_escaped_and_asks_the_network_for_nothing(texts, tmp_path):
    evil = "<img src=x onerror=document.title='owned'>"
    folders = texts(train={evil: prose(200)})
    refused(folders)
    page = (folders["out"] / "validation.html").read_text()
    assert evil not in page
    assert "&lt;img src=x" in page
    assert "http://" not in page
    assert "https://" not in page
    if CHROMIUM is None:
        pytest.skip("no Chromium here: the page was not opened")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command = [CHROMIUM, *flags, (folders["out"] / "validation.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert "<title>Validation: failed</title>" in dom.stdout
    assert "values must be less than or equal to" in dom.stdout


def variant(name: str, **changes: float) -> dict[str, float | str]:
    row = {"name": name, "bits_per_byte": 0.7, "perplexity": 3.1, "size_bytes": 1e6, "speedup_1": 2.0, "p95_latency_s_1": 0.1}
    return {**row, "quality_change": -0.01, "parity": 0.0, **changes}


def test_metrics_of_sound_variants_pass(tmp_path):
    assert check_metrics([variant("a"), variant("b", **{"speedup_1": 0.3})], tmp_path).critical == []
    assert json.loads((tmp_path / "metrics.json").read_text())["success"] is True
    assert "metrics of the variants" in (tmp_path / "metrics.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"perplexity": math.nan}, "expected no perplexity to be missing: broken"),
        ({"perplexity": 0.5}, r"expected perplexity at least 1 and finite: broken \(0.5\)"),
        ({"size_bytes": 0}, r"expected size_bytes above 0 and finite: broken \(0\)"),
        ({"speedup_1": math.inf}, r"expected speedup_1 above 0 and finite: broken \(inf\)"),
        ({"bits_per_byte": None}, "expected no bits_per_byte to be missing: broken"),
    ],
)
def test_broken_metrics_stop_before_a_winner_is_chosen(tmp_path, changes, message):
    with pytest.raises(StageError, match=message) as caught:
        check_metrics([variant("fine"), variant("broken", **changes)], tmp_path)
    assert "\n" not in str(caught.value)
    assert "✘ failed" in (tmp_path / "metrics.html").read_text()


def test_same_variant_twice_and_no_variant():
    with pytest.raises(StageError, match="expected no id twice: a"):
        check_metrics([variant("a"), variant("a")])
    with pytest.raises(StageError, match="expected at least 1 rows, found 0"):
        check_metrics([])


def test_missing_optional_metric_only_warns():
    validation = check_metrics([variant("a"), variant("b", **{"p95_latency_s_1": math.nan})])
    assert validation.critical == []
    assert [str(found) for found in validation.suites[0].findings] == ["expected no p95_latency_s_1 to be missing: b"]


def test_a_variant_without_a_roofline_is_no_finding():
    validation = check_metrics([variant("a", roofline_1=0.7, bytes_per_token=1e6), variant("b")])
    assert not validation.suites[0].findings
