"""The nodes of a plan, several at once: one on each GPU, or as many as a person says on a CPU; a measurement alone on its device.

A stage that others run beside computes in a process of its own, since libraries keep much that is one for the whole process. What
computes nothing runs by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from threading import Event

from featherweight.recipe.nodes import Node
from featherweight.recipe.plan import Plan
from featherweight.system.device import CPU, Place, at
from featherweight.system.processes import end_children
from tasks.outcome import Outcome, Outcomes
from tasks.stopping import heeding

OURS = ("featherweight.training.launch", "featherweight.runtimes.worker")
"""What the processes of stages and of engines run."""
AGAIN_S = 0.2
RunNode = Callable[[Node, Outcomes], Outcome]
Room = Callable[[Node, Sequence[Place]], int]
Running = dict[Future[Outcome], tuple[str, list[Place]]]
"""The id of each node that runs, and the places that it has taken."""


def run_nodes(
    plan: Plan, run: RunNode, places: Sequence[Place], room: Room | None = None, known: Outcomes | None = None
) -> dict[str, Outcome]:
    """The outcome of every node, in the plan's order: `run` is called once its inputs' outcomes are known; `known` are others'.

    With a single place they run one after the other, here. What `run` raises ends the rest. room: how many of the places a node
    takes, on a machine those that it computes on or is to have to itself.
    """
    outcomes: dict[str, Outcome] = dict(known or {})
    if len(places) == 1:
        for id, node in plan.nodes.items():
            outcomes[id] = run(node, outcomes)
        return {id: outcomes[id] for id in plan.nodes}
    running: Running = {}
    stop = Event()
    with ThreadPoolExecutor(len(places)) as pool:
        try:
            _run_all(pool, plan, partial(_run_at, run, stop), places, room or _room, outcomes, running)
        except BaseException:
            stop.set()
            _end(running)
            raise
    return {id: outcomes[id] for id in plan.nodes}


def _run_all(
    pool: ThreadPoolExecutor,
    plan: Plan,
    run_at: Callable[[Place | None, Node, Outcomes], Outcome],
    places: Sequence[Place],
    room: Room,
    outcomes: dict[str, Outcome],
    running: Running,
) -> None:
    free = list(places)
    waiting = dict(plan.nodes)
    while waiting or running:
        ready = [node for node in waiting.values() if all(origin in outcomes for origin in node.inputs.values())]
        for node in _in_turn(ready, [plan.nodes[id] for id, _ in running.values()]):
            wanted = room(node, places)
            if wanted > len(free):
                break  # nothing overtakes a node that waits for more room
            taken, free = free[:wanted], free[wanted:]
            place = taken[0] if _computes(node) else None
            future = pool.submit(copy_context().run, run_at, place, node, dict(outcomes))
            running[future] = (node.id, taken)
            del waiting[node.id]
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            id, taken = running.pop(future)
            outcomes[id] = future.result()
            free += taken


def _in_turn(ready: list[Node], running: list[Node]) -> list[Node]:
    """What may begin: a measurement, which nothing goes on from but the decision, once no other stage is left.

    It has its machine to itself: begun earlier, it would wait for those that run there, with what it has taken idle.
    """
    others = [node for node in ready if not node.engines]
    return others or ([] if any(_computes(node) and not node.engines for node in running) else ready)


def _run_at(run: RunNode, stop: Event, place: Place | None, node: Node, outcomes: Outcomes) -> Outcome:
    with at(place), heeding(stop):
        return run(node, outcomes)


def _computes(node: Node) -> bool:
    return node.device is not None


def _room(node: Node, places: Sequence[Place]) -> int:
    """How many places a node takes: all where it is to be alone, or trains in several processes."""
    measured_here = bool(node.engines) and node.device == CPU
    alone = not _computes(node) or measured_here or getattr(node.spec, "processes", 1) > 1
    return len(places) if alone else 1


def _end(running: Running) -> None:
    """End the processes of the stages that still run, until whoever waits for them, or was about to start one, has gone on."""
    while wait(running, timeout=AGAIN_S).not_done:
        _end_processes()


def _end_processes() -> None:
    import psutil

    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if {*OURS} & {*child.cmdline()}:
                end_children(child.pid)
                child.kill()
