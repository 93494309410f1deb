"""decide: the table of metrics passes its gate, then the winner is chosen."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from featherweight.measure.goals import choose_winner
from featherweight.measure.measurement import Comparison
from featherweight.measure.spec import DecideSpec
from featherweight.progress import Metrics, Progress
from tasks.gate import check_metrics
from tasks.stage import stage

FILE = "decision.json"


@stage("decide", libraries=("great-expectations",))
def decide(spec: DecideSpec, *, out: Path, seed: int = 0, progress: Progress = Progress(), **measurements: Path) -> Metrics:
    """Choose among `measurements`: outputs of evaluate, by the variant's name.

    Writes decision.json (winner, why it won, why each other lost, the Pareto front), metrics.json and metrics.html.
    Raises StageError, naming the variants, where their metrics cannot be compared.
    """
    variants = {name: Comparison.read(folder).metrics() for name, folder in measurements.items()}
    progress.note("checking the metrics")
    check_metrics(({"name": name, **metrics} for name, metrics in variants.items()), out)
    decision = choose_winner(spec.constraints, spec.objective, variants)
    (out / FILE).write_text(json.dumps(asdict(decision), indent=1))
    return {"variants": len(variants), "on_pareto_front": len(decision.pareto)}
