"""What a person sees while a plan runs: a live tree in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from featherweight.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table

    from featherweight.recipe.plan import Node, Plan

MARKS = {
    "waiting": ("·", "dim"),
    "running": ("▶", "bold yellow"),
    "done": ("✓", "green"),
    "cached": ("=", "cyan"),
    "failed": ("✗", "bold red"),
    "blocked": ("-", "red"),
    "skipped": ("○", "magenta"),
}


@dataclass
class NodeState:
    """How far a node is."""

    node: Node
    status: str = "waiting"
    since: float = 0.0
    seconds: float = 0.0
    done: int = 0
    total: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    loop_since: float = 0.0

    def detail(self) -> str:
        """Progress of the main loop with the time left, or the last note."""
        if self.status != "running" or not self.total:
            return self.note
        values = " ".join(f"{name} {value:.4g}" for name, value in self.values.items())
        elapsed = time.monotonic() - self.loop_since
        left = elapsed / self.done * (self.total - self.done) if self.done else 0.0
        return f"{self.done}/{self.total} {values} ~{left:.0f} s left"


class View:
    """Keeps the state of every node; the base shows nothing."""

    def __init__(self) -> None:
        self.states: dict[str, NodeState] = {}

    def begin(self, plan: Plan) -> None:
        """A plan is about to run."""
        self.states = {id: NodeState(node) for id, node in plan.nodes.items()}

    def started(self, node: Node) -> None:
        """A node runs (or is looked up in the cache)."""
        state = self.states.setdefault(node.id, NodeState(node))
        state.status, state.since = "running", time.monotonic()
        self.changed(state)

    def finished(self, id: str, status: str, note: str = "") -> None:
        """A node is done, cached, failed, blocked or skipped."""
        state = self.states[id]
        state.status, state.note = status, note
        state.seconds = time.monotonic() - state.since if state.since else 0.0
        self.changed(state)

    def listener(self, node: Node) -> Progress:
        """What a running stage calls."""
        return _NodeProgress(self, self.states[node.id])

    def say(self, text: str) -> None:
        """A line that is not about a node."""

    def changed(self, state: NodeState) -> None:
        """A node changed its status."""

    def moved(self, state: NodeState) -> None:
        """A running node made progress."""

    def close(self) -> None:
        """Nothing more comes."""


class _NodeProgress(Progress):
    def __init__(self, view: View, state: NodeState) -> None:
        self._view, self._state = view, state

    def step(self, done: int, total: int, **values: float) -> None:
        state = self._state
        if not state.total or done < state.done:
            state.loop_since = time.monotonic()
        state.done, state.total, state.values = done, total, values
        self._view.moved(state)

    def note(self, text: str) -> None:
        self._state.note, self._state.total = text, 0
        self._view.moved(self._state)


class PlainView(View):
    """One line per event on standard error, and one every few seconds while a loop runs."""

    def __init__(self, every_s: float = 5.0) -> None:
        super().__init__()
        self._every_s = every_s
        self._spoke = 0.0
        self._began = time.monotonic()

    def begin(self, plan: Plan) -> None:
        super().begin(plan)
        self.say(f"{len(plan.variants)} variants, {len(plan.nodes)} stage nodes, {len(plan.ruled_out)} combinations ruled out")

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:7.1f}s  {text}", file=sys.stderr, flush=True)
        self._spoke = time.monotonic()

    def changed(self, state: NodeState) -> None:
        if state.status == "running":
            self.say(f"{'start':8} {state.node.id}  {state.node.stage}")
        else:
            note = f"  {state.note}" if state.note and state.status not in ("done", "cached") else ""
            self.say(f"{state.status:8} {state.node.id}  {state.seconds:.1f} s{note}")

    def moved(self, state: NodeState) -> None:
        if time.monotonic() - self._spoke > self._every_s:
            self.say(f"{'':8} {state.node.id}  {state.detail()}")


class LiveView(View):
    """The plan as a table that redraws itself; the terminal keeps the last frame."""

    def begin(self, plan: Plan) -> None:
        from rich.console import Console
        from rich.live import Live

        super().begin(plan)
        self._began = time.monotonic()
        self._live = Live(console=Console(stderr=True), refresh_per_second=4, get_renderable=self._render)
        self._live.start()

    def say(self, text: str) -> None:
        self._live.console.print(text, highlight=False)

    def close(self) -> None:
        if hasattr(self, "_live"):
            self._live.stop()

    def _render(self) -> Table:
        from rich.console import Console
        from rich.table import Table

        height = max(8, Console(stderr=True).height - 4)
        shown, hidden = _fit(list(self.states.values()), height)
        finished = sum(state.status not in ("waiting", "running") for state in self.states.values())
        title = f"{finished}/{len(self.states)} nodes · {time.monotonic() - self._began:.0f} s"
        if hidden:
            title += f" · {hidden} not shown"
        table = Table(title=title, box=None, pad_edge=False, title_justify="left", show_header=False)
        for column in ("mark", "node", "stage", "seconds", "detail"):
            table.add_column(column, no_wrap=True, justify="right" if column == "seconds" else "left")
        for state in shown:
            mark, style = MARKS[state.status]
            seconds = time.monotonic() - state.since if state.status == "running" else state.seconds
            clock = f"{seconds:.1f} s" if state.since else ""
            table.add_row(mark, state.node.id, state.node.stage, clock, state.detail(), style=style)
        return table


def _fit(states: list[NodeState], height: int) -> tuple[list[NodeState], int]:
    """The stretch of nodes around the running one that fits the terminal, and how many are left out."""
    running = next((i for i, state in enumerate(states) if state.status == "running"), len(states) - 1)
    start = max(0, min(running - height * 2 // 3, len(states) - height))
    shown = states[start : start + height]
    return shown, len(states) - len(shown)


def view_for(quiet: bool) -> View:
    """The view that fits where standard error goes."""
    if quiet:
        return View()
    return LiveView() if sys.stderr.isatty() else PlainView()
