"""What an optimization came to: the result of a plan that has run, its report, and both in MLflow."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from featherweight.errors import GateError, StageError, ToolchainError
from featherweight.measure.goals import Decision
from featherweight.measure.measurement import Comparison, Measurement, busy_note
from featherweight.measure.relaxing import nearest
from featherweight.measure.spec import BASELINE, WorkloadSpec
from featherweight.model.sparsity import Sparsity
from featherweight.progress import Metrics
from featherweight.recipe.nodes import Node
from featherweight.recipe.plan import Plan, Variant
from featherweight.recipe.reading import recipe_text
from featherweight.recipe.recipe import Recipe
from featherweight.registry.promotion import Promotion
from featherweight.report.overruled import advice_line
from featherweight.report.page import render_report
from featherweight.report.result import GateRow, NodeRow, OptimizationResult, Status, VariantRow, gate_rows
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.spec import Spec
from featherweight.store.artifact import Manifest
from featherweight.store.mlflow_errors import mlflow_explained
from featherweight.store.served_folder import Serving
from featherweight.store.workspace import Workspace
from featherweight.system.device import CPU, Device
from featherweight.system.energy import EnergyMeter
from tasks.decide import read_decision
from tasks.outcome import PASSED_OVER, Outcome, Outcomes
from tasks.parent_run import ParentRun, connect

REPORT, RESULT = "report.html", "result.json"


def summarize(recipe: Recipe, plan: Plan, outcomes: Outcomes, parent: ParentRun) -> OptimizationResult:
    """The result of a plan that has run; its report is written, and report and result are logged to the parent run."""
    return _publish(_result(recipe, plan, outcomes, parent), parent)


def _rows(plan: Plan, outcomes: Outcomes, decision: Decision, parent: ParentRun) -> Iterable[VariantRow]:
    """One row per variant, the ruled out included."""
    for variant in plan.variants:
        outcome = outcomes[variant.measured]
        if outcome.ref is None:
            status: Status = outcome.status if outcome.status in ("skipped", "passed-over") else "failed"
            yield VariantRow(
                variant.name, variant.choices[-1], status, reason=outcome.reason, stages=tuple(plan.path(variant.measured))
            )
        else:
            yield _measured_row(plan, variant, outcomes, decision, parent)
    for name, reason in plan.ruled_out.items():
        yield VariantRow(name, name.rpartition("/")[2], "ruled-out", reason=reason)


def _measured_row(plan: Plan, variant: Variant, outcomes: Outcomes, decision: Decision, parent: ParentRun) -> VariantRow:
    ref, served = outcomes[variant.measured].artifact, outcomes[variant.served].artifact
    folder = parent.workspace.materialize(served, check=False)
    serving = Serving.read(folder)
    metrics, asked = dict(ref.metrics), plan.nodes[variant.measured].spec
    won = variant.name == decision.winner
    zeros = served_zeros(plan, variant, outcomes, parent)
    if zeros:
        metrics["zero_share"] = zeros[1]
    if "parity_max_abs" in served.metrics:
        metrics["parity"] = served.metrics["parity_max_abs"]
    counts = {name.removeprefix("threads_"): int(value) for name, value in metrics.items() if name.startswith("threads_")}
    threads = {batch: count for batch, count in counts.items() if batch.isdigit()}
    return VariantRow(
        variant.name,
        serving.engine,
        "baseline" if variant.name == BASELINE else "winner" if won else "loser",
        grid=serving.grid,
        reason=decision.summary if won else decision.reasons.get(variant.name, ""),
        metrics=metrics,
        stages=tuple(plan.path(variant.measured)),
        threads=threads,
        notes=(
            *(note for note in (RUNTIMES[serving.engine].served_note(serving), _zeros_note(serving, zeros)) if note),
            *([serving.length_note] if serving.length_note else []),
            *(
                note
                for note in (
                    _device_note(plan, serving),
                    _numbers_note(variant, serving),
                    _windows_note(asked, metrics),
                    busy_note(metrics),
                )
                if note
            ),
            *_judgements(plan, variant, outcomes),
        ),
        device=serving.device,
        attention=_attention(Comparison.read(parent.workspace.materialize(ref, check=False)).variant),
    )


def _attention(measured: Measurement) -> str:
    """The kernels of a variant's attention, once where all passes take the same."""
    return " / ".join(dict.fromkeys(measured.attention.values()))


def _zeros_note(serving: Serving, zeros: tuple[str, float] | None) -> str | None:
    return RUNTIMES[serving.engine].zeros_note(*zeros) if zeros else None


def _device_note(plan: Plan, serving: Serving) -> str | None:
    """What is to be known of a comparison across devices, which the recipe has asked for."""
    other = plan.nodes[BASELINE].device or serving.device
    return None if other == serving.device else f"served from {serving.device}, and compared with the baseline on {other}"


def _windows_note(asked: Spec, metrics: Metrics) -> str | None:
    """What is to be known of a quality that was measured on far less text than the recipe asks for."""
    found = metrics.get("windows")
    if found is None or not isinstance(asked, WorkloadSpec) or 2 * found >= asked.windows:
        return None
    return f"quality was measured on {found:.0f} windows, not {asked.windows}: the evaluation text holds no more; give more text"


def _numbers_note(variant: Variant, serving: Serving) -> str | None:
    """What is to be known of a baseline in the 16 bits that its checkpoint is stored in."""
    numbers = serving.options.get("dtype", "float32")
    if variant.name != BASELINE or numbers == "float32":
        return None
    return f"served in {numbers}, as the checkpoint is stored: in float32 it does not fit this machine's memory"


def _judgements(plan: Plan, variant: Variant, outcomes: Outcomes) -> Iterable[str]:
    """What the methods that rounded a variant's weights made of them, beside rounding to nearest."""
    for id in plan.path(variant.measured):
        metrics = outcomes[id].artifact.metrics if plan.nodes[id].stage == "quantize" else {}
        if "rtn_loss" in metrics:
            yield (
                f"{id}: a loss of {metrics['loss_after']:.4f} nats on the calibration text, {metrics['rtn_loss']:.4f} by rounding "
                f"to nearest, {metrics['loss_before']:.4f} in float"
            )


def served_zeros(plan: Plan, variant: Variant, outcomes: Outcomes, parent: ParentRun) -> tuple[str, float] | None:
    """Pattern and share of the zeros of the checkpoint that a variant serves; None where it is dense."""
    checkpoint = outcomes[plan.nodes[variant.served].inputs["checkpoint"]].artifact
    share = checkpoint.metrics.get("zero_share")
    sparsity = None if share is None else Sparsity.read(parent.workspace.materialize(checkpoint, check=False))
    return (sparsity.pattern, share) if sparsity and share is not None else None


def require_winner(result: OptimizationResult) -> None:
    """Raise StageError, ToolchainError or GateError for an optimization that registered nothing, by why it did not."""
    if result.nothing_made:
        failed = any(row.status == "failed" for row in result.variants)
        error = StageError if failed else ToolchainError
        raise error("no variant was made, and nothing registered; the table says why each failed or was skipped")
    if result.unserved:
        raise GateError(f"the winner did not answer once it was champion, and is champion no more: {result.unserved}")
    if result.winner is None:
        raise GateError("no variant keeps the constraints; the table says by how much each misses them")


def _result(recipe: Recipe, plan: Plan, outcomes: Outcomes, parent: ParentRun) -> OptimizationResult:
    started = datetime.fromtimestamp(parent.client.get_run(parent.run_id).info.start_time / 1000, UTC)
    decision = read_decision(_folder("decide", outcomes, parent))
    promoted = Promotion.read(_folder("promote", outcomes, parent)) if decision.winner else None
    result = OptimizationResult(
        name=recipe.name,
        objective=recipe.objective,
        winner=decision.winner,
        variants=tuple(_rows(plan, outcomes, decision, parent)),
        constraints=recipe.constraints.bounds,
        nodes=tuple(_node_row(node, outcomes[id]) for id, node in plan.nodes.items() if outcomes[id].status != PASSED_OVER),
        gates=_gates(outcomes, parent),
        machine=_machine(plan.nodes[BASELINE].device or CPU) | {"stages computed on": plan.nodes[BASELINE].device or ""},
        versions=_versions(outcomes, parent),
        runs={"mlflow": parent.run_id, "prefect": parent.tags.get("featherweight.prefect_flow_run", "")},
        recipe=recipe_text(recipe),
        registered=promoted.reason if promoted else "",
        unserved=promoted.unserved if promoted else "",
        waits=f"{promoted.model}/{promoted.version}" if promoted and promoted.waits else "",
        started=started.isoformat(timespec="seconds"),
        seconds=(datetime.now(UTC) - started).total_seconds(),
        seed=recipe.seed,
        task=recipe.task,
    )
    found = _best_found(recipe, plan, outcomes, parent, result)
    return replace(result, advice=advice_line(result, recipe.advice or {}), best_found=found)


def _best_found(recipe: Recipe, plan: Plan, outcomes: Outcomes, parent: ParentRun, result: OptimizationResult) -> str:
    """Where nothing but the baseline keeps the constraints: what comes nearest, where it lies, and what to relax for it."""
    if result.winner not in (None, BASELINE):
        return ""
    best = nearest(recipe.constraints, recipe.objective, {row.name: row.metrics for row in result.measured})
    if best is None:
        return ""
    served = next(variant.served for variant in plan.variants if variant.name == best.name)
    folder = parent.workspace.materialize(outcomes[served].artifact, check=False)
    return f"the best found beside the baseline is {best.name}, in {folder}; {best.words} and it may win"


def _folder(node: str, outcomes: Outcomes, parent: ParentRun) -> Path:
    """The artifact of a node that has one."""
    return parent.workspace.materialize(outcomes[node].artifact, check=False)


def _machine(device: Device) -> dict[str, str]:
    """This machine in a few words for the report."""
    from featherweight.system.machine import describe

    machine = describe()
    return {
        "CPU": machine.cpu_model,
        "cores": str(machine.cores),
        "memory": f"{machine.memory_bytes / 2**30:.0f} GiB",
        "GPUs": ", ".join(gpu.name for gpu in machine.gpus) or "none",
        "energy": f"not readable here: {reason}" if (reason := EnergyMeter(device).reason) else "counted of the whole machine",
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
        node.device or "",
    )


def _gates(outcomes: Outcomes, parent: ParentRun) -> tuple[GateRow, ...]:
    """The suites of the data gate and of the metrics gate."""
    data, decided = (_folder(node, outcomes, parent) for node in ("gate", "decide"))
    return (*gate_rows(data / "validation.json"), *gate_rows(decided / "metrics.json"))


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
    parent.client.log_text(parent.run_id, json.dumps(result.to_dict(), indent=1), RESULT)
    parent.client.set_tag(parent.run_id, "featherweight.winner", result.winner or "none")
    parent.client.set_tag(parent.run_id, "mlflow.note.content", result.headline())
    return result


def past_result(workspace: Workspace, run_id: str) -> OptimizationResult:
    """The result of a finished optimization: the latest where `run_id` is empty. Raises GateError where there is none."""
    client = connect(workspace)
    if not run_id:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        wanted = "tags.featherweight.kind = 'optimization' AND attributes.status = 'FINISHED'"
        runs = client.search_runs(experiments, wanted, order_by=["attributes.start_time DESC"], max_results=1)
        if not runs:
            raise GateError(f"no finished optimization in {workspace.root}; run `featherweight optimize RECIPE` first")
        run_id = runs[0].info.run_id
    return OptimizationResult.from_dict(json.loads(_logged_result(workspace, run_id)))


def waiting_result(workspace: Workspace, flow_run: str) -> OptimizationResult | None:
    """The result that a flow run came to before it was suspended, None where it was not suspended."""
    client = connect(workspace)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    wanted = f"tags.featherweight.prefect_flow_run = '{flow_run}' AND tags.featherweight.kind = 'optimization'"
    runs = client.search_runs(experiments, f"{wanted} AND attributes.status = 'FINISHED'", max_results=1)
    result = OptimizationResult.from_dict(json.loads(_logged_result(workspace, runs[0].info.run_id))) if runs else None
    return result if result and result.waits else None


def _logged_result(workspace: Workspace, run_id: str) -> str:
    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory() as folder:
        uri, missing = workspace.tracking_uri, GateError(f"run '{run_id}' holds no result; `featherweight ui` lists the runs")
        with mlflow_explained(uri, missing, files=True):
            got = download_artifacts(run_id=run_id, artifact_path=RESULT, dst_path=folder, tracking_uri=uri)
        return Path(got).read_text()
