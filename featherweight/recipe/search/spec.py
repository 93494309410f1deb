"""What a recipe says of a search: its budget, how short the first look at a variant is, and alternatives in bulk."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from featherweight.measure.goals import judged_batch
from featherweight.measure.spec import WorkloadSpec
from featherweight.spec import Duration, Positive, Spec

Searched = Literal["distill", "prune", "quantize", "compile", "export"]
Line = dict[str, Any]


def _lines(value: Any) -> Any:
    """One mapping or several."""
    return [value] if isinstance(value, dict) else value


class SearchSpec(Spec):
    """Within `budget`, all that the run does included, in place of measuring every variant as a whole.

    space: by stage, alternatives in bulk beside those of `stages`: of a mapping whose values are lists every combination is one.
    windows, rounds: of the short look that every variant which is tried gets first, at the objective's batch size alone.
    one_of: of so many that were looked at one is measured as a whole before others are tried.
    """

    budget: Duration
    space: dict[Searched, Annotated[tuple[Line, ...], BeforeValidator(_lines)]] = Field(default={})
    windows: Positive = 16
    rounds: Positive = 3
    one_of: Positive = 3

    def glance(self, workload: WorkloadSpec, objective: str) -> WorkloadSpec:
        """The workload of a short look: nothing that is asked in texts, and the batch size alone by which is judged."""
        batch = judged_batch(objective, [f"speedup_{size}" for size in workload.batch_sizes])
        less = {"windows": min(self.windows, workload.windows), "rounds": min(self.rounds, workload.rounds)}
        dropped: Line = {"changed_answers": None, "benchmarks": {}, "references": None, "requests": None}
        return workload.model_copy(update={**less, **dropped, "batch_sizes": (batch,)})


def spread(tree: Line) -> Line:
    """A recipe's tree with the alternatives of its search's space among its stages; those that stand there already stay."""
    space, stages = tree["search"].get("space"), tree.get("stages") or {}
    if not isinstance(space, dict) or not isinstance(stages, dict):
        return tree
    spread_out = dict(stages)
    for stage, lines in space.items():
        given, mappings = stages.get(stage) or {}, _lines(lines)
        if isinstance(given, dict) and isinstance(mappings, list | tuple) and all(isinstance(one, dict) for one in mappings):
            made = named(stage, [keys for line in mappings for keys in combinations(line)])
            spread_out[stage] = {**made, **given}
    return {**tree, "stages": spread_out}


def combinations(line: Mapping[str, Any]) -> Iterator[Line]:
    """Every choice of one value a key; a value that is no list is the only one. In an order that is not the file's."""
    keys = sorted(line, key=lambda key: (key not in ("engine", "method"), str(key)))
    for chosen in itertools.product(*(line[key] if isinstance(line[key], list | tuple) else [line[key]] for key in keys)):
        yield dict(zip(keys, chosen, strict=True))


def named(stage: str, alternatives: list[Line]) -> dict[str, Line]:
    """Alternatives by names that are made of their values, such as 'gptq-int4-g32-int8'."""
    found: dict[str, Line] = {}
    for keys in alternatives:
        words = "-".join(filter(None, (_word(key, value) for key, value in keys.items())))
        plain = re.sub(r"[^a-z0-9.-]+", "-", words.lower()).strip("-.")
        name = plain if plain[:1].isalpha() else f"{stage}-{plain}".strip("-")
        again = next((count for count in itertools.count(2) if f"{name}-{count}" not in found), 0)
        found[f"{name}-{again}" if name in found else name] = keys
    return found


def _word(key: str, value: Any) -> str:
    """What a name says of one key; nothing of one that has keys of its own."""
    if value is None or value is False:
        return f"no-{key}"
    if isinstance(value, dict):
        return ""
    if value is True:
        return key
    if isinstance(value, list | tuple):
        return "-".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
