"""Two registered versions side by side: verified figures, what their recipes say otherwise, and where their lineages part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

from featherweight.errors import IntegrityError
from featherweight.measure import goals
from featherweight.measure.figures import percent, with_interval
from featherweight.measure.goals import BITS_PER_BYTE, PEAK_MEMORY, QUALITY, SIZE, Figure
from featherweight.measure.measurement import Comparison, Quality
from featherweight.measure.statistics import Estimate, bootstrap_difference, bootstrap_ratio
from featherweight.registry.evidence import evidence
from featherweight.registry.lineage import LineageGraph
from featherweight.registry.registry import RegisteredVersion, Registry
from featherweight.visible import in_lines

Verdict = Literal["better", "worse", "within the noise", "not measured"]


@dataclass(frozen=True)
class FigureRow:
    """One figure of both, with its confidence interval where it was measured with one; verdict: of the second, beyond both."""

    name: str
    a: Estimate | None
    b: Estimate | None
    a_text: str
    b_text: str
    verdict: Verdict


@dataclass(frozen=True)
class Difference:
    """One thing that the two have otherwise; '' where one has none."""

    part: str
    a: str
    b: str


@dataclass(frozen=True)
class VersionComparison:
    """Version `b` beside version `a`. paired: how much worse b predicts the very same windows of text, None for other text.

    quality: that in words. recipe, lineage: what differs. notes: what else is to be known.
    """

    a: str
    b: str
    figures: tuple[FigureRow, ...]
    paired: Estimate | None
    quality: str
    recipe: tuple[Difference, ...]
    lineage: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def to_text(self) -> str:
        """A table of the figures, then what differs."""
        rows = [("", self.a, self.b, f"{self.b} is"), *((row.name, row.a_text, row.b_text, row.verdict) for row in self.figures)]
        widths = [max(len(row[place]) for row in rows) for place in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += ["", self.quality]
        for title, found in (("recipe", self.recipe), ("lineage", self.lineage)):
            lines += ["", f"{title}: {len(found) or 'no'} difference{'' if len(found) == 1 else 's'}"]
            lines += [f"  {one.part}: {one.a or 'none'} → {one.b or 'none'}" for one in found]
        return in_lines([*lines, *(line for note in self.notes for line in ("", note))])


@dataclass(frozen=True)
class _Side:
    """What is believed of one version. quality: window by window, or why that is not known."""

    version: RegisteredVersion
    graph: LineageGraph
    quality: Quality | str

    @classmethod
    def of(cls, registry: Registry, version: RegisteredVersion) -> _Side:
        with evidence(registry, version) as found:
            try:
                quality: Quality | str = Comparison.read(found.measured).variant.quality
            except IntegrityError as error:  # of a release that kept no windows
                quality = str(error)
            return cls(found.version, found.graph, quality)


def compare(registry: Registry, a: RegisteredVersion, b: RegisteredVersion) -> VersionComparison:
    """Two versions, of one model or of two. Raises IntegrityError where one has no verified evaluation or lineage."""
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda version: _Side.of(registry, version), (a, b))
    paired, quality = _paired(one.quality, other.quality)
    recipes = (_flat(side.graph.recipe_tree) for side in (one, other))
    facts = ({**_facts(side.graph), "engine": side.version.tag("engine")} for side in (one, other))
    return VersionComparison(
        a=f"{a.model}/{a.version}",
        b=f"{b.model}/{b.version}",
        figures=tuple(_rows(one.version.metrics, other.version.metrics, paired)),
        paired=paired,
        quality=quality,
        recipe=_differences(*recipes),
        lineage=_differences(*facts),
    )


def _rows(a: Mapping[str, float], b: Mapping[str, float], paired: Estimate | None) -> Iterator[FigureRow]:
    batches = goals.measured_batches([*a, *b])
    for figure in (QUALITY, BITS_PER_BYTE, *map(goals.speed, batches), SIZE, PEAK_MEMORY):
        first, second = figure.read(a), figure.read(b)
        if first or second:
            one, other = (with_interval(each, figure.show) if each else "not measured" for each in (first, second))
            verdict = _sign(paired) if paired and figure is BITS_PER_BYTE else _verdict(figure, first, second)
            yield FigureRow(f"{figure.name}{figure.at}", first, second, one, other, verdict)


def _sign(change: Estimate) -> Verdict:
    """Of a change that is worse where it is positive."""
    return "worse" if change.low > 0 else "better" if change.high < 0 else "within the noise"


def _verdict(figure: Figure, a: Estimate | None, b: Estimate | None) -> Verdict:
    """Of the second, where the intervals do not overlap."""
    if a is None or b is None:
        return "not measured"
    if not figure.keeps(figure.best(b), figure.worst(a)):
        return "worse"
    return "better" if not figure.keeps(figure.best(a), figure.worst(b)) else "within the noise"


def _paired(one: Quality | str, other: Quality | str) -> tuple[Estimate | None, str]:
    """The change of quality from one to the other, window by window, where both were scored on the same."""
    if isinstance(one, str) or isinstance(other, str):
        return None, f"quality window by window: {one if isinstance(one, str) else other}"
    if (one.bytes, one.loss) != (other.bytes, other.loss):
        return None, "quality window by window: scored on other windows"
    if one.of_text:
        change = bootstrap_ratio(other.nll, one.nll).shifted(-1.0)
        return change, f"bits per byte, {len(one.nll)} windows paired: {with_interval(change, percent)} (+ is worse)"
    change = bootstrap_difference(other.nll, one.nll)
    return change, f"{one.loss}, {len(one.nll)} examples paired: {with_interval(change)} (+ is worse)"


def _facts(graph: LineageGraph) -> dict[str, str]:
    """What a lineage tells that two may have otherwise: sources, code, libraries, machine, and the digest of each stage run."""
    last = next((node for node in reversed(graph.nodes) if node.environment), None)
    facts = {"variant": graph.variant, "code": graph.commit}
    for node in graph.nodes:
        name = {"load": "checkpoint", "train": "checkpoint"}.get(node.stage, node.id)
        facts[name] = f"{node.digest[:12]} {node.source}".strip()
    facts |= {f"library {name}": version for node in graph.nodes for name, version in node.environment.items()}
    return facts | {f"machine {name}": str(value) for name, value in (last.machine if last else {}).items()}


def _flat(tree: Any, path: str = "") -> dict[str, str]:
    """A recipe's values by their path."""
    if isinstance(tree, Mapping) and tree:
        return {key: value for name, one in tree.items() for key, value in _flat(one, f"{path}{'.' if path else ''}{name}").items()}
    if isinstance(tree, list) and any(isinstance(one, Mapping) for one in tree):
        return _flat({str(place): one for place, one in enumerate(tree)}, path)
    return {path: "" if tree is None else ", ".join(map(str, tree)) if isinstance(tree, list) else str(tree)}


def _differences(a: Mapping[str, str], b: Mapping[str, str]) -> tuple[Difference, ...]:
    return tuple(Difference(part, a.get(part, ""), b.get(part, "")) for part in {**a, **b} if a.get(part, "") != b.get(part, ""))
