"""Which checks there are: processes with a limit each, what they wait for, and what needs a GPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from featherweight.errors import ToolchainError
from featherweight.recipe.plan import Node, Plan
from infra.gpu_check.plans import ENDING, ENGINES, STAGES, at, folder_of, plan_of

SHARED = ("text/train", "text/calibration", "text/evaluation", "gate", "checkpoint")
"""What all stages read: made once, on the CPU."""
ROOT = Path(__file__).parents[2]
SERVING = ("export", "compile", "evaluate")


@dataclass(frozen=True)
class Check:
    """One process. after: names of checks that must have ended well. alone: nothing else runs beside it, for it is timed.

    device: what it computes on, set for it in FEATHERWEIGHT_DEVICE. accepted: exit codes of one that is well. reason: why it is
    not run at all.
    """

    name: str
    command: tuple[str, ...] = ()
    limit_s: float = 120
    after: tuple[str, ...] = ()
    device: str = "cpu"
    alone: bool = False
    accepted: tuple[int, ...] = (0,)
    reason: str | None = None


def checks(work: Path, cuda: bool, speed: bool = True) -> list[Check]:
    """All of them, in the order in which they begin. speed: measurements too, which run alone."""
    work.mkdir(parents=True, exist_ok=True)
    first, last = [_doctor(cuda), _flow(work, cuda), _tests(cuda)], [_large(work, cuda), _other_tests(cuda)]
    found = [*first, *_stages(work, cuda), *_engines(work), *last]
    return [check for check in found if speed or not check.alone]


def _doctor(cuda: bool) -> Check:
    """A machine of this check's lacks what the bundle leaves out, which is a finding and no fault of it."""
    accepted = (0, ToolchainError.exit_code)
    return Check("doctor", _python("flows.cli", "doctor", "--json"), device=_auto(cuda), accepted=accepted)


def _tests(cuda: bool) -> Check:
    files = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py") if "mark.cuda" in file.read_text())
    side_by_side = ("--numprocesses", "6", "--dist", "worksteal")
    command = (sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *side_by_side, *files)
    return Check("tests marked cuda", command, 300, device="cuda") if cuda else _none("tests marked cuda")


def _other_tests(cuda: bool) -> Check:
    """The tests that compute on the CPU whatever else there is; on a machine without a GPU they are `make test`'s."""
    parallel = ("--numprocesses", "10", "--dist", "loadfile", "--no-loadscope-reorder")
    telling = ("-p", "no:cacheprovider", "-p", "infra.gpu_check.failures")
    command = (sys.executable, "-m", "pytest", "-q", "-m", "not cuda and not server", *telling, *parallel)
    return Check("tests beside a GPU", command, 420) if cuda else _none("tests beside a GPU")


def _flow(work: Path, cuda: bool) -> Check:
    """A whole optimization, in its own workspace, on whichever device there is."""
    recipe, folder = Path(__file__).with_name("flow.yaml"), work / "flow"
    command = _python("flows.cli", "optimize", str(recipe), "--json", "-w", str(folder), "--report", str(folder / "report.html"))
    return Check("featherweight optimize", command, 480, device=_auto(cuda))


def _stages(work: Path, cuda: bool) -> list[Check]:
    """Each stage on the CPU, and then on CUDA from the CPU's inputs."""
    plan = plan_of(STAGES)
    nodes = [node for node in plan.nodes.values() if node.stage not in (*SERVING, *ENDING)]
    found = [_node(STAGES, node, work / "stages", "cpu") for node in nodes]
    on_cuda = [node for node in nodes if node.stage not in ("text", "gate")]
    if not cuda:
        return found + [_none(f"{node.stage} {node.id} on cuda") for node in on_cuda]
    return found + [_node(STAGES, node, work / "stages", "cuda", beside=True) for node in on_cuda]


def _engines(work: Path) -> list[Check]:
    """A larger checkpoint made here; each engine's export with its parity, and then, alone, its measurement."""
    folder, tokenizer = work / "made", folder_of(work / "stages", "cpu", "checkpoint")
    making = _python("infra.gpu_check.made", str(tokenizer), str(folder))
    made = Check("checkpoint of engines", making, 120, ("train checkpoint on cpu",))
    recipe = at(ENGINES, folder, work / "engines.yaml")
    plan = plan_of(recipe)
    nodes = [node for node in plan.nodes.values() if node.stage not in ENDING]
    first = {"checkpoint": (made.name,)}
    found = [_node(recipe, node, work / "engines", node.device or "cpu", after=first.get(node.id, ())) for node in nodes]
    return [made, *found, *_ruled_out(plan)]


def _ruled_out(plan: Plan) -> list[Check]:
    return [Check(f"serve {name}", reason=f"refused in the plan: {reason}") for name, reason in plan.ruled_out.items()]


def _large(work: Path, cuda: bool) -> Check:
    """A checkpoint beyond what is loaded whole, where a GPU makes that a matter of minutes."""
    name = "a checkpoint of 1.54 billion weights"
    command = _python("infra.gpu_check.large", str(work / "large"), "load", "rtn int8", "gptq int4-g32")
    return Check(name, command, 300, device="cuda", alone=True) if cuda else _none(name)


def _node(recipe: Path, node: Node, work: Path, device: str, beside: bool = False, after: tuple[str, ...] = ()) -> Check:
    """A node of a plan, after the nodes that it reads: the CPU's where they are to be compared."""
    command = _python("infra.gpu_check.node", str(recipe), node.id, str(work), device, *(["--beside"] if beside else []))
    on = "cpu" if beside else device
    before = tuple(_named(recipe, id, stage, on) for id, stage in _inputs(recipe, node))
    own = (_named(recipe, node.id, node.stage, "cpu"),) if beside else ()
    name, alone = _named(recipe, node.id, node.stage, device), node.stage == "evaluate"
    return Check(name, command, 240, (*after, *before, *own), device, alone)


def _named(recipe: Path, id: str, stage: str, device: str) -> str:
    return f"engines: {stage} {id}" if recipe.name == ENGINES.name else f"{stage} {id} on {device}"


def _inputs(recipe: Path, node: Node) -> list[tuple[str, str]]:
    nodes = plan_of(recipe).nodes
    return [(id, nodes[id].stage) for id in dict.fromkeys(node.inputs.values())]


def _none(name: str) -> Check:
    return Check(name, reason="no CUDA")


def _auto(cuda: bool) -> str:
    return "cuda" if cuda else "cpu"


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)
