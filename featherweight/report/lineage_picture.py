"""The picture of a result's lineage: its stage nodes as a tree from left to right, as SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from featherweight.report.result import NodeRow, OptimizationResult

# The columns of the lineage picture; a stage that is not named stands with 'serve'.
_COLUMNS = (
    *("text", "gate", "checkpoint", "generate", "distill", "prune", "finetune", "quantize", "serve", "evaluate"),
    *("decide", "register", "promote"),
)
_COLUMN_OF = {name: name for name in _COLUMNS} | {
    "load": "checkpoint",
    "train": "checkpoint",
    "sensitivity": "quantize",
    "compile": "serve",
    "export": "serve",
}
_WIDE, _TALL, _STEP, _GAP = 116, 34, 42, 22


@dataclass(frozen=True)
class Spot:
    """Where a node stands, in pixels from the top left."""

    x: float
    y: float


def lineage_layout(nodes: Sequence[NodeRow]) -> tuple[dict[str, Spot], list[str]]:
    """Places of the nodes, and the columns used. A column is a stage; a leaf has a row of its own, a parent its first child's.

    A node hangs on its first parent, the one that it carries on; so no line crosses a box on its way to the right.
    """
    used = [name for name in _COLUMNS if any(_column(node) == name for node in nodes)]
    known = {node.id for node in nodes}
    children: dict[str, list[NodeRow]] = {}
    roots = []
    for node in nodes:
        if node.parents and node.parents[0] in known:
            children.setdefault(node.parents[0], []).append(node)
        else:
            roots.append(node)
    spots: dict[str, Spot] = {}
    row = 0
    for root in sorted(roots, key=lambda node: node.id in children):
        row = _hang(root, row, children, used, spots)
    return spots, used


def _hang(node: NodeRow, row: int, children: Mapping[str, list[NodeRow]], used: list[str], spots: dict[str, Spot]) -> int:
    """Place a node at `row` and its subtree from there on; returns the next free row."""
    spots[node.id] = Spot(2 + used.index(_column(node)) * (_WIDE + _GAP), 26 + row * _STEP)
    next_row = row
    for child in children.get(node.id, ()):
        next_row = _hang(child, next_row, children, used, spots)
    return max(next_row, row + 1)


def _column(node: NodeRow) -> str:
    return _COLUMN_OF.get(node.stage, "serve")


def lineage_picture(result: OptimizationResult) -> str:
    """All stage nodes as a tree from left to right, the winner's path marked."""
    if not result.nodes:
        return ""
    spots, used = lineage_layout(result.nodes)
    winner = result.row(result.winner)
    marked = winner_path(result.nodes, winner.stages if winner else ())
    width = len(used) * (_WIDE + _GAP) - _GAP + 4
    height = max(spot.y for spot in spots.values()) + _TALL + 8
    size = f'viewBox="0 0 {width} {height:.0f}" width="{width}" height="{height:.0f}"'
    parts = [f'<svg class="lineage" {size} role="group" aria-label="Stage nodes, from the text to the measurements">']
    parts += [f'<text class="column" x="{2 + n * (_WIDE + _GAP)}" y="14">{name}</text>' for n, name in enumerate(used)]
    edges = [(parent, node, n == 0) for node in result.nodes for n, parent in enumerate(_drawn_parents(node)) if parent in spots]
    parts += [_edge(parent, node, trunk, marked, spots) for parent, node, trunk in sorted(edges, key=lambda edge: edge[2])]
    parts += [_node(node, spots[node.id], node.id in marked) for node in result.nodes]
    return "\n".join([*parts, "</svg>"])


def winner_path(nodes: Sequence[NodeRow], stages: Sequence[str]) -> set[str]:
    """Ids of the winner's last node and of everything that it was made from; what it was compared with is no part of it."""
    known = {node.id: node for node in nodes}
    found: set[str] = set()
    pending = list(stages[-1:])
    while pending:
        node = known.get(pending.pop())
        if node is not None and node.id not in found:
            found.add(node.id)
            others = node.parents[1:]
            if node.stage == "evaluate":
                others = tuple(parent for parent in others if parent in known and known[parent].stage == "text")
            pending += [*node.parents[:1], *others]
    return found


def _drawn_parents(node: NodeRow) -> tuple[str, ...]:
    """A registration reads everything there is; only the decision that it carries out is drawn."""
    return node.parents[:1] if node.stage == "register" else node.parents


def _edge(parent: str, node: NodeRow, trunk: bool, marked: set[str], spots: Mapping[str, Spot]) -> str:
    start, end = spots[parent], spots[node.id]
    x, y, to_x, to_y = start.x + _WIDE, start.y + _TALL / 2, end.x, end.y + _TALL / 2
    bend = x + _GAP
    path = f"M{x} {y:.0f}C{x + _GAP / 2:.0f} {y:.0f} {x + _GAP / 2:.0f} {to_y:.0f} {bend} {to_y:.0f}H{to_x}"
    if to_x <= x:
        path = f"M{start.x + _WIDE / 2:.0f} {y:.0f}L{end.x + _WIDE / 2:.0f} {to_y:.0f}"
    kind = " ".join(["edge", "trunk" if trunk else "side", *(["won"] if {parent, node.id} <= marked else [])])
    ends = f'data-from="{escape(parent, quote=True)}" data-to="{escape(node.id, quote=True)}"'
    return f'<path class="{kind}" {ends} d="{path}"/>'


def _node(node: NodeRow, spot: Spot, won: bool) -> str:
    kind = " ".join(["node", escape(node.status), *(["won"] if won else [])])
    took = "cached" if node.cached or node.status == "cached" else f"{node.seconds:.1f} s" if node.status == "done" else node.status
    facts = [node.id, f"stage {node.stage}, {took}", f"digest {node.digest[:16] or 'none'}", f"run {node.run_id or 'none'}"]
    tip = escape("\n".join(facts), quote=True)
    return (
        f'<g class="{kind}" tabindex="0" role="img" data-node="{escape(node.id, quote=True)}" data-tip="{tip}" aria-label="{tip}">'
        f'<rect x="{spot.x}" y="{spot.y}" width="{_WIDE}" height="{_TALL}" rx="5"/>'
        f'<text class="label" x="{spot.x + 8}" y="{spot.y + 14}">{escape(_short(node.label or node.id))}</text>'
        f'<text class="took" x="{spot.x + 8}" y="{spot.y + 28}">{escape(node.stage)} · {escape(took)}</text></g>'
    )


def _short(text: str, length: int = 16) -> str:
    """The end of a text that is too long: the last name of a path tells most."""
    return text if len(text) <= length else "…" + text[-(length - 1) :]
