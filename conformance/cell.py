"""One cell: a checkpoint is loaded, quantized or served, and held to transformers' eager float32."""

from __future__ import annotations

import pickle
import resource
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, cast

from conformance import vllm_client
from conformance.outcome import Outcome, bytes_of
from conformance.tiny import Case, make, write_text
from featherweight.errors import FeatherweightError, ParityError, StageError, ToolchainError, one_line
from featherweight.grid import GRIDS
from featherweight.model.architecture import eager_differs, task_of
from featherweight.model.matrices import in_float, matrices, rows_of
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.progress import Progress
from featherweight.runtimes import answer_parity, parity
from featherweight.runtimes.answer_parity import AnswerReference
from featherweight.runtimes.bounds import EXACT
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.generation_settings import BEAMS, GenerationSettings
from featherweight.runtimes.interface import Grids
from featherweight.runtimes.parity import Reference, continuation, load_reference
from featherweight.runtimes.writing import Source, refuse
from featherweight.spec import HEADED
from featherweight.store.served_folder import Serving
from tests.support.in_process import InProcess
from tests.support.notes import Notes

TOKENS, NEW = 128, 64
"""The served length, and how many tokens each text has."""
PROMPTS = (5, 40, TOKENS - NEW)
LOAD, QUANTIZE = "load", "quantize int8"
FLOAT, INT8 = "float32", "int8"
OPTIONS: dict[tuple[str, str], dict[str, str]] = {
    ("torchscript", INT8): {"precision": "int8"},
    ("ctranslate2", INT8): {"compute_type": "int8"},
    ("onnxruntime", INT8): {"precision": "int8"},
    ("onnxruntime-genai", INT8): {"precision": "int8"},
    ("llama.cpp", INT8): {"precision": "int8"},
    ("tvm", INT8): {"precision": "int8"},
    ("openvino", INT8): {"precision": "int8"},
    ("vllm", INT8): {"compute_type": "int8"},
}
SAME = {(engine, FLOAT) for engine in ("torch-dynamic", "torch-static", "torchao-int8", "torchao-int8-dynamic")}
"""What rounds floats to the very grid that the quantize stage has put the others on. (torchao-int4 rounds to one of its own.)"""
Rounded = tuple[str, str | None]
"""The grids of a quantized checkpoint: of its body, and of embedding and head."""
ROUNDED: Rounded = (INT8, INT8)
HELD: dict[str, Rounded] = {"vllm": (INT8, None), "llama.cpp": ("int8-g32", "int8-g32")}
"""The grids of 8 bits that an engine holds, where they are not those of the others."""
UNFUSED = {"onnxruntime": {"optimize": None}}
"""What an engine is told where it refuses what it does by default, and says so."""
MUCH = 0.1
"""The share of a model's matrices that may stay in float where it is called quantized."""
OTHER_ROUNDING = ("torch-static", "torch-dynamic", "torchao-int8-dynamic", "torchscript")
"""Engines that round activations by ranges of their own, so that the parity gate alone knows what they are to compute."""


@dataclass(frozen=True)
class Folders:
    """Where a case lies: as its owner has it, as it was loaded, quantized for each kind of engine; and its text."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    @property
    def text(self) -> Path:
        return self.root / "text"

    def quantized(self, grids: Rounded) -> Path:
        return self.root / f"{grids[0]}-{grids[1]}"

    def given(self, column: str) -> Path:
        """The checkpoint that an engine is given for `column`."""
        engine, _, form = column.rpartition(" ")
        return self.quantized(HELD.get(engine, ROUNDED)) if form == INT8 else self.checkpoint

    def source(self, column: str) -> str:
        """The digest of that checkpoint."""
        return bytes_of(self.given(column))


def columns() -> list[str]:
    """What is done with each checkpoint, in the order of the table."""
    return [LOAD, QUANTIZE, *(f"{engine} {form}" for engine in RUNTIMES for form in (FLOAT, INT8) if (engine, form) not in SAME)]


def found(work: Callable[[], Outcome]) -> Outcome:
    """What comes of `work`, its errors included."""
    began, spent = perf_counter(), _cpu_seconds()
    try:
        outcome = work()
    except ParityError as error:
        outcome = Outcome("refused", one_line(error), "by the gate")
    except ToolchainError as error:
        outcome = Outcome("not run", one_line(error))
    except FeatherweightError as error:
        outcome = Outcome("refused", one_line(error), "at export")
    except Exception as error:
        outcome = Outcome("defect", one_line(f"{type(error).__name__}: {error}", 300))
    return replace(outcome, seconds=round(perf_counter() - began, 1), cpu_seconds=round(_cpu_seconds() - spent, 2))


def _cpu_seconds() -> float:
    """Of this process, of those that it has waited for, and of the servers that were forked for it."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return process_time() + children.ru_utime + children.ru_stime + vllm_client.cpu_seconds()


def built(case: Case, folders: Folders) -> Outcome:
    """The checkpoint as its owner has it. One that this room cannot make is no fault of the product."""
    try:
        make(case, folders.model)
    except Exception as error:
        return Outcome("not run", one_line(f"no tiny model is made of it here ({type(error).__name__}: {error})", 200))
    write_text(folders.text, case.kind)
    return Outcome("exact")


def loaded(case: Case, folders: Folders) -> Outcome:
    """The load stage: what transformers computes of its folder is what it computes of the owner's."""
    from featherweight.checkpoint.spec import LoadSpec
    from tasks.load import load

    shutil.rmtree(folders.checkpoint, ignore_errors=True)
    folders.checkpoint.mkdir()
    load(LoadSpec(source=str(folders.model), task=case.task), out=folders.checkpoint)
    reference = _reference(load_reference(folders.model), folders.checkpoint, folders.text)
    keep(reference, folders.checkpoint)
    ours = _eager(load_reference(folders.checkpoint))
    return _figures(reference.hold_twin(ours, EXACT, "the loaded checkpoint"))


def quantized(_: Case, folders: Folders) -> Outcome:
    """The quantize stage: every weight within half a step of its own grid, and hardly any in float, or the stage says so."""
    for grids in HELD.values():
        _clear(folders.quantized(grids))  # `_give` makes them of this checkpoint
    told = Notes()
    _quantize(folders, ROUNDED, told)
    if (off := _steps_off(folders)) > 0.5 + 1e-3:
        return Outcome("defect", f"a weight is {off:.2f} steps from what it was; half a step is what rounding explains")
    share, most = _in_float(folders)
    if share <= MUCH:
        return Outcome("within bound")
    where = f"{share:.0%} of the matrices stay in float, {most} above all"
    said = any("stay in float" in note for note in told.notes)
    return Outcome("within bound", f"{where}, as the stage says") if said else Outcome("defect", f"{where}, and nothing says so")


def _steps_off(folders: Folders) -> float:
    """How far the weight that moved most is from the original, in steps of its grid."""
    kept = QuantizedWeights.read(folders.quantized(ROUNDED))
    if kept is None:
        raise StageError("the quantize stage left no quantized weights")
    off = 0.0
    for name, parameter, transposed in matrices(load_reference(folders.checkpoint)):
        if name in kept.q:
            moved = (kept.dequantize(name) - rows_of(parameter, transposed)).abs()
            off = max(off, (moved / kept.scales[name].clamp_min(1e-30)).max().item())
    return off


def _in_float(folders: Folders) -> tuple[float, str]:
    """The share of what is multiplied with activations that lies on no grid, and the name of the largest such weight.

    Tables of positions are looked up; convolutions and the like are small.
    """
    from torch import nn

    model, kept = load_reference(folders.checkpoint), QuantizedWeights.read(folders.quantized(ROUNDED))
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    multiplied = {name: one.numel() for name, one in model.named_parameters() if one.ndim > 1 and id(one) not in looked_up}
    rest = {name: count for name, count in in_float(model, kept).items() if name in multiplied} if kept else multiplied
    return sum(rest.values()) / sum(multiplied.values()), next(iter(rest), "")


def _quantize(folders: Folders, grids: Rounded, progress: Progress = Progress()) -> None:
    from featherweight.quantization.spec import QuantizeSpec
    from tasks.quantize import quantize

    out = folders.quantized(grids)
    _clear(out)
    out.mkdir()
    spec = QuantizeSpec.of(method="rtn", grid=grids[0], head=grids[1], samples=2, sequence=32)
    text = {"text": folders.text, "calibration": folders.text}
    quantize(spec, checkpoint=folders.checkpoint, **text, out=out, progress=progress)
    keep(_reference(load_reference(out), out, folders.text), out)


def _clear(out: Path) -> None:
    """Delete a quantized checkpoint, and what is to be compared with it."""
    shutil.rmtree(out, ignore_errors=True)
    out.with_suffix(".reference").unlink(missing_ok=True)


def planned(case: Case, folders: Folders, columns: list[str]) -> dict[str, dict[str, Any] | None]:
    """What is refused, not offered or not to be run of each column, before any work; None of what is to be served."""
    outcomes = {column: _asked_of_the_plan(case, folders, column) for column in columns}
    return {column: None if outcome is None else asdict(outcome) for column, outcome in outcomes.items()}


def _asked_of_the_plan(case: Case, folders: Folders, column: str) -> Outcome | None:
    """A plan that stops with an error of its own is a defect as any other is."""
    try:
        return _refused(case, folders, column)
    except Exception as error:
        return Outcome("defect", one_line(f"the plan: {type(error).__name__}: {error}", 300), "before work")


def served(case: Case, folders: Folders, engine: str, form: str) -> Outcome:
    """What an engine makes of it: refused before anything is written, or written, held by the product's gate, and by ours."""
    column = f"{engine} {form}"
    if refused := _refused(case, folders, column):
        return refused
    return _held(*_taken(folders, column), folders.root / f"{engine}-{form}")


def _taken(folders: Folders, column: str) -> tuple[Any, Any, Source]:
    """What `_asked` tells, of the first of an engine's ways that its plan does not refuse; of the last where it refuses all."""
    runtime, spec, source = _asked(folders, column)
    if runtime.name not in UNFUSED:
        return runtime, spec, source
    try:
        refuse(runtime, spec, source)
    except FeatherweightError:
        return _asked(folders, column, UNFUSED[runtime.name])
    return runtime, spec, source


def _asked(folders: Folders, column: str, told: Mapping[str, Any] | None = None) -> tuple[Any, Any, Source]:
    """The runtime, what a recipe says to it, and what it is to write."""
    engine, _, form = column.rpartition(" ")
    runtime, checkpoint = RUNTIMES[engine], folders.given(column)
    keys = {**OPTIONS.get((engine, form), {}), **(told or {})}
    spec = runtime.spec.model_validate({"engine": engine, "max_tokens": TOKENS, **keys})
    return runtime, spec, Source(checkpoint, folders.text, QuantizedWeights.read(checkpoint), 0, Progress(), TOKENS)


def _refused(case: Case, folders: Folders, column: str) -> Outcome | None:
    """Why a column is not served, as far as the plan knows."""
    engine, _, form = column.rpartition(" ")
    body, head = HELD.get(engine, ROUNDED)
    grids = Grids(GRIDS[body], GRIDS[head] if head else None) if form == INT8 else Grids()
    runtime, spec, source = _asked(folders, column)
    if reason := runtime.task_refusal(case.task) or runtime.grid_refusal(grids, spec):
        return Outcome("not offered", reason)
    if reason := runtime.missing():
        return Outcome("not run", reason)
    try:
        if form == INT8 and not source.checkpoint.with_suffix(".reference").exists():
            refuse(runtime, spec, replace(source, checkpoint=folders.checkpoint, quantized=None))
            _give(folders, column)
        if not source.checkpoint.with_suffix(".reference").exists():
            return Outcome("refused", "the quantize stage refuses this checkpoint", "before work")
        refuse(*_taken(folders, column))
    except FeatherweightError as error:
        return Outcome("refused", one_line(error), "before work")
    return None


def _give(folders: Folders, column: str) -> None:
    """The checkpoint on the grid that an engine holds, which is made once an engine does not refuse the model as it is."""
    if folders.quantized(ROUNDED).with_suffix(".reference").exists():
        _quantize(folders, HELD.get(column.rpartition(" ")[0], ROUNDED))


def _held(runtime: Any, spec: Any, source: Source, out: Path) -> Outcome:
    for gate in (parity, answer_parity):
        vars(gate)["open_worker"] = opened  # this process is the cell's own: no other one is needed
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    checkpoint, grid = source.checkpoint, source.grid
    runtime.write(spec, source, out)
    rounded_here = source.grid != grid
    reference = _reference(source.model.float(), checkpoint, source.calibration) if rounded_here else kept(checkpoint)
    vouched = dict(runtime.check(spec, source, out))
    replace(Serving.read(out), max_tokens=TOKENS).write(out)
    measured = vouched if spec.engine in OTHER_ROUNDING and Serving.read(out).grid else dict(reference.check(out))
    reason = _answers_otherwise(reference, checkpoint, out)
    _engine(out).close()
    shutil.rmtree(out)
    return Outcome("defect", reason) if reason else _figures(measured)


def keep(reference: Reference, folder: Path) -> None:
    """For the cells of a checkpoint, whose processes are others."""
    folder.with_suffix(".reference").write_bytes(pickle.dumps(reference))


def kept(folder: Path) -> Reference:
    """What `keep` kept."""
    return cast(Reference, pickle.loads(folder.with_suffix(".reference").read_bytes()))


def _reference(model: Any, checkpoint: Path, text: Path) -> Reference:
    """What transformers' eager attention says of `model`, and the three texts that it writes."""
    usual = [(config, config._attn_implementation) for config in _configs(model)]
    kind = AnswerReference if task_of(model.config) in HEADED else Reference
    reference = kind.of(_eager(model), checkpoint, text, TOKENS)
    if reference.continuations:
        longest = reference.windows[0].source or reference.windows[0].ids
        texts = [continuation(model, longest[:length], NEW) for length in PROMPTS]
        reference = replace(reference, continuations=texts)
    for config, implementation in usual:
        config._attn_implementation = implementation
    return reference


def _eager(model: Any) -> Any:
    """The model with the attention that transformers writes out in PyTorch, in every stack, where that is the model's."""
    if not eager_differs(model.config):
        for config in _configs(model):
            config._attn_implementation = "eager"
    return model


def _configs(model: Any) -> list[Any]:
    """Of the model and of its stacks, which `set_attn_implementation` leaves out."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation")}.values())


def _answers_otherwise(reference: Reference, checkpoint: Path, out: Path) -> str | None:
    """Why the served answers are not the engine's own texts, cut where the checkpoint's settings end them; None where they are.

    Without the beams of the settings: the engine's own texts are greedy.
    """
    settings, engine = GenerationSettings.read(checkpoint), opened(out)
    asked = {name: value for name, value in settings.values.items() if name not in BEAMS}
    for one in reference.continuations:
        written, answer = engine.generate([one.prompt], NEW)[0], engine.answer([one.prompt], NEW, asked)[0]
        wanted = settings.cut(written, NEW)
        if answer != wanted:
            return f"it answers {len(one.prompt)} tokens with {len(answer)} tokens where its text ends after {len(wanted)}"
    return None


def _figures(metrics: Any) -> Outcome:
    largest, mean = float(metrics.get("parity_max_abs", 0.0)), float(metrics.get("parity_mean_abs", 0.0))
    return Outcome("exact" if largest <= EXACT.value else "within bound", max_nats=largest, mean_nats=mean)


@cache
def _engine(served: Path) -> InProcess:
    """An engine that stays open while its cell lasts: some take most of a minute to start."""
    kind = ForkedServer if Serving.read(served).engine == "vllm" and vllm_client.is_forking() else InProcess
    return kind(served, 1, TOKENS, 1)


def opened(served: Path, **_: Any) -> Borrowed:
    """In the place of `open_worker`: the process of a cell is the engine's already."""
    return Borrowed(_engine(served))


class ForkedServer(InProcess):
    """vLLM's own server, forked from one that has been imported."""

    loaded = vllm_client.ForkedVllm


class Borrowed:
    """An engine that is not closed by whoever borrows it."""

    def __init__(self, engine: InProcess) -> None:
        self.score, self.generate, self.answer, self.outputs = engine.score, engine.generate, engine.answer, engine.outputs

    def __enter__(self) -> Borrowed:
        return self

    def __exit__(self, *_: object) -> None:
        pass
