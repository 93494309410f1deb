"""Great Expectations suites on text and on tables of metrics, and their results as JSON and as one offline HTML page."""

from __future__ import annotations

import copy
import html
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import FeatherweightError
from featherweight.text.documents import Document, read_documents
from featherweight.text.overlap import Pool, digest, ngrams

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.core import ExpectationSuiteValidationResult
    from great_expectations.expectations.expectation import Expectation

NAMED = 5
_FEATURES = ["id", "bytes", "words", "control", "digest"]
_REQUIRED = re.compile(
    r"bits_per_byte|perplexity|embedding_distance|cross_entropy|score_error|size_bytes|(speedup|tokens_per_s)_\d+"
)
_POSITIVE = re.compile(r"bits_per_byte|.*_bytes|speedup|tokens_per_s|ttft_s|p\d+_latency_s")
# Memory is not the roof of every engine, so that not every variant has these.
_OF_SOME = re.compile(r"roofline_\d+|bytes_per_token|bandwidth_bytes_s")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd\ud800-\udfff]")
_BROKEN_LINK = re.compile(r'<a href="\.\./[^"]*"\s*>([^<]*)</a>(<br>\s*Data asset: None)?')
_RANDOM = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Finding:
    """An expectation that did not hold, in words, with up to 5 of the rows that broke it and how many there were."""

    text: str
    critical: bool
    rows: tuple[str, ...] = ()
    count: int = 0

    def __str__(self) -> str:
        more = f" and {self.count - len(self.rows)} more" if self.count > len(self.rows) else ""
        return f"{self.text}: {', '.join(self.rows)}{more}" if self.rows else self.text


@dataclass(frozen=True)
class Suite:
    """The outcome of one suite; `facts` are figures of what was checked."""

    name: str
    evaluated: int
    findings: tuple[Finding, ...]
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Validation:
    """The outcome of several suites, and Great Expectations' own results from which the page is made."""

    suites: tuple[Suite, ...]
    results: tuple[ExpectationSuiteValidationResult, ...]

    @property
    def critical(self) -> list[tuple[str, Finding]]:
        """Suite names and findings that must stop the flow."""
        return [(suite.name, found) for suite in self.suites for found in suite.findings if found.critical]

    def write(self, folder: Path, stem: str = "validation") -> None:
        """Write `<stem>.json` and `<stem>.html`."""
        tree = {"success": not self.critical, "suites": [asdict(suite) for suite in self.suites]}
        results = [result.to_json_dict() for result in self.results]
        (folder / f"{stem}.json").write_text(json.dumps({**tree, "great_expectations": results}, indent=1, default=str))
        (folder / f"{stem}.html").write_text(_page(self), encoding="utf-8")

    def raise_critical(self, error: type[FeatherweightError], advice: str) -> None:
        """Raise `error` in one line if a critical expectation failed."""
        if self.critical:
            name, first = self.critical[0]
            more = f" (and {len(self.critical) - 1} more expectations)" if len(self.critical) > 1 else ""
            raise error(f"{name}: {' '.join(str(first).split())}{more}; {advice}")


def check_texts(folders: Mapping[str, Path], max_overlap: float) -> Validation:
    """Suites on text folders by split name; 'evaluation' must be among them, and is held against every other split.

    max_overlap: share of a document's 13-word sequences that may occur in another split.
    """
    frames = _text_frames(folders)
    return _validate(
        [(f"{split} text", frame, _text_expectations(frame, max_overlap), _facts(frame)) for split, frame in frames.items()]
    )


def _text_frames(folders: Mapping[str, Path]) -> dict[str, pd.DataFrame]:
    """One row a document; the evaluation's columns 'overlap with S' and 'same text in S' tell of each other split S."""
    import pandas as pd

    rows, grams = [], []
    for document in read_documents(folders["evaluation"]):
        rows.append(_features(document))
        grams.append(ngrams(document.content))
    evaluation = pd.DataFrame(rows, columns=_FEATURES)
    frames = {}
    for split in folders:
        if split != "evaluation":
            frames[split] = _frame_against(folders[split], split, evaluation, Pool(grams))
    return {**frames, "evaluation": evaluation}


def _frame_against(folder: Path, split: str, evaluation: pd.DataFrame, pool: Pool) -> pd.DataFrame:
    """The split's own rows; what the evaluation shares with it is added to the evaluation's."""
    import pandas as pd

    rows = []
    for document in read_documents(folder):
        rows.append(_features(document))
        pool.meet(ngrams(document.content))
    frame = pd.DataFrame(rows, columns=_FEATURES)
    names = dict(zip(frame["digest"], frame["id"], strict=True))
    evaluation[f"overlap with {split}"] = pool.shares()
    evaluation[f"same text in {split}"] = pd.Series([names.get(key) for key in evaluation["digest"]], dtype=object)
    return frame


def _features(document: Document) -> dict[str, Any]:
    """`control` is the share of characters that no text should hold: control codes, replacement marks, lone surrogates."""
    size = len(document.content.encode(errors="surrogatepass"))
    control = len(_CONTROL.findall(document.content)) / max(len(document.content), 1)
    words = len(document.content.split())
    return {"id": document.id, "bytes": size, "words": words, "control": control, "digest": digest(document.content)}


def _facts(frame: pd.DataFrame) -> dict[str, float]:
    """Figures of a split, for the report and the stage's metrics."""
    facts = {"documents": len(frame), "bytes": int(frame["bytes"].sum()), "duplicates": int(frame["digest"].duplicated().sum())}
    overlaps = {str(name): float(frame[name].max()) for name in frame if str(name).startswith("overlap") and len(frame)}
    return {**facts, **{f"largest {name}": value for name, value in overlaps.items()}}


def _text_expectations(frame: pd.DataFrame, max_overlap: float) -> list[Expectation]:
    """What must hold of a split (critical), and what had better hold (warning)."""
    import great_expectations.expectations as gxe
    from great_expectations.expectations.metadata_types import FailureSeverity

    between: Any = gxe.ExpectColumnValuesToBeBetween
    found: list[Expectation] = [
        gxe.ExpectTableRowCountToBeBetween(min_value=1, severity=FailureSeverity.CRITICAL),
        between(column="words", min_value=1, severity=FailureSeverity.CRITICAL),
        between(column="words", min_value=8, mostly=0.9, severity=FailureSeverity.WARNING),
        gxe.ExpectColumnSumToBeBetween(column="words", min_value=1000, severity=FailureSeverity.WARNING),
        between(column="control", max_value=0.1, severity=FailureSeverity.CRITICAL),
        between(column="control", max_value=0, mostly=0.99, severity=FailureSeverity.WARNING),
        gxe.ExpectColumnValuesToBeUnique(column="digest", severity=FailureSeverity.WARNING),
    ]
    for column in sorted(map(str, frame.columns), reverse=True):
        if column.startswith("same text in"):
            found.append(gxe.ExpectColumnValuesToBeNull(column=column, severity=FailureSeverity.CRITICAL))
        if column.startswith("overlap with"):
            found.append(between(column=column, max_value=max_overlap, severity=FailureSeverity.CRITICAL))
    return found


def check_metrics(rows: Iterable[Mapping[str, Any]]) -> Validation:
    """A suite on the metrics of all variants: one mapping each, `name` and the keys that featherweight/report/result.py lists.

    Critical: a name twice; quality, size or speed missing, not finite or not positive; perplexity below 1. The rest warns.
    """
    import pandas as pd

    frame = pd.DataFrame.from_records(list(rows)).rename(columns={"name": "id"})
    if frame.empty:
        frame = pd.DataFrame({"id": []})
    numbers = [str(column) for column in frame.columns if column != "id"]
    frame[numbers] = frame[numbers].apply(pd.to_numeric, errors="coerce")
    return _validate([("metrics of the variants", frame, _metric_expectations(numbers), {"variants": len(frame)})])


def _metric_expectations(columns: list[str]) -> list[Expectation]:
    import great_expectations.expectations as gxe
    from great_expectations.expectations.metadata_types import FailureSeverity

    found: list[Expectation] = [
        gxe.ExpectTableRowCountToBeBetween(min_value=1, severity=FailureSeverity.CRITICAL),
        gxe.ExpectColumnValuesToBeUnique(column="id", severity=FailureSeverity.CRITICAL),
    ]
    for column in columns:
        severity = FailureSeverity.CRITICAL if _REQUIRED.fullmatch(column) else FailureSeverity.WARNING
        bounds: dict[str, Any] = {"min_value": 0, "strict_min": True}
        if not _POSITIVE.match(column):
            bounds = {"min_value": 1} if column == "perplexity" else {"min_value": -sys.float_info.max}
        limits: dict[str, Any] = {**bounds, "max_value": sys.float_info.max, "severity": severity}
        if not _OF_SOME.fullmatch(column):
            found.append(gxe.ExpectColumnValuesToNotBeNull(column=column, severity=severity))
        found.append(gxe.ExpectColumnValuesToBeBetween(column=column, **limits))
    return found


def _validate(suites: list[tuple[str, pd.DataFrame, list[Expectation], dict[str, float]]]) -> Validation:
    """Run suites of (name, table with an `id` column, expectations, facts) in a context that leaves nothing on disk."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    # It sets this level to INFO as it is imported, and tells of a folder that it is about to remove.
    logging.getLogger(ProgressBarsConfig.__module__).setLevel(logging.WARNING)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    source = context.data_sources.add_pandas("featherweight")
    shape = {"result_format": "SUMMARY", "unexpected_index_column_names": ["id"], "return_unexpected_index_query": False}
    checked, results = [], []
    for name, frame, expectations, facts in suites:
        batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("whole").get_batch({"dataframe": frame})
        result = batch.validate(gx.ExpectationSuite(name=name, expectations=expectations), result_format=shape)
        del result.meta["batch_markers"]["ge_load_time"]  # the same texts give the same files
        findings = tuple(_finding(item) for item in result.results if not item.success)
        checked.append(Suite(name, len(result.results), findings, facts))
        results.append(result)
    return Validation(tuple(checked), tuple(results))


def _finding(item: Any) -> Finding:
    """A failed expectation in words. One that could not be checked counts as failed."""
    config, result = item.expectation_config, item.result
    critical = str(getattr(config.severity, "value", config.severity)) == "critical"
    text = _in_words(config.type, config.kwargs)
    places = result.get("partial_unexpected_index_list") or []
    rows = tuple(dict.fromkeys(_place(place, config.kwargs.get("column")) for place in places))
    if item.exception_info.get("raised_exception"):
        text = f"{text} (could not be checked: {item.exception_info.get('exception_message')})"
    elif not rows and "observed_value" in result:
        text = f"{text}, found {result['observed_value']}"
    return Finding(text, critical, rows[:NAMED], max(len(rows[:NAMED]), int(result.get("unexpected_count", 0))))


def _in_words(kind: str, kwargs: Mapping[str, Any]) -> str:
    """An expectation as a sentence."""
    column = kwargs.get("column", "")
    least, most = kwargs.get("min_value"), kwargs.get("max_value")
    low = None if least in (None, -sys.float_info.max) else f"{'above' if kwargs.get('strict_min') else 'at least'} {least:g}"
    high = None if most is None else "finite" if most == sys.float_info.max else f"at most {most:g}"
    range_ = " and ".join(part for part in (low, high) if part)
    almost = f" in {kwargs['mostly']:.0%} of the rows" if kwargs.get("mostly", 1) != 1 else ""
    sentences = {
        "expect_table_row_count_to_be_between": f"expected {range_} rows",
        "expect_column_values_to_be_between": f"expected {column} {range_}{almost}",
        "expect_column_sum_to_be_between": f"expected {range_} {column} in all",
        "expect_column_values_to_be_unique": "expected no exact copies" if column == "digest" else f"expected no {column} twice",
        "expect_column_values_to_not_be_null": f"expected no {column} to be missing",
        "expect_column_values_to_be_null": f"expected no {column}",
    }
    return sentences.get(kind, f"{kind.replace('_', ' ')} {column}".strip())


def _place(place: Mapping[str, Any], column: str | None) -> str:
    """A row's id and, where it tells something, its value."""
    value = place.get(column) if column not in (None, "id", "digest") else None
    if isinstance(value, float) and value != value:
        return str(place["id"])
    if isinstance(value, float):
        share = str(column).startswith(("overlap", "control"))
        return f"{place['id']} ({value:.0%})" if share else f"{place['id']} ({value:.4g})"
    return str(place["id"]) if value is None else f"{place['id']} ({value})"


def _page(validation: Validation) -> str:
    """One page that opens offline: our summary, and Great Expectations' own rendering of each suite."""
    from jinja2 import Environment, PackageLoader

    bodies = [_rendered(result) for result in validation.results]
    template = Environment(loader=PackageLoader("featherweight.report"), autoescape=True).get_template("validation.html.j2")
    return template.render(suites=list(zip(validation.suites, bodies, strict=True)), passed=not validation.critical)


def _rendered(result: ExpectationSuiteValidationResult) -> str:
    """The body of Great Expectations' page for one suite; its own page shell loads a dozen files from the network."""
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView
    from jinja2 import ChoiceLoader, PackageLoader

    view = DefaultJinjaPageView()
    view.env.loader = ChoiceLoader(
        [PackageLoader("featherweight.report"), PackageLoader("great_expectations", "render/view/templates")]
    )
    document = ValidationResultsPageRenderer().render(_escaped(result))
    return _numbered(_BROKEN_LINK.sub(r"\1", view.render(document, template="gx_sections.j2")))


def _numbered(page: str) -> str:
    """The page with numbers for the random identifiers of its parts: the same results give the same bytes."""
    places: dict[str, str] = {}
    return _RANDOM.sub(lambda found: places.setdefault(found[0], str(len(places))), page)


def _escaped(result: ExpectationSuiteValidationResult) -> ExpectationSuiteValidationResult:
    """A copy whose found values are HTML-escaped: Great Expectations' table template writes cells as they are."""
    safe = copy.deepcopy(result)
    for item in safe.results:
        item.result = _escape(item.result)
    return safe


def _escape(value: Any) -> Any:
    if isinstance(value, str):
        return html.escape(value)
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    return [_escape(item) for item in value] if isinstance(value, list | tuple) else value
