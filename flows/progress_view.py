"""What a person sees while a plan runs: a live tree in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.system.progress_channel import PAUSE_S, ProgressChannel
from featherweight.visible import visible
from flows.terminal import console

if TYPE_CHECKING:
    from rich.table import Table

    from featherweight.recipe.nodes import Node
    from featherweight.recipe.plan import Plan

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
    loop_from: int = 0

    def detail(self) -> str:
        """Progress of the main loop with the time left, or the last note."""
        if self.status != "running" or not self.total:
            return self.note
        values = " ".join(f"{name} {value:.4g}" for name, value in self.values.items())
        told, made = f"{self.done}/{self.total} {values}".rstrip(), self.done - self.loop_from
        if not made:  # what the first one took began before it was heard of
            return told
        left = (time.monotonic() - self.loop_since) / made * (self.total - self.done)
        return f"{told} ~{left:.0f} s left"

    def step(self, done: int, total: int, values: Mapping[str, float]) -> None:
        """The main loop is at `done` of `total`."""
        if not self.total or done < self.done:
            self.loop_since, self.loop_from = time.monotonic(), done
        self.done, self.total, self.values = done, total, values


class View:
    """Keeps the state of every node; the base shows nothing."""

    def __init__(self) -> None:
        self.states: dict[str, NodeState] = {}

    def begin(self, plan: Plan) -> None:
        """A plan is about to run."""
        self.states = {id: NodeState(node) for id, node in plan.nodes.items()}

    def hear(self, kind: str, value: Any) -> None:
        """One message of the progress channel; what is of no node of the plan is passed over."""
        if kind == "say":
            self.say(value)
        elif value["node"] in self.states:
            self._hear(self.states[value["node"]], kind, value)

    def _hear(self, state: NodeState, kind: str, value: Mapping[str, Any]) -> None:
        match kind:
            case "started":
                state.status, state.since = "running", time.monotonic()
                self.changed(state)
            case "finished":
                state.status, state.note = value["status"], value["note"]
                state.seconds = time.monotonic() - state.since if state.since else 0.0
                self.changed(state)
            case "step":
                state.step(value["done"], value["total"], value["values"])
                self.moved(state)
            case "note":
                state.note, state.total = value["text"], 0
                self.moved(state)

    def say(self, text: str) -> None:
        """A line that is not about a node."""

    def changed(self, state: NodeState) -> None:
        """A node changed its status."""

    def moved(self, state: NodeState) -> None:
        """A running node made progress."""

    def close(self) -> None:
        """Nothing more comes."""


@contextmanager
def shown(view: View, root: Path) -> Iterator[ProgressChannel]:
    """Show what is told through a channel, a file below the workspace `root` that lasts as long as the block."""
    with tempfile.TemporaryDirectory(dir=root / "work", prefix="progress-") as folder:
        channel, over = ProgressChannel(Path(folder) / "progress.jsonl"), threading.Event()
        follower = threading.Thread(target=_follow, args=(channel, view, over), daemon=True)
        follower.start()
        try:
            yield channel
        finally:
            over.set()
            follower.join()


def _follow(channel: ProgressChannel, view: View, over: threading.Event) -> None:
    """Hand every message on, up to the last that was told when it was over."""
    last = False
    for kind, value in channel.follow():
        if kind:
            view.hear(kind, value)
        elif last:
            return
        else:
            last = over.wait(PAUSE_S)


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
        print(f"{time.monotonic() - self._began:7.1f}s  {visible(text)}", file=sys.stderr, flush=True)
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
        from rich.live import Live

        super().begin(plan)
        self._began = time.monotonic()
        self._live = Live(console=console(stderr=True), refresh_per_second=4, get_renderable=self._render)
        self._live.start()

    def say(self, text: str) -> None:
        self._live.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        if hasattr(self, "_live"):
            self._live.stop()

    def _render(self) -> Table:
        from rich.table import Table

        height = max(8, console(stderr=True).height - 4)
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
