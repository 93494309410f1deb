"""The result's tables and the HTML report, opened in a real browser."""

from __future__ import annotations

import html
import io
import itertools
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from featherweight.measure.figures import mebibytes, milliseconds, percent, times
from featherweight.report.lineage_picture import lineage_layout, winner_path
from featherweight.report.page import render_report
from featherweight.report.pareto_chart import Box, Scale, chart_points, place_labels
from featherweight.report.result import GateRow, NodeRow, OptimizationResult, VariantRow, ranked
from featherweight.report.tables import columns, markdown_table, terminal_table

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
EVIL = "<script>document.title='owned'</script>"
# name, engine, grid, speed at batch 1 and 8, loss, MiB
FIGURES = [
    ("half/quarter/qat4/ort-int4", "onnxruntime-genai", "int4-b32", 21.4, 6.1, 0.0081, 7.1),
    ("half/quarter/gptq4/ort-int4", "onnxruntime-genai", "int4-b32", 21.1, 6.0, 0.0312, 7.1),
    ("half/quarter/rtn8/ort-int8", "onnxruntime-genai", "int8-b32", 13.2, 4.4, 0.0065, 11.9),
    ("half/rtn8/ort-int8", "onnxruntime-genai", "int8-b32", 10.9, 3.7, 0.0032, 14.2),
    ("rtn8/ort-int8", "onnxruntime-genai", "int8-b32", 8.2, 3.1, 0.0011, 18.0),
    ("qat4/ort-int4", "onnxruntime-genai", "int4-b32", 14.6, 4.4, 0.0049, 11.0),
    ("ort-float32", "onnxruntime-genai", None, 3.1, 2.7, 0.0, 58.1),
    ("rtn8/ct2-int8", "ctranslate2", "int8", 4.5, 3.9, 0.0188, 15.9),
    ("half/quarter/rtn8/ct2-int8", "ctranslate2", "int8", 8.1, 5.8, 0.0251, 9.3),
    ("ct2-float32", "ctranslate2", None, 2.4, 1.9, 0.0, 58.0),
    ("vllm-float32", "vllm", None, 1.1, 1.6, 0.0, 58.2),
    ("half/quarter/vllm-float32", "vllm", None, 2.0, 2.6, 0.0059, 24.6),
    ("torch-compile", "torch-compile", None, 1.6, 1.2, 0.0, 58.0),
]


def variant(name: str, engine: str, grid: str | None, one: float, eight: float, loss: float, size: float) -> VariantRow:
    metrics = {"bits_per_byte": 0.91 * (1 + loss), "perplexity": 4.1 * (1 + loss) ** 3, "size_bytes": size * 2**20, "parity": 1e-4}
    metrics |= {"quality_change": loss, "quality_change_low": loss - 0.002, "quality_change_high": loss + 0.002}
    for batch, ratio, base in ((1, one, 74.0), (8, eight, 349.0)):
        metrics |= {f"speedup_{batch}": ratio, f"speedup_{batch}_low": ratio * 0.97, f"speedup_{batch}_high": ratio * 1.03}
        metrics |= {f"tokens_per_s_{batch}": base * ratio, f"ttft_s_{batch}": 0.02 / ratio}
        metrics |= {f"p50_latency_s_{batch}": 64 * batch / base / ratio, f"p95_latency_s_{batch}": 70 * batch / base / ratio}
    metrics["peak_memory_bytes"] = size * 2**20 + 9e7
    metrics["roofline_1"] = metrics["tokens_per_s_1"] * size * 2**20 / 18.2e9
    status = "winner" if name == FIGURES[0][0] else "loser"
    reason = "keeps every constraint and is fastest at batch 1" if status == "winner" else f"slower at batch 1: {times(one)}"
    parts = name.split("/")
    paths = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    stages = ("text/train", "checkpoint", *paths, f"{name}/evaluate")
    return VariantRow(name, engine, status, grid, reason, metrics, stages, {"1": 1, "8": 2 if engine == "ctranslate2" else 1})


def nodes(rows: list[VariantRow]) -> list[NodeRow]:
    found = {f"text/{s}": NodeRow(f"text/{s}", "text", s, "done", 1.2) for s in ("train", "calibration", "evaluation")}
    found["gate"] = NodeRow("gate", "gate", "text", "done", 5.1, tuple(found))
    found["checkpoint"] = NodeRow("checkpoint", "train", "demo", "cached", 80.0, ("text/train",), "ab" * 32, "run-0", True)
    found["baseline"] = NodeRow("baseline", "export", "torch", "done", 0.4, ("checkpoint", "text/calibration"))
    base = ("baseline", "baseline", "text/evaluation")
    found["baseline/evaluate"] = NodeRow("baseline/evaluate", "evaluate", "baseline", "done", 9.0, base)
    names = {"half": "distill", "quarter": "prune", "rtn8": "quantize", "qat4": "quantize", "gptq4": "quantize"}
    for row in rows:
        for parent, id in itertools.pairwise(row.stages[1:]):
            stage = "evaluate" if id.endswith("/evaluate") else names.get(id.split("/")[-1], "compile" if "ort" in id else "export")
            other = "text/evaluation" if stage == "evaluate" else "text/train" if stage == "distill" else "text/calibration"
            label = id.split("/")[-2 if stage == "evaluate" else -1]
            parents = (parent, other, *(["baseline", "baseline/evaluate"] if stage == "evaluate" else []))
            found.setdefault(id, NodeRow(id, stage, label, "done", 9.5, parents, "cd" * 32, f"run-{len(found)}"))
    return list(found.values())


def sample(**changes) -> OptimizationResult:
    """A result like those of a real run: thirteen variants, three engines, failures, and a name that attacks the page."""
    rows = [variant(*figures) for figures in FIGURES]
    base = variant("baseline", "torch", None, 1.0, 1.0, 0.0, 58.0)
    baseline = VariantRow("baseline", "torch", "baseline", metrics=base.metrics, threads={"1": 2, "8": 2}, reason=EVIL)
    lost = [
        VariantRow(EVIL, "ctranslate2", "failed", reason=f"parity: 2.66 > 0.05 {EVIL}"),
        VariantRow("gptq4/vllm", "vllm", "skipped", reason="the vLLM toolchain is not installed; make setup installs it"),
        *(
            VariantRow(f"{q}/ct2", "ctranslate2", "ruled-out", reason="CTranslate2 packs int8 and float only")
            for q in ("qat4", "gptq4")
        ),
    ]
    values = {
        "name": "stories15m",
        "objective": "speedup@1",
        "winner": FIGURES[0][0],
        "variants": (*rows, baseline, *lost),
        "constraints": {"max_quality_loss": 0.02, "min_speedup": 1.5, "max_size_bytes": 60 * 2**20},
        "nodes": tuple(nodes(rows)),
        "gates": (
            GateRow("train text", 7, facts={"documents": 427, "bytes": 7934401}),
            GateRow("evaluation text", 11, (), (f"expected no exact copies: {EVIL}",), {"largest overlap with train": 0.0145}),
        ),
        "machine": {"cpu": "AMD EPYC, 2 cores, AVX2", "memory bandwidth": "18.2 GB/s"},
        "versions": {"torch": "2.13.0", "onnxruntime-genai": "0.18.0"},
        "runs": {"MLflow run": "0af3", "Prefect run": "tidy-otter"},
        "recipe": f"name: stories15m\n# {EVIL}\n",
        "registered": "stories v3, Production (champion)",
        "started": "2026-11-21T02:00:00Z",
        "seconds": 431.0,
    }
    return OptimizationResult(**{**values, **changes})


def test_round_trip_through_json(tmp_path):
    odd = VariantRow("odd", "torch", "loser", metrics={"speedup_1": math.inf, "bits_per_byte": math.nan})
    before = sample(report=tmp_path / "report.html")
    assert OptimizationResult.from_dict(json.loads(json.dumps(before.to_dict(), allow_nan=False))) == before
    after = OptimizationResult.from_dict(json.loads(json.dumps(sample(variants=(odd,)).to_dict(), allow_nan=False)))
    assert all(math.isnan(value) for value in after.variants[0].metrics.values())


def test_headline_tells_speed_size_and_quality():
    assert sample().headline() == (
        "half/quarter/qat4/ort-int4: 21.4x the baseline's speed at batch 1, 6.10x the baseline's speed at batch 8, "
        "7.1 MiB (8.2x smaller), bits per byte +0.81 % [+0.61, +1.01]."
    )
    assert sample(winner=None).headline() == "No variant kept every constraint (13 measured); the baseline stays."


def test_pareto_front_keeps_only_the_undominated():
    front = [row.name for row in sample().pareto_front(1)]
    assert front == [FIGURES[i][0] for i in (0, 5, 3, 4, 6)]
    blank = VariantRow("blank", "torch", "loser")
    assert sample(variants=(blank,)).pareto_front(1) == []


def test_figures_as_text():
    assert [times(9.994), times(14.66), times(math.nan)] == ["9.99x", "14.7x", "–"]
    assert [percent(0.0011), percent(-0.053), percent(0.5), percent(2)] == ["+0.11 %", "−5.30 %", "+50.0 %", "+200 %"]
    assert [milliseconds(0.0012), milliseconds(0.25), mebibytes(3 * 2**29)] == ["1.20 ms", "250 ms", "1.50 GiB"]
    assert VariantRow("a", "b", "loser").quality_loss == "–"


def test_columns_without_any_value_are_left_out():
    titles = [column.title for column in columns(sample())]
    assert {"speed ×, batch 1", "speed ×, batch 8", "threads", "parity"} <= set(titles)
    (roofline,) = (column for column in columns(sample()) if column.title == "roofline, batch 1")
    assert (roofline.text(sample().baseline), roofline.brief) == ("24.7 %", False)
    assert "processor's own caches" in roofline.meaning
    rows = tuple(VariantRow(row.name, row.engine, row.status, metrics={"speedup_1": 2.0}) for row in sample().variants)
    assert [column.title for column in columns(sample(variants=rows))] == ["speed ×, batch 1"]


def test_ranked_winner_first_baseline_last():
    names = [row.name for row in ranked(sample())]
    assert names[0] == FIGURES[0][0]
    assert names[-1] == "baseline"
    assert names[1:3] == ["half/quarter/gptq4/ort-int4", "qat4/ort-int4"]


def test_terminal_table_shows_every_variant_and_its_fate():
    from rich.console import Console

    screen = io.StringIO()
    Console(width=260, file=screen).print(terminal_table(sample()))
    shown = screen.getvalue()
    for name, *_ in FIGURES:
        assert name in shown
    assert "+0.81 % [+0.61, +1.01]" in shown
    assert EVIL in shown
    assert "skipped: the vLLM toolchain is not installed" in shown
    assert "2 combinations ruled out" in shown


def test_what_a_recipe_asks_for_by_name_stands_in_a_table_of_its_own_that_fits_a_terminal():
    from rich.console import Console

    asked = {f"ttft_s_prompt_512{end}": value for end, value in (("", 0.2), ("_low", 0.19), ("_high", 0.25))}
    asked |= {f"p95_latency_s_rate_2.5{end}": value for end, value in (("", 0.3), ("_low", 0.29), ("_high", 0.31))}
    asked |= {f"done_rate_2.5{end}": 1.0 for end in ("", "_low", "_high")}
    asked |= {f"changed_answers{end}": value for end, value in (("", 0.25), ("_low", 0.2), ("_high", 0.3))}
    rows = tuple(replace(row, metrics={**row.metrics, **asked}) for row in sample().measured)
    screen = io.StringIO()
    Console(width=160, file=screen).print(terminal_table(sample(variants=rows)))
    main, _, below = screen.getvalue().partition("TTFT")
    assert "winner" in main and "200 ms [190, 250]" not in main
    assert "p95\n2.5/s" not in main and below.count("300 ms [290, 310]") == len(rows)
    assert below.count("25.0 % [20.0, 30.0]") == below.count("200 ms [190, 250]") == len(rows)


def test_what_a_search_passed_over_is_counted_and_said_with_its_reason(tmp_path):
    from rich.console import Console

    why = "cannot win: speed 2.00x [1.90, 2.10] at batch 1 at a short look"
    passed = [VariantRow(name, "torch", "passed-over", reason=why) for name in ("slow", "slower")]
    result = sample(variants=(*sample().variants, *passed))
    screen = io.StringIO()
    Console(width=260, file=screen).print(terminal_table(result))
    assert "2 variants passed over by the search, 2 combinations ruled out before running" in screen.getvalue()
    render_report(result, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Passed over by the search" in page and why in page and "slow, slower" in page
    assert {row.status for row in OptimizationResult.from_dict(result.to_dict()).measured} == {"winner", "loser", "baseline"}


def test_markdown_table():
    lines = markdown_table(sample()).splitlines()
    assert lines[0].startswith("| variant | Δ bits/byte (95 % CI) | speed ×, batch 1 |")
    assert lines[2].startswith("| **half/quarter/qat4/ort-int4** | **+0.81 %")
    assert len(lines) == 2 + 14
    assert len({line.count("|") for line in lines}) == 1
    odd = VariantRow("a|b", "torch", "loser", metrics={"speedup_1": 1.0})
    assert "| a\\|b |" in markdown_table(sample(variants=(odd,)))


@pytest.mark.parametrize("batch", [1, 8])
def test_labels_do_not_lie_on_each_other(batch):
    result = sample()
    rows = chart_points(result, batch)
    speeds, losses = [row.get(f"speedup_{batch}") for row in rows], [row.get("quality_change") for row in rows]
    scale = Scale.over(Box(72, 14, 906, 456), speeds, losses)
    labels = place_labels(result, rows, result.pareto_front(batch), batch, scale, full_names=True)
    assert set(labels) == {row.name for row in rows}
    assert labels[result.winner].text == result.winner
    assert sum(not label.text.startswith("#") for label in labels.values()) >= 10
    for one, other in itertools.combinations(labels.values(), 2):
        assert not one.box.meets(other.box), f"{one.text} lies on {other.text}"
    assert all(label.box.inside(scale.plot) for label in labels.values())


def test_scale_keeps_small_and_large_losses_apart():
    scale = Scale.over(Box(0, 0, 400, 400), [0.5, 20], [0.0, 0.001, 0.01, 0.3, 2.0])
    ys = [scale.y(loss) for loss in (0.0, 0.01, 0.3, 2.0)]
    assert ys == sorted(ys)
    assert min(b - a for a, b in itertools.pairwise(ys)) > 30
    assert {1.0, 2.0, 4.0} <= set(scale.speed_ticks())
    alike = Scale.over(Box(0, 0, 400, 400), [1.0, 1.0], [0.0, 0.0])
    assert len(alike.speed_ticks()) >= 1
    assert math.isfinite(alike.y(0.0))


def test_lineage_boxes_do_not_lie_on_each_other_and_follow_their_stage():
    result = sample()
    spots, used = lineage_layout(result.nodes)
    assert set(spots) == {node.id for node in result.nodes}
    assert len({(spot.x, spot.y) for spot in spots.values()}) == len(spots)
    assert used == ["text", "gate", "checkpoint", "distill", "prune", "quantize", "serve", "evaluate"]
    for node in result.nodes:
        if node.parents:
            assert spots[node.id].x > spots[node.parents[0]].x
            assert spots[node.id].y >= spots[node.parents[0]].y


def test_winner_path_reaches_the_data():
    result = sample()
    path = winner_path(result.nodes, result.row(result.winner).stages)
    assert {"text/train", "text/calibration", "text/evaluation", "checkpoint", "half/quarter/qat4", "half"} <= path
    assert "half/quarter/gptq4" not in path
    assert not {"gate", "baseline", "baseline/evaluate"} & path


class Page(HTMLParser):
    """Checks that tags close, and collects what a test asks about."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.scripts, self.addresses = [], 0, []

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag not in ("meta", "link", "line", "circle", "path", "rect", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("result", [sample(), sample(winner=None, nodes=(), gates=(), variants=(), machine={}, versions={})])
def test_page_is_whole_escaped_and_refers_to_nothing(tmp_path, result):
    render_report(result, tmp_path / "sub" / "report.html")
    text = (tmp_path / "sub" / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.scripts == 1
    assert page.addresses == ["data:,"]
    assert EVIL not in text
    assert not re.search(r"url\(|@import|https?://", text)
    assert len(text) < 300_000
    assert "60.0 MiB" in text and "1.50x" in text, "constraints in their units"


def browse(page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open a page in headless Chromium with the network closed off."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: the report was not opened in a browser")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0"]
    command = [CHROMIUM, *quiet, *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)


# Appended to the page: acts as a user would, and leaves what it saw in the document.
PROBE = """<script>
const seen = {errors: window.seenErrors};
const names = () => [...document.querySelectorAll('#variants tbody tr')].map(row => row.dataset.variant);
const heading = title => [...document.querySelectorAll('#variants thead th')].find(cell => cell.textContent.trim() === title);
seen.before = names();
heading('size').querySelector('button').click();
seen.bySize = names();
heading('size').querySelector('button').click();
seen.bySizeDown = names();
seen.sort = heading('size').getAttribute('aria-sort');
heading('variant').querySelector('button').click();
seen.byName = names();
const panel = batch => document.getElementById('panel-' + batch).hidden;
seen.panels = [panel(1), panel(8)];
document.getElementById('tab-8').click();
seen.panelsAfter = [panel(1), panel(8)];
const point = document.querySelector('#panel-8 .wide .point.winner');
point.dispatchEvent(new MouseEvent('mouseenter'));
seen.hint = document.getElementById('hint').textContent;
seen.lit = [...document.querySelectorAll('#variants tr.lit')].map(row => row.dataset.variant);
point.dispatchEvent(new MouseEvent('mouseleave'));
seen.hintHidden = document.getElementById('hint').hidden;
const leaf = document.querySelector('[data-node="half/quarter/qat4/ort-int4"]');
leaf.dispatchEvent(new MouseEvent('mouseenter'));
seen.traced = [...document.querySelectorAll('.node.lit')].map(node => node.dataset.node).sort();
seen.points = document.querySelectorAll('#panel-1 .wide .point').length;
seen.wide = [document.documentElement.scrollWidth, innerWidth];
seen.requests = performance.getEntriesByType('resource').map(entry => entry.name);
document.title = 'probed';
const out = document.createElement('pre'); out.id = 'seen'; out.textContent = JSON.stringify(seen); document.body.append(out);
</script></body>"""
LISTEN = "<script>window.seenErrors = []; addEventListener('error', e => window.seenErrors.push(e.message));</script><style>"


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What a user of the page in Chromium sees and does, and Chromium's own log."""
    folder = tmp_path_factory.mktemp("report")
    render_report(sample(), folder / "report.html")
    text = (folder / "report.html").read_text()
    probed = text.replace("<style>", LISTEN, 1).replace("</body>", PROBE, 1)
    (folder / "probed.html").write_text(probed)
    ran = browse(folder / "probed.html", folder / "profile", "--dump-dom", "--window-size=1200,900")
    (found,) = re.findall(r'<pre id="seen">(.*?)</pre>', ran.stdout, re.DOTALL)
    return {**json.loads(html.unescape(found)), "log": ran.stderr, "dom": ran.stdout}


@pytest.mark.slow
def test_browser_finds_no_errors_and_asks_for_nothing(seen):
    assert seen["errors"] == []
    assert [name for name in seen["requests"] if not name.startswith(("file:", "data:"))] == []
    assert "CONSOLE" not in seen["log"]
    assert "<title>probed</title>" in seen["dom"], "a script in a variant's name must not run"
    assert 'data-ready="true"' in seen["dom"]


@pytest.mark.slow
def test_browser_sorts_the_table(seen):
    sizes = {row.name: row.get("size_bytes") for row in sample().measured}
    assert seen["before"] == [row.name for row in ranked(sample())]
    assert [sizes[name] for name in seen["bySize"]] == sorted(sizes.values())
    assert [sizes[name] for name in seen["bySizeDown"]] == sorted(sizes.values(), reverse=True)
    assert seen["sort"] == "descending"
    assert seen["byName"] == sorted(seen["byName"])


@pytest.mark.slow
def test_browser_shows_points_hints_and_paths(seen):
    assert seen["points"] == 14
    assert (seen["panels"], seen["panelsAfter"]) == ([False, True], [True, False])
    assert seen["hint"].startswith("half/quarter/qat4/ort-int4\n6.10x at batch 8")
    assert seen["lit"] == ["half/quarter/qat4/ort-int4"]
    assert seen["hintHidden"] is True
    assert {"text/train", "text/calibration", "checkpoint", "half", "half/quarter", "half/quarter/qat4"} <= set(seen["traced"])
    assert "half/quarter/gptq4" not in seen["traced"]
    assert seen["wide"][0] <= seen["wide"][1], "the page itself must not scroll sideways"


@pytest.mark.slow
def test_browser_on_a_telephone(tmp_path):
    render_report(sample(), tmp_path / "report.html")
    browse(tmp_path / "report.html", tmp_path / "profile", f"--screenshot={tmp_path / 'shot.png'}", "--window-size=500,900")
    assert (tmp_path / "shot.png").read_bytes().startswith(b"\x89PNG")
