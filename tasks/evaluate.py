"""Evaluate a served variant on its own engine, in turns with the baseline: quality, speed, memory, size."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from featherweight.errors import StageError
from featherweight.measure import benchmark_files, references
from featherweight.measure.measurement import Comparison, Measurement, Plain
from featherweight.measure.roofline import Roofline
from featherweight.measure.spec import WorkloadSpec
from featherweight.measure.speed import Speed
from featherweight.progress import Metrics, Progress
from featherweight.runtimes.bytes_read import bytes_read
from featherweight.runtimes.lossless import hold_same, speculates, without_speculation
from featherweight.runtimes.measuring import MeasuredVariant, take_turns
from featherweight.runtimes.requests import ask_in_turns
from featherweight.runtimes.workload import Workload
from featherweight.store.served_folder import Serving, same_files
from featherweight.system.device import CUDA
from featherweight.system.gpu_bandwidth import gpu_bandwidth_bytes_s
from featherweight.system.machine import hardware_fingerprint, memory_bandwidth_bytes_s
from featherweight.system.other_programs import ProcessorTimes
from tasks.stage import stage


def _outside(spec: WorkloadSpec) -> str | None:
    """What a workload names that lies outside the artifacts."""
    return "\n".join(filter(None, (benchmark_files.fingerprint(spec), references.fingerprint(spec)))) or None


@stage("evaluate", hardware=True, libraries=("torch", "transformers"), source=_outside)
def evaluate(
    spec: WorkloadSpec,
    *,
    served: Path,
    baseline: Path,
    evaluation: Path,
    out: Path,
    baseline_measurement: Path | None = None,
    seed: int = 0,
    progress: Progress = Progress(),
) -> Metrics:
    """Measure `served` beside `baseline` (both served folders) on the text folder `evaluation`.

    baseline_measurement: what evaluating the baseline against itself gave; its quality, memory and best thread counts are
    taken from there, while its speed is measured again, in turns with the variant's. Writes `measurement.json` and returns
    Comparison.metrics(). A variant with fewer tokens is given the same text in its own. One that drafts tokens is measured beside
    itself without. Raises StageError where an engine fails or computes what is no number, ParityError where that changes a text,
    RecipeError where the workload does not fit the model's context.
    """
    workload = Workload.read(spec, baseline / Serving.read(baseline).weights, evaluation)
    known = Comparison.read(baseline_measurement).variant if baseline_measurement else None
    with ExitStack() as stack:
        alone = same_files(served, baseline)
        variant = MeasuredVariant(workload.for_served(served, baseline), served, stack, progress, keep=alone, like=known)
        other = variant if alone else MeasuredVariant(workload, baseline, stack, progress, known, keep=True)
        plain = _plain_side(variant, stack, progress)
        before = ProcessorTimes.read()
        timed = [take_turns([variant, other, *plain], shape, progress) for shape in variant.shapes]
        asked = ask_in_turns(variant, other, spec.requests, progress) if spec.requests else []
        others = ProcessorTimes.read().others_since(before)
        measured = variant.measurement([ours for ours, *_ in timed], other, tuple(ours for ours, _ in asked))
        measured = replace(measured, roofline=None if plain else _roofline(served, measured, progress))
        reference = measured
        if other is not variant:
            reference = other.measurement([theirs for _, theirs, *_ in timed], loads=tuple(theirs for _, theirs in asked))
        gain = _gain(variant, plain, [speed for _, _, *speeds in timed for speed in speeds])
    comparison = Comparison(measured, reference, hardware_fingerprint(), gain, others)
    comparison.write(out)
    return comparison.metrics()


def _plain_side(variant: MeasuredVariant, stack: ExitStack, progress: Progress) -> list[MeasuredVariant]:
    """The same without speculation, where it has it."""
    if not speculates(variant.served):
        return []
    folder = stack.enter_context(without_speculation(variant.served))
    return [MeasuredVariant(variant.workload, folder, stack, progress)]


def _gain(variant: MeasuredVariant, plain: list[MeasuredVariant], speeds: list[Speed]) -> Plain | None:
    """What speculation is worth, once it has changed no text. speeds: without it, of all that is timed."""
    if not plain:
        return None
    texts, tokens_per_pass = variant.timed_texts()
    hold_same([ids for shape in variant.shapes for ids in variant.workload.prompts(shape)], texts, plain[0].timed_texts()[0])
    return Plain(tuple(speeds[: len(variant.workload.spec.batches)]), tokens_per_pass)


def _roofline(served: Path, measured: Measurement, progress: Progress) -> Roofline | None:
    """What tokens at batch 1 read, and what its threads, or its GPU, can read; None where memory is not the roof."""
    speed = next((speed for speed in measured.speeds if speed.batch_size == 1), None)
    read = bytes_read(served) if speed else None
    if speed is None or read is None:
        return None
    try:
        bandwidth = gpu_bandwidth_bytes_s() if measured.device == CUDA else memory_bandwidth_bytes_s(speed.threads)
    except StageError as error:  # a GPU that is full leaves no room to measure it
        progress.note(str(error))
        return None
    return Roofline(read.per_token(speed.prompt_tokens, speed.new_tokens), bandwidth)
