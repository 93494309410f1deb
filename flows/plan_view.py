"""`featherweight plan`: the tree of variants and what it will cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featherweight.recipe.cost import Cost
from featherweight.recipe.nodes import Node
from featherweight.recipe.refusals import gib
from tasks.forecast import PlanForecast
from tasks.run_node import method

if TYPE_CHECKING:
    from rich.tree import Tree

NAMED_BYTES = 2 << 30
"""Memory of a stage from which on it is told."""
# The input that a node hangs on in the tree, the first that it has.
BRANCHES = ("decide", "registered", "served", "checkpoint", "text")


def plan_tree(shown: PlanForecast) -> Tree:
    """The trie, one line a node, then what was ruled out and the totals."""
    from rich.tree import Tree

    root = Tree(f"[bold]{len(shown.plan.variants)} variants, {len(shown.plan.nodes)} stage nodes[/bold]")
    branches: dict[str, Tree] = {}
    for node in shown.plan.nodes.values():
        origin = next((node.inputs[name] for name in BRANCHES if name in node.inputs), "")
        branches[node.id] = branches.get(origin, root).add(_line(node, shown.costs[node.id], shown.memory.get(node.id, 0)))
    if shown.plan.ruled_out:
        out = root.add("[yellow]ruled out[/yellow]")
        for name, reason in shown.plan.ruled_out.items():
            out.add(f"{name}: {reason}", style="dim")
    for warning in shown.warnings:
        root.add(f"[yellow]warning[/yellow] {warning}")
    if shown.budget is not None:
        root.add(f"[bold]a search of {_clock(shown.budget)}[/bold]; all of it would take about {_clock(shown.seconds)}")
        return root
    root.add(f"[bold]about {_clock(shown.seconds)}[/bold]; {_clock(shown.unshared_seconds)} if every variant paid for itself alone")
    return root


def _line(node: Node, cost: Cost, held_bytes: float) -> str:
    price = "cached" if cost.basis == "cached" else f"{_clock(cost.seconds)} {cost.basis}"
    if held_bytes > NAMED_BYTES:
        price = f"{price}, holds {gib(held_bytes)}"
    return f"{node.id}  [dim]{node.stage} {method(node.spec)}  {price}[/dim]"


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
