"""BLEU, chrF and ROUGE-L: sacrebleu's own command, figures by hand, and a bound (extra `benchmarks`, else skipped)."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from featherweight.errors import DataError, StageError, ToolchainError
from featherweight.measure.goals import judge
from featherweight.measure.measurement import FILE, Comparison, Measurement
from featherweight.measure.references import fingerprint, matches, require, score
from featherweight.measure.spec import ConstraintsSpec, ReferencesSpec, WorkloadSpec
from tests.support.comparisons import measurement

pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (extra 'benchmarks')")
pytest.importorskip("rouge_score", reason="rouge-score is not installed (extra 'benchmarks')")
# Its absl closes what was standard error when it was imported, pytest's file, as soon as another library sets logging up anew.
importlib.import_module("absl.logging").get_absl_handler().python_handler.stream = sys.__stderr__

WANTED = ["The cat sat on the mat.", "It's 5 o'clock, isn't it?", "Größe zählt – sagt man", "a b c d e f"]
WRITTEN = ["The cat sat on a mat .", "It is 5 o'clock, is it?", "Größe zählt, sagt man", ""]
BETTER = [*WRITTEN[:3], "a b c d f"]


def sums(metric, written=WRITTEN, wanted=WANTED):
    return [sum(column) for column in zip(*matches(metric, written, wanted), strict=True)]


def measured(written: list[str]) -> Measurement:
    found = {metric: matches(metric, written, WANTED) for metric in ("bleu", "chrf", "rouge_l")}
    return replace(measurement(), written=tuple(written), matches=found)


def test_bleu_and_chrf_are_what_sacrebleus_command_says(tmp_path: Path) -> None:
    (tmp_path / "wanted").write_text("\n".join(WANTED) + "\n", encoding="utf-8")
    (tmp_path / "written").write_text("\n".join(WRITTEN) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", "wanted", "-i", "written", "-m", "bleu", "chrf", "-w", "10", "-f", "json"]
    said = json.loads(subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout)
    assert [one["name"] for one in said] == ["BLEU", "chrF2"]
    assert [score(metric, sums(metric)) for metric in ("bleu", "chrf")] == pytest.approx([one["score"] for one in said], abs=1e-9)


def test_the_figures_are_those_worked_by_hand() -> None:
    # 5, 3, 2 and 1 of 6, 5, 4 and 3 n-grams, as long as the reference; characters of "ab" in "abc": see chrF's beta of 2.
    assert score("bleu", sums("bleu", ["a b c d f e"], ["a b c d e g"])) == pytest.approx(
        100 * math.exp((math.log(5 / 6) + math.log(3 / 5) + math.log(2 / 4) + math.log(1 / 3)) / 4)
    )
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    assert score("chrf", sums("chrf", ["ab"], ["abc"])) == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))
    # "police the gunman" shares a sequence of 2 words with each: F of 2/3 and 2/4 is 4/7; and of two texts the mean.
    assert score("rouge_l", sums("rouge_l", ["Police the gunman!", "x"], ["police killed the man", "x"])) == pytest.approx(
        100 * (4 / 7 + 1) / 2
    )


def test_the_loss_against_the_references_is_that_of_the_worst_metric_and_is_bounded_by_its_interval(tmp_path: Path) -> None:
    comparison = Comparison(measured(WRITTEN), measured(BETTER))
    metrics = comparison.metrics()
    for metric in ("bleu", "chrf", "rouge_l"):
        ours, theirs = score(metric, sums(metric)), score(metric, sums(metric, BETTER))
        assert metrics[metric] == pytest.approx(ours) and metrics[f"{metric}_change"] == pytest.approx(ours - theirs)
        assert metrics[f"{metric}_change_low"] < ours - theirs < metrics[f"{metric}_change_high"] <= 1e-9
    assert metrics["reference_loss_high"] == -min(metrics[f"{metric}_change_low"] for metric in ("bleu", "chrf", "rouge_l"))
    loss, high = metrics["reference_loss"], metrics["reference_loss_high"]
    for bound, kept in (((loss + high) / 2, False), (high + 0.01, True)):
        (verdict,) = judge(ConstraintsSpec(max_reference_loss=bound), "quality", metrics)
        assert verdict.kept is kept and verdict.reason.startswith("loss against the references ")
    comparison.write(tmp_path)
    assert (tmp_path / FILE).is_file() and Comparison.read(tmp_path) == comparison
    same = Comparison(measured(BETTER), measured(BETTER)).metrics()
    assert same["reference_loss_low"] == same["reference_loss"] == same["reference_loss_high"] == 0.0
    with pytest.raises(StageError, match="different references"):
        Comparison(measured(WRITTEN), measurement()).metrics()


def test_what_cannot_be_scored_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="take chrf"):
        matches("rouge_l", ["猫"], ["猫が座った"])
    asked = WorkloadSpec(references=ReferencesSpec(metrics=("rouge_l",)))
    assert fingerprint(WorkloadSpec()) is None and "references" not in WorkloadSpec().model_dump()
    assert "rouge_score" in str(fingerprint(asked)) and "sacrebleu" not in str(fingerprint(asked))
    monkeypatch.setattr("featherweight.measure.references.find_spec", lambda name: None)
    with pytest.raises(ToolchainError, match=r"rouge-score is not installed; pip install 'featherweight\[benchmarks\]'"):
        require(asked)
    require(WorkloadSpec())
