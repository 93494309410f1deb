"""The nodes of a plan, several at once: one on each GPU, or as many as a person says on a CPU; a measurement alone on its device.

A stage that others run beside computes in a process of its own, since libraries keep much that is one for the whole process. What
computes nothing runs by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextvars import copy_context

from featherweight.recipe.plan import Node, Plan
from featherweight.system.device import CPU, Place, at
from featherweight.system.processes import end_children
from tasks.outcome import Outcome, Outcomes

LAUNCHED = "featherweight.training.launch"
"""What the processes of stages run."""
RunNode = Callable[[Node, Outcomes], Outcome]


def run_nodes(plan: Plan, run: RunNode, places: Sequence[Place]) -> dict[str, Outcome]:
    """The outcome of every node, in the plan's order: `run` is called once its inputs' outcomes are known.

    With a single place they run one after the other, here. What `run` raises ends the rest.
    """
    outcomes: dict[str, Outcome] = {}
    if len(places) == 1:
        for id, node in plan.nodes.items():
            outcomes[id] = run(node, outcomes)
        return outcomes
    with ThreadPoolExecutor(len(places)) as pool:
        try:
            _run_all(pool, plan, run, places, outcomes)
        except BaseException:
            _end_stages()
            raise
    return {id: outcomes[id] for id in plan.nodes}


def _run_all(pool: ThreadPoolExecutor, plan: Plan, run: RunNode, places: Sequence[Place], outcomes: dict[str, Outcome]) -> None:
    free, running = list(places), dict[Future[Outcome], tuple[str, list[Place]]]()
    waiting = dict(plan.nodes)
    while waiting or running:
        ready = [node for node in waiting.values() if all(origin in outcomes for origin in node.inputs.values())]
        for node in ready:
            wanted = _room(node, places)
            if wanted > len(free):
                break  # nothing overtakes a node that waits for more room
            taken, free = free[:wanted], free[wanted:]
            place = taken[0] if _computes(node) else None
            future = pool.submit(copy_context().run, _run_at, place, run, node, dict(outcomes))
            running[future] = (node.id, taken)
            del waiting[node.id]
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            id, taken = running.pop(future)
            outcomes[id] = future.result()
            free += taken


def _run_at(place: Place | None, run: RunNode, node: Node, outcomes: Outcomes) -> Outcome:
    with at(place):
        return run(node, outcomes)


def _computes(node: Node) -> bool:
    return node.device is not None


def _room(node: Node, places: Sequence[Place]) -> int:
    """How many places a node takes: all where it is to be alone, or trains in several processes."""
    measured_here = bool(node.engines) and node.device == CPU
    alone = not _computes(node) or measured_here or getattr(node.spec, "processes", 1) > 1
    return len(places) if alone else 1


def _end_stages() -> None:
    """End the processes of the stages that still run, so that whoever waits for them goes on."""
    import psutil

    for child in psutil.Process().children():
        if LAUNCHED in child.cmdline():
            end_children(child.pid)
            child.kill()
