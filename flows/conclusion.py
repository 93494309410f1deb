"""The end of an optimization: decide, register, promote, and show."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from featherweight.errors import GateError, told
from featherweight.measure.spec import DecideSpec
from featherweight.model.sparsity import Sparsity
from featherweight.recipe.plan import BASELINE, Node, Plan, Variant
from featherweight.recipe.reading import recipe_text
from featherweight.recipe.recipe import Recipe
from featherweight.registry.lineage import build
from featherweight.registry.registry import Registry, WinnerRecord
from featherweight.report.page import render_report
from featherweight.report.result import GateRow, NodeRow, OptimizationResult, Status, VariantRow, gate_rows
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.store.artifact import Manifest
from featherweight.store.served_folder import Serving
from featherweight.system.user import user_name
from tasks.outcome import Outcome, Outcomes
from tasks.parent_run import ParentRun
from tasks.promote import promote
from tasks.register import register
from tasks.run_node import run_node
from tasks.stages import stage_named

REPORT = "report.html"


def conclude(recipe: Recipe, plan: Plan, outcomes: Outcomes, parent: ParentRun) -> OptimizationResult:
    """Choose the winner, register and promote it, write the report; everything goes to the parent run as well."""
    decided = _decide(recipe, plan, outcomes, parent)
    decision = json.loads((decided / "decision.json").read_text())
    winner = decision["winner"] if _something_made(plan, outcomes) else None
    reasons = {**decision["reasons"], winner: decision["summary"]}
    rows = tuple(_rows(plan, outcomes, winner, reasons, parent))
    ids = _log_variants(rows, plan, outcomes, parent)
    result = _result(recipe, plan, outcomes, rows, winner, decided, parent)
    registered = ""
    if winner is not None:
        parent.progress.tell("say", f"winner: {winner}")
        registered = _hand_over(recipe, plan, outcomes, result, ids, parent)
        parent.progress.tell("say", registered)
    return _publish(replace(result, registered=registered), parent)


def _something_made(plan: Plan, outcomes: Outcomes) -> bool:
    """Whether a variant beside the baseline got as far as numbers. A baseline that beats nobody is no winner."""
    return any(outcomes[variant.measured].ref for variant in plan.variants if variant.name != BASELINE)


def _decide(recipe: Recipe, plan: Plan, outcomes: Outcomes, parent: ParentRun) -> Path:
    """Run the decide stage on every measurement there is; the folder with what it wrote."""
    measured = {v.name: v.measured for v in plan.variants if outcomes[v.measured].ref}
    node = Node("decide", "decide", "winner", DecideSpec(constraints=recipe.constraints, objective=recipe.objective), measured)
    outcome = run_node(stage_named("decide"), node, {name: outcomes[id] for name, id in measured.items()}, parent)
    return parent.workspace.materialize(outcome.artifact, check=False)


def _rows(
    plan: Plan, outcomes: Outcomes, winner: str | None, reasons: Mapping[str, str], parent: ParentRun
) -> Iterable[VariantRow]:
    """One row per variant, the ruled out included."""
    for variant in plan.variants:
        outcome = outcomes[variant.measured]
        if outcome.ref is None:
            status: Status = "skipped" if outcome.status == "skipped" else "failed"
            yield VariantRow(
                variant.name, variant.choices[-1], status, reason=outcome.reason, stages=tuple(plan.path(variant.measured))
            )
        else:
            yield _measured_row(plan, variant, outcomes, winner, reasons, parent)
    for name, reason in plan.ruled_out.items():
        yield VariantRow(name, name.rpartition("/")[2], "ruled-out", reason=reason)


def _measured_row(
    plan: Plan, variant: Variant, outcomes: Outcomes, winner: str | None, reasons: Mapping[str, str], parent: ParentRun
) -> VariantRow:
    ref, served = outcomes[variant.measured].artifact, outcomes[variant.served].artifact
    serving = Serving.read(parent.workspace.materialize(served, check=False))
    metrics = dict(ref.metrics)
    zeros = _zeros(plan, variant, outcomes, parent)
    if zeros:
        metrics["zero_share"] = zeros[1]
    if "parity_max_abs" in served.metrics:
        metrics["parity"] = served.metrics["parity_max_abs"]
    threads = {name.removeprefix("threads_"): int(value) for name, value in metrics.items() if name.startswith("threads_")}
    return VariantRow(
        variant.name,
        serving.engine,
        "baseline" if variant.name == BASELINE else "winner" if variant.name == winner else "loser",
        grid=serving.grid,
        reason=reasons.get(variant.name, ""),
        metrics=metrics,
        stages=tuple(plan.path(variant.measured)),
        threads=threads,
        notes=(RUNTIMES[serving.engine].zeros_note(*zeros),) if zeros else (),
    )


def _zeros(plan: Plan, variant: Variant, outcomes: Outcomes, parent: ParentRun) -> tuple[str, float] | None:
    """Pattern and share of the zeros of the checkpoint that a variant serves; None where it is dense."""
    checkpoint = outcomes[plan.nodes[variant.served].inputs["checkpoint"]].artifact
    share = checkpoint.metrics.get("zero_share")
    sparsity = None if share is None else Sparsity.read(parent.workspace.materialize(checkpoint, check=False))
    return (sparsity.pattern, share) if sparsity and share is not None else None


def _log_variants(rows: Iterable[VariantRow], plan: Plan, outcomes: Outcomes, parent: ParentRun) -> dict[str, str]:
    """A LoggedModel for every measured variant; their ids by name."""
    registry = Registry(parent.workspace.tracking_uri)
    measured = {variant.name: outcomes[variant.measured].artifact for variant in plan.variants if outcomes[variant.measured].ref}
    return {
        row.name: registry.log_variant(
            parent.run_id,
            row.name,
            measured[row.name].metrics,
            {"engine": row.engine, "grid": row.grid or "float"},
            {"featherweight.status": row.status, "featherweight.reason": row.reason[:4000]},
        )
        for row in rows
        if row.name in measured
    }


def _hand_over(
    recipe: Recipe, plan: Plan, outcomes: Outcomes, result: OptimizationResult, ids: Mapping[str, str], parent: ParentRun
) -> str:
    """Register the winner and move it as far as the recipe and the gate allow; what happened, in one line."""
    registry = Registry(parent.workspace.tracking_uri)
    version = register(registry, _record(recipe, plan, outcomes, result, ids, parent))
    name = f"{version.model} version {version.version}"
    stage = recipe.promote.stage
    if stage == "none":
        return f"registered as {name}, not promoted (promote.stage is none)"
    try:
        moved = promote(registry, version.model, version.version, stage, who=user_name(), why=f"winner of run {parent.run_id}")
    except GateError as error:
        return f"registered as {name}; {told(error)}"
    return f"registered as {name}, in {moved.version.stage}" + ("" if moved.changed else f" ({moved.reason})")


def _record(
    recipe: Recipe, plan: Plan, outcomes: Outcomes, result: OptimizationResult, ids: Mapping[str, str], parent: ParentRun
) -> WinnerRecord:
    """What the registry is told about the winner."""
    variant = next(v for v in plan.variants if v.name == result.winner)
    served, measured = outcomes[variant.served].artifact, outcomes[variant.measured].artifact
    artifacts = [(o.ref, Manifest.read(parent.workspace.materialize(o.ref, check=False))) for o in outcomes.values() if o.ref]
    graph = build(
        artifacts,
        served.digest,
        variant=variant.name,
        recipe=recipe_text(recipe),
        run_id=parent.run_id,
        flow_run_id=parent.tags.get("featherweight.prefect_flow_run", ""),
        measured=measured.digest,
        metrics=measured.metrics,
    )
    return WinnerRecord(
        model=recipe.promote.model,
        variant=variant.name,
        digest=served.digest,
        served=parent.workspace.materialize(served, check=False),
        run_id=parent.run_id,
        metrics=measured.metrics,
        lineage=graph.to_json(),
        recipe=recipe_text(recipe),
        checkpoint=outcomes["checkpoint"].artifact.digest,
        evaluation=outcomes["text/evaluation"].artifact.digest,
        machine=graph.nodes[-1].machine.get("hardware", ""),
        constraints=recipe.constraints.model_dump(exclude_none=True),
        objective=recipe.objective,
        threads=int(measured.metrics.get(f"threads_{result.main_batch}", 1)),
        model_id=ids[variant.name],
    )


def _result(
    recipe: Recipe,
    plan: Plan,
    outcomes: Outcomes,
    rows: tuple[VariantRow, ...],
    winner: str | None,
    decided: Path,
    parent: ParentRun,
) -> OptimizationResult:
    run = parent.client.get_run(parent.run_id)
    started = datetime.fromtimestamp(run.info.start_time / 1000, UTC)
    return OptimizationResult(
        name=recipe.name,
        objective=recipe.objective,
        winner=winner,
        variants=rows,
        constraints=recipe.constraints.model_dump(exclude_none=True),
        nodes=tuple(_node_row(node, outcomes[id]) for id, node in plan.nodes.items()),
        gates=_gates(outcomes, decided, parent),
        machine=_machine(),
        versions=_versions(outcomes, parent),
        runs={"mlflow": parent.run_id, "prefect": parent.tags.get("featherweight.prefect_flow_run", "")},
        recipe=recipe_text(recipe),
        started=started.isoformat(timespec="seconds"),
        seconds=(datetime.now(UTC) - started).total_seconds(),
        seed=recipe.seed,
        task=recipe.task,
    )


def _machine() -> dict[str, str]:
    """This machine in a few words for the report."""
    from featherweight.system.machine import describe

    machine = describe()
    return {
        "CPU": machine.cpu_model,
        "cores": str(machine.cores),
        "memory": f"{machine.memory_bytes / 2**30:.0f} GiB",
        "GPUs": ", ".join(gpu.name for gpu in machine.gpus) or "none",
    }


def _node_row(node: Node, outcome: Outcome) -> NodeRow:
    ref = outcome.ref
    return NodeRow(
        node.id,
        node.stage,
        node.label,
        outcome.status,
        ref.seconds if ref else 0.0,
        tuple(dict.fromkeys(node.inputs.values())),
        ref.digest if ref else "",
        ref.run_id if ref else "",
        outcome.cached,
    )


def _gates(outcomes: Outcomes, decided: Path, parent: ParentRun) -> tuple[GateRow, ...]:
    """The suites of the data gate and of the metrics gate."""
    folder = parent.workspace.materialize(outcomes["gate"].artifact, check=False)
    return (*gate_rows(folder / "validation.json"), *gate_rows(decided / "metrics.json"))


def _versions(outcomes: Outcomes, parent: ParentRun) -> dict[str, str]:
    """Library versions that the stages recorded."""
    found: dict[str, str] = {}
    for outcome in outcomes.values():
        if outcome.ref:
            found.update(Manifest.read(parent.workspace.materialize(outcome.ref, check=False)).environment)
    return dict(sorted(found.items()))


def _publish(result: OptimizationResult, parent: ParentRun) -> OptimizationResult:
    """Write the report, and log it and the result to the parent run."""
    reports = parent.workspace.root / "reports"
    reports.mkdir(exist_ok=True)
    page = reports / f"{result.name}-{parent.run_id[:8]}.html"
    result = replace(result, report=page)
    render_report(result, page)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / REPORT
        copy.write_bytes(page.read_bytes())
        parent.client.log_artifact(parent.run_id, str(copy))
    parent.client.log_text(parent.run_id, json.dumps(result.to_dict(), indent=1), "result.json")
    parent.client.set_tag(parent.run_id, "featherweight.winner", result.winner or "none")
    parent.client.set_tag(parent.run_id, "mlflow.note.content", result.headline())
    return result
