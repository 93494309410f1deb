"""Cache keys by slices of code: what can change a node's result changes its key, and nothing else does."""

from __future__ import annotations

import ast
import random
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from featherweight.checkpoint.spec import LoadSpec
from featherweight.distillation.spec import DistillSpec
from featherweight.pruning.spec import PruneSpec
from featherweight.quantization.spec import QuantizeSpec, SensitivitySpec
from featherweight.recipe.plan import Node
from featherweight.spec import Spec
from featherweight.text.documents import Document, write_documents
from featherweight.training.spec import FinetuneSpec, LoraSpec
from tasks import cache_key, code_slice
from tasks.code_slice import INERT, OURS, SILENT, slice_of
from tasks.stages import stage_named
from tests.conftest import STORY
from tests.support.cache_keys import forget
from tests.support.paths import ROOT

METHODS: dict[str, Spec] = {
    "rtn": QuantizeSpec.of(),
    "gptq": QuantizeSpec.of(method="gptq"),
    "awq": QuantizeSpec.of(method="awq"),
    "smoothquant": QuantizeSpec.of(method="smoothquant"),
    "rtn after awq": QuantizeSpec.of(smooth="awq"),
    "autoround": QuantizeSpec.of(method="autoround"),
    "qat": QuantizeSpec.of(method="qat"),
    "qat from rtn": QuantizeSpec.of(method="qat", start="rtn"),
    "structured": PruneSpec.of(),
    "depth": PruneSpec.of(method="depth"),
    "width": PruneSpec.of(method="width"),
    "attention": PruneSpec.of(method="attention", kv_heads=1),
    "sparse": PruneSpec.of(method="sparse"),
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the project, which keys are computed from."""
    for name in OURS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    real = code_slice.root_of
    monkeypatch.setattr(code_slice, "root_of", lambda top: tmp_path / top / "__init__.py" if top in OURS else real(top))
    forget()
    yield tmp_path
    forget()


def key(name: str) -> str:
    spec = METHODS[name]
    return stage_named(stage_of(spec)).key(node(spec), {})


@cache
def unedited() -> dict[str, str]:
    """The keys of all methods; every test begins with the same tree."""
    return {name: key(name) for name in METHODS}


def changed_by(tree: Path, file: str, old: str, new: str) -> set[str]:
    """Names of the methods whose keys an edit changes."""
    path = tree / file
    before, text = unedited(), path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    forget()
    return {name for name, old_key in before.items() if key(name) != old_key}


PRUNED = {"structured", "depth", "width", "attention", "sparse"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("quantization/awq.py", "mappings = [", "mappings = 1 * [", {"awq", "rtn after awq"}),
        ("quantization/gptq.py", "bypass_divisibility_checks=True", "bypass_divisibility_checks=False", {"gptq", "qat"}),
        ("quantization/smoothquant.py", "STRENGTH = 0.5", "STRENGTH = 0.6", {"smoothquant"}),
        ("quantization/qat.py", "EDGE = 0.49", "EDGE = 0.4", {"qat", "qat from rtn"}),
        # Helpers: of a method that llm-compressor runs, two modules away; of what every quantization rounds with; of all.
        (
            "model/blockwise.py",
            "\nBATCH = 8",
            "\nBATCH = 9",
            {"gptq", "qat", "awq", "rtn after awq", "smoothquant", "autoround", "sparse"},
        ),
        ("quantization/autoround.py", "\nHALF = 0.5", "\nHALF = 0.4", {"autoround"}),
        ("quantization/channels.py", "if place else", "if not place else", {"awq", "rtn after awq", "smoothquant"}),
        ("pruning/block_influence.py", "(1 - total", "(2 - total", {"depth"}),
        ("pruning/importance.py", "power = 1", "power = 3", {"structured", "width"}),
        ("quantization/interface.py", "for name, tensor in tensors", "for name, tensor in list(tensors)", METHODS.keys() - PRUNED),
        # What is told, refused and reckoned is in no key.
        ("quantization/gptq.py", "GPTQ makes rounding errors", "GPTQ mends rounding errors", set()),
        ("quantization/gptq.py", "Calibrate the Linear weights", "Docstrings calibrate nothing", set()),
        ("quantization/interface.py", "holds no linear layer", "is without a linear layer", set()),
        ("quantization/rtn.py", '"""Round the checkpoint', '"""Move the checkpoint', set()),
        ("quantization/qat.py", "(8.0 if spec.distill", "(9.0 if spec.distill", set()),
        ("pruning/depth.py", "raise prune.ratio, or give prune.layers", "raise the ratio", set()),
        ("quantization/catalog.py", '        "rtn": ', '        "other": "featherweight.other:OTHER",\n        "rtn": ', set()),
        ("quantization/smoothing.py", "def smoothed(", "# why\ndef smoothed(", set()),
        ("recipe/refusals.py", "layers of one shape", "equal layers", set()),
    ],
    ids=lambda value: value.replace("/", "-") if isinstance(value, str) and value.endswith(".py") else "",
)  # fmt: skip
def test_an_edit_changes_the_keys_of_what_it_can_change(tree: Path, file: str, old: str, new: str, changed: set[str]) -> None:
    assert changed_by(tree, f"featherweight/{file}", old, new) == set(changed)


PACKAGE = {
    "__init__.py": "from pieces.deep import told as retold\n",
    "deep.py": "import math\nLIMIT = 3\ndef told(x): return LIMIT * x\ndef other(x): return 1\n",
    "more/__init__.py": "",
    "more/inner.py": "def a(): return 1\ndef b(): return 2\ndef c(): return 3\n",
    "typed.py": "class Only: x = 1\n",
    "late.py": "def run(): return 7\nclass Loaded: y = 1\n",
    "effect.py": "TABLE = {}\nTABLE.update(x=1)\ndef get(): return TABLE\n",
    "stars.py": "from pieces.more.inner import *\n",
    "main.py": """
from __future__ import annotations
import pieces.more.inner as inner
import pieces.deep
from typing import TYPE_CHECKING
from pieces import retold, effect
from pieces.stars import c as third
if TYPE_CHECKING:
    from pieces.typed import Only
STRING = "pieces.late:Loaded"
def alias(): return inner.a()
def dotted(): return pieces.deep.other(1)
def reexported(x: Only) -> Only: return retold(x)
def inside():
    from pieces.more import inner as mine
    return mine.b()
def shadowed(inner): return inner.a()
def comprehended(): return [inner for inner in ()], inner.b()
def whole(): return getattr(inner, "a")()
def starred(): return third()
def effects(): return effect.get()
def named(): return STRING
def unknown(): return inner.missing()
def nested():
    def told(): return inner.a()
    return told
@alias
class Decorated(effect.Base):
    field: third = 1
    def method(self): return dotted()
    def refusal(self): return inner.b()
try:
    import fast
except ImportError:
    fast = None
def optional(): return fast
def refusing(): return inner.b()
def asks():
    if refusing(): raise ValueError(inner.c())
""",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in PACKAGE.items():
        path = tmp_path / "pieces" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield tmp_path / "pieces"
    forget()


@pytest.mark.parametrize(
    ("entry", "reached"),
    [
        ("alias", {"more.inner:a"}),
        ("dotted", {"deep:other"}),
        ("reexported", {"deep:told", "deep:LIMIT"}),
        ("inside", {"more.inner:b"}),
        ("shadowed", set()),
        ("comprehended", {"more.inner:b"}),
        ("whole", {"more.inner:a", "more.inner:b", "more.inner:c"}),
        ("starred", {"more.inner:c"}),
        ("effects", {"effect:get", "effect:TABLE", "effect:"}),
        ("named", {"main:STRING", "late:Loaded"}),
        ("unknown", {"more.inner:a", "more.inner:b", "more.inner:c"}),
        ("nested", {"more.inner:a"}),
        (
            "Decorated",
            {"main:alias", "main:dotted", "more.inner:a", "more.inner:c", "deep:other", "effect:get", "effect:TABLE", "effect:"},
        ),
        ("optional", {"main:fast"}),
        ("asks", set()),
        ("gone", {f"main:{name}" for name in ("alias", "dotted", "asks")}),
    ],
)
def test_a_slice_follows_names_through_modules(package: Path, entry: str, reached: set[str]) -> None:
    found = {place.removeprefix("pieces.") for place in slice_of(f"pieces.main:{entry}")} - {f"main:{entry}"}
    assert found >= reached if entry == "gone" else found == reached


def executed(call: Callable[[], Any]) -> set[CodeType]:
    """The code that runs while `call` does, in every thread."""
    seen: set[CodeType] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            seen.add(frame.f_code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return seen


@cache
def statements(path: str) -> list[tuple[int, int, str]]:
    """(first line, last line, name) of every definition of a file."""
    found = []
    for one in ast.parse(Path(path).read_text()).body:
        first = min([one.lineno, *(decorator.lineno for decorator in getattr(one, "decorator_list", ()))])
        names = code_slice.bound_names(one) or {code_slice.EFFECTS}
        found += [(first, one.end_lineno or first, name) for name in names]
    return found


def places(codes: set[CodeType]) -> set[str]:
    """The project's definitions that the codes belong to, what only refuses or tells aside."""
    found = set()
    for code in codes:
        path = Path(code.co_filename)
        ours = path.suffix == ".py" and path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in OURS
        if not ours or code.co_name == "<module>":
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module in INERT or any(SILENT.fullmatch(part) for part in code.co_qualname.split(".")):
            continue
        found |= {f"{module}:{name}" for first, last, name in statements(str(path)) if first <= code.co_firstlineno <= last}
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_documents(folder, [Document(str(place), f"{place} {STORY}") for place in range(12)])
    return folder


SHORT = {"samples": 4, "sequence": 16}
TRAINED: dict[str, Any] = {"steps": 2, "batch": 2, "sequence": 16}
RUN: dict[str, Spec] = {
    "rtn": QuantizeSpec.of(**SHORT),
    "gptq": QuantizeSpec.of(method="gptq", **SHORT),
    "awq": QuantizeSpec.of(method="awq", **SHORT),
    "autoround": QuantizeSpec.of(method="autoround", steps=2, **SHORT),
    "qat": QuantizeSpec.of(method="qat", generated_tokens=32, steps=2, batch=2, **SHORT),
    "structured": PruneSpec.of(ratio=0.5, **SHORT),
    "sparse": PruneSpec.of(method="sparse", criterion="sparsegpt", **SHORT),
    "distill": DistillSpec(layers=1, choose="block_influence", hidden_weight=0.5, attention_weight=0.5, **TRAINED),
    "finetune": FinetuneSpec(evaluate_every=1, lora=LoraSpec(rank=2), **TRAINED),
    "sensitivity": SensitivitySpec(grid="int4-g32", head=None, finer="int8", scale="mse", **SHORT),
    "load": LoadSpec(source="checkpoint"),
}
STAGES: dict[type[Spec], str] = {
    QuantizeSpec: "quantize",
    PruneSpec: "prune",
    DistillSpec: "distill",
    FinetuneSpec: "finetune",
    SensitivitySpec: "sensitivity",
    LoadSpec: "load",
}


def ran_by(name: str, checkpoint: Path, text: Path, out: Path) -> set[str]:
    """The places of the code that a stage runs on the spec of that name."""
    spec = RUN[name]
    if isinstance(spec, LoadSpec):
        spec, inputs = spec.model_copy(update={"source": str(checkpoint)}), dict[str, Path]()
    else:
        inputs = {"checkpoint": checkpoint, "calibration": text}
    if isinstance(spec, QuantizeSpec | DistillSpec | FinetuneSpec):
        inputs["text"] = text
    stage = stage_named(stage_of(spec))
    found = places(executed(lambda: stage.function(spec, out=out, **inputs)))
    assert len(found) > 20
    return found


def stage_of(spec: Spec) -> str:
    return next(stage for kind, stage in STAGES.items() if isinstance(spec, kind))


def node(spec: Spec) -> Node:
    return Node("n", stage_of(spec), "n", spec)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_no_code_that_a_stage_runs_is_outside_its_key(name: str, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    ran, function = ran_by(name, tiny_checkpoint, text, tmp_path), stage_named(stage_of(RUN[name])).function
    known = {place for reference in cache_key.code_references(function, node(RUN[name])) for place in slice_of(reference)}
    assert not ran - known


@pytest.mark.slow
def test_a_mutation_of_what_a_stage_runs_changes_its_key(tree: Path, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    ran = sorted(ran_by("gptq", tiny_checkpoint, text, tmp_path / "out"))
    stage, before = stage_named("quantize"), stage_named("quantize").key(node(RUN["gptq"]), {})
    for place in random.Random(0).sample(ran, 8):
        module, _, name = place.partition(":")
        path = tree / (module.replace(".", "/") + ".py")
        text_before = path.read_text()
        path.write_text(mutated(text_before, name))
        forget()
        assert stage.key(node(RUN["gptq"]), {}) != before, place
        path.write_text(text_before)
    forget()
    assert stage.key(node(RUN["gptq"]), {}) == before


def mutated(source: str, name: str) -> str:
    """The module with one more statement in the first function of the definition `name`."""
    module = ast.parse(source)
    (found,) = [one for one in module.body if name in code_slice.bound_names(one)]
    functions = [one for one in ast.walk(found) if isinstance(one, ast.FunctionDef) and not SILENT.fullmatch(one.name)]
    functions[0].body.append(ast.parse("1 + 1").body[0])
    return ast.unparse(module)
