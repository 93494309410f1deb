"""decide: the table of metrics passes its gate, then the winner is chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

from featherweight.measure.goals import Decision, choose_winner
from featherweight.measure.measurement import Comparison
from featherweight.measure.spec import BASELINE, DecideSpec
from featherweight.progress import Metrics, Progress
from tasks.gate import check_metrics
from tasks.stage import stage

FILE = "decision.json"


@stage("decide", libraries=("great-expectations",))
def decide(spec: DecideSpec, *, inputs: Mapping[str, Path], out: Path, seed: int = 0, progress: Progress = Progress()) -> Metrics:
    """Choose among `inputs`: outputs of evaluate, by the variant's name.

    Writes decision.json (winner, why it won, why each other lost, the Pareto front, and which variants of the plan have no
    measurement), metrics.json and metrics.html. A baseline that beats nobody is no winner. Raises StageError, naming the
    variants, where their metrics cannot be compared.
    """
    variants = {name: Comparison.read(folder).metrics() for name, folder in inputs.items()}
    progress.note("checking the metrics")
    check_metrics(({"name": name, **metrics} for name, metrics in variants.items()), out)
    decision = choose_winner(spec.constraints, spec.objective, variants)
    if not inputs.keys() - {BASELINE}:
        decision = replace(decision, winner=None, summary="no variant beside the baseline was measured")
    absent = [name for name in spec.variants if name not in inputs]
    (out / FILE).write_text(json.dumps({**asdict(decision), "absent": absent}, indent=1))
    return {"variants": len(variants), "on_pareto_front": len(decision.pareto)}


def read_decision(folder: Path) -> Decision:
    """What the stage decided."""
    told = json.loads((folder / FILE).read_text())
    return Decision(**{field.name: told[field.name] for field in fields(Decision)})
