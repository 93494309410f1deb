"""lineage.html: the whole lineage of registered versions and what an audit found of them, in one page that opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from featherweight.registry.auditing import Finding, State
from featherweight.registry.lineage import Lineage, facts, history_lines, number_lines, tree_lines
from featherweight.report.rendering import render_template


def write_lineage_page(path: Path, title: str, findings: Sequence[Finding], told: Sequence[Lineage]) -> None:
    """Write the page: findings by class, what is not ok, and each version with its stage runs, figures and history.

    findings: none where nothing was verified. It has no script and asks the network for nothing.
    """
    wrong = [one for one in findings if one.state != "ok"]
    verdict = "not verified" if not findings else f"{len(wrong)} not ok" if wrong else "all ok"
    counts = {state: sum(one.state == state for one in findings) for state in get_args(State)}
    versions = [version_section(one, findings) for one in told]
    page = render_template("lineage.html.j2", title=title, verdict=verdict, wrong=wrong, counts=counts, versions=versions)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def version_section(told: Lineage, findings: Sequence[Finding]) -> dict[str, Any]:
    """What `version_lineage.j2` shows of a version, each stage run with what an audit found of it."""
    states = {one.part: one.state for one in findings if (one.model, one.version) == (told.model, told.version)}
    nodes = [
        {
            "id": node.id,
            "stage": node.stage,
            "digest": node.digest,
            "source": node.source,
            "finished": node.finished[:19],
            "state": states.get(node.id, "not looked at"),
        }
        for node in told.graph.nodes
    ]
    return {
        "name": f"{told.model}/{told.version}",
        "stage": told.stage,
        "facts": facts(told),
        "tree": "\n".join(tree_lines(told.graph)),
        "nodes": nodes,
        "numbers": "\n".join(number_lines(told.graph)),
        "history": "\n".join(history_lines(told.history)),
    }
