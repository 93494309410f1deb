"""What a plan will cost: what a node took last time where that is known, an estimate from its arithmetic elsewhere.

An estimate is a constant for each stage (imports, engines that start), the arithmetic of its method at the speed of this machine's
matrix products, the weights that it reads for every generated token at the speed of its memory, and the files that it reads, writes
and hashes. All of them scale with the model, and what was pruned or distilled counts as large as what is left of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from featherweight.measure import benchmark_files
from featherweight.measure.spec import WorkloadSpec
from featherweight.pruning.catalog import PRUNERS
from featherweight.pruning.spec import PruneSpec
from featherweight.quantization.catalog import QUANTIZERS
from featherweight.quantization.spec import QuantizeSpec, SensitivitySpec
from featherweight.recipe.nodes import Node
from featherweight.recipe.plan import Plan
from featherweight.recipe.refusals import FLOAT_BYTES
from featherweight.recipe.sizes import sizes
from featherweight.runtimes.catalog import BASELINE, RUNTIMES
from featherweight.runtimes.probes import NEW_TOKENS, SHORT_TOKENS, SHORT_WINDOWS
from featherweight.runtimes.spec import ServingSpec
from featherweight.spec import ModelSize, Spec
from featherweight.system.kept import keep, kept
from featherweight.system.machine import boot_id, hardware_fingerprint

# Seconds that a stage takes beside its arithmetic: imports, conversion, starting engines (seen on two AVX2 cores).
FIXED_S = {
    "text": 2,
    "gate": 6,
    "train": 6,
    "load": 2,
    "distill": 1,
    "prune": 2,
    "finetune": 1,
    "quantize": 2,
    "sensitivity": 2,
    "generate": 6,
    "decide": 3,
    "register": 2,
    "promote": 1,
}
CALIBRATED_S = 11
"""More for a method of llm-compressor, whose import takes so long."""
FILES_BYTES_S = 4e8
"""Reading or writing weights and hashing them."""
REACHED = 0.35
"""The share of a large matrix product's speed that a model's forward and backward reach."""
UNPACK_S = 2.5e-7
"""Seconds for each weight of a GGUF file or another quantized checkpoint (seen on SmolLM2-135M)."""
SPEEDS = "speeds-of-this-machine"
CHOICES = 2
"""As many, at least, a benchmark's example has whose answers are scored."""
COMPARED_TOKENS = 16 * 128
"""Tokens on which what a stage made is compared with what it was given."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a node and how they are known: 'cached' (nothing to do), 'measured' (last time) or 'estimated'."""

    seconds: float
    basis: str


@dataclass(frozen=True)
class Speeds:
    """Of a machine: floating-point operations, and bytes read from memory, per second."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Work:
    """What a node does beside its constant: arithmetic, bytes of memory read again and again, bytes of files, seconds."""

    operations: float = 0.0
    memory: float = 0.0
    files: float = 0.0
    waiting: float = 0.0

    def seconds(self, speeds: Speeds) -> float:
        """How long it takes at these speeds."""
        arithmetic = self.operations / (REACHED * speeds.flops) + self.memory / speeds.bandwidth
        return arithmetic + self.files / FILES_BYTES_S + self.waiting


def machine_speeds() -> Speeds:
    """Of this machine when it has nothing else to do: what this user's processes found since it started, else measured now."""
    state = [hardware_fingerprint(), boot_id()]
    known = kept(SPEEDS, state)
    if known is None:
        known = asdict(_measured_speeds())
        keep(SPEEDS, state, known)
    return Speeds(**known)


def _measured_speeds() -> Speeds:
    """In a third of a second, the best of many short passes of one core.

    In the thread's own time, in which what another process takes away does not count.
    """
    import numpy as np
    from threadpoolctl import threadpool_limits

    a = np.random.default_rng(0).random((512, 512), dtype=np.float32)
    array = np.ones(2**25, dtype=np.float32)
    with threadpool_limits(1):
        multiplied, read = _shortest(lambda: a @ a), _shortest(array.max)
    return Speeds(len(os.sched_getaffinity(0)) * 2 * 512**3 / multiplied, array.nbytes / read)


def _shortest(run: Callable[[], object], budget_s: float = 0.15) -> float:
    run()
    begun, times = time.perf_counter(), list[float]()
    while len(times) < 3 or time.perf_counter() - begun < budget_s:
        started = time.thread_time()
        run()
        times.append(time.thread_time() - started)
    return min(times)


def estimate(
    plan: Plan,
    measured: dict[str, float],
    cached: set[str],
    size: ModelSize = ModelSize(0),
    speeds: Speeds | None = None,
    students: Mapping[str, ModelSize] | None = None,
) -> dict[str, Cost]:
    """Cost of every node. `measured`: seconds by node id from earlier runs of the same spec; `cached`: ids with a result.

    size: the checkpoint's; students: of others, by source. speeds: this machine's by default.
    """
    speeds = speeds or machine_speeds()
    given = sizes(plan.nodes, size, students)
    costs = {}
    for id, node in plan.nodes.items():
        if id in cached:
            costs[id] = Cost(0.0, "cached")
        elif id in measured:
            costs[id] = Cost(measured[id], "measured")
        else:
            costs[id] = Cost(_fixed(node, plan) + _work(node, given).seconds(speeds), "estimated")
    return costs


def _fixed(node: Node, plan: Plan) -> float:
    """Seconds that do not depend on the model's size."""
    if node.stage in ("decide", "register", "promote"):
        return FIXED_S[node.stage]
    served = plan.nodes[node.inputs.get("served", node.id)].spec
    if isinstance(served, ServingSpec):
        runtime = RUNTIMES[served.engine]
        return runtime.writing_s if node.spec is served else runtime.measuring_s
    return FIXED_S.get(node.stage, 1) + (CALIBRATED_S if "llmcompressor" in _libraries(node.spec) else 0)


def _libraries(spec: Spec) -> set[str]:
    """The distributions that the methods of a spec are made with."""
    if isinstance(spec, QuantizeSpec):
        return {library for name in spec.methods for library in QUANTIZERS[name].libraries}
    return set(PRUNERS[spec.method].libraries) if isinstance(spec, PruneSpec) else set()


def _work(node: Node, given: Mapping[str, ModelSize]) -> Work:
    """What the node does with the model that it is given."""
    spec, size = node.spec, given[node.id]
    weights = FLOAT_BYTES * size.parameters
    if node.stage in ("text", "gate", "decide", "promote"):
        return Work()
    if isinstance(spec, ServingSpec):
        return _writing(spec, size)
    if isinstance(spec, WorkloadSpec):
        sides = [given[id] for id in dict.fromkeys((node.inputs["served"], node.inputs["baseline"]))]
        return _measuring(spec, [*sides, *[size] * (len(node.engines) - 2)])
    if isinstance(spec, SensitivitySpec):
        return Work(spec.operations(size), files=weights)
    if isinstance(spec, QuantizeSpec):
        one_by_one = size.columns * sum(QUANTIZERS[name].column_s for name in spec.methods)
        return Work(spec.operations(size) + 2 * _forward(size, COMPARED_TOKENS), files=4 * weights, waiting=one_by_one)
    unpacked = UNPACK_S * size.parameters if node.stage == "load" and size.packed else 0.0
    compared = _forward(size, COMPARED_TOKENS) if node.stage in ("prune", "distill", "finetune") else 0.0
    return Work(spec.operations(size) + compared, files=3 * weights, waiting=unpacked)


def _forward(size: ModelSize, tokens: float) -> float:
    """Operations of a forward pass over so many tokens."""
    return 2.0 * size.parameters * tokens


def _writing(spec: ServingSpec, size: ModelSize) -> Work:
    """Converting and hashing, and the comparison with PyTorch, which both sides compute and go on from token by token."""
    tokens = spec.max_tokens + SHORT_WINDOWS * SHORT_TOKENS
    weights = FLOAT_BYTES * size.parameters
    if spec.engine == BASELINE:  # the checkpoint's own files, and what all others are compared with
        return Work(files=weights)
    converting = RUNTIMES[spec.engine].weight_s * size.parameters
    return Work(2 * _forward(size, tokens), memory=2 * NEW_TOKENS * weights, files=4 * weights, waiting=converting)


def _measuring(spec: WorkloadSpec, sides: Sequence[ModelSize]) -> Work:
    """Scoring the windows once, and by turns with the baseline generating for every batch size: tries, warming up, rounds."""
    generations = spec.rounds + 1 + len(spec.threads or (1, 2))
    tokens = sum(batch * (spec.prompt_tokens + spec.new_tokens) for batch in spec.batch_sizes) * generations
    steps = len(spec.batch_sizes) * spec.new_tokens * generations
    if spec.asked_texts:
        texts, new_tokens = map(max, zip(*spec.asked_texts, strict=True))
        tokens += texts * (spec.prompt_tokens + new_tokens)
        steps += -(-texts // max(spec.batch_sizes)) * new_tokens
    tokens += sum(one.prompt_tokens + one.new_tokens for one in spec.lengths) * generations
    steps += sum(one.new_tokens for one in spec.lengths) * generations
    came_s = 0.0
    if asked := spec.requests:
        came_s = len(asked.rate) * asked.seconds * len(sides) + asked.trials_s(spec.batch_sizes)
    weights = FLOAT_BYTES * sum(size.parameters for size in sides)
    generated = sum(_forward(size, tokens) for size in sides)
    asked_tokens, asked_steps = _benchmarks(spec)
    scored = _forward(sides[0], spec.windows * spec.window_tokens + asked_tokens)
    read = steps * weights + asked_steps * FLOAT_BYTES * sides[0].parameters
    return Work(scored + generated, memory=read, files=weights, waiting=came_s)


def _benchmarks(spec: WorkloadSpec) -> tuple[float, float]:
    """(tokens that are read, steps of writing) of its benchmarks, each example's text once for each of `CHOICES`."""
    read = steps = 0.0
    for name, one in spec.benchmarks.items():
        examples, tokens = benchmark_files.amount(one)
        written = one.new_tokens if benchmark_files.writes(name, one) else 0
        read += examples * ((tokens + written) if written else CHOICES * tokens)
        steps += examples * written
    return read, steps
