"""The check of a GPU machine: its processes, its bounds, its bundle, and that it forgets no stage and no engine."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from featherweight.recipe.reading import load_recipe
from featherweight.runtimes.catalog import RUNTIMES
from infra.gpu_check import bundle, comparing, failures
from infra.gpu_check.__main__ import chosen
from infra.gpu_check.checks import Check, checks
from infra.gpu_check.page import page
from infra.gpu_check.plans import ENGINES, STAGES, at, folder_of, plan_of
from infra.gpu_check.running import Result, Runner
from tasks.stages import STAGES as EVERY_STAGE


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def ran(folder: Path, *given: Check, seconds: float = 600) -> dict[str, Result]:
    return Runner(folder, 2, seconds, lambda _: None).run(given)


def test_no_check_stops_another(tmp_path: Path) -> None:
    found = ran(
        tmp_path,
        Check("crashes", python("import os; os.kill(os.getpid(), 11)")),
        Check("hangs", python("import time; time.sleep(60)"), limit_s=1),
        Check("refuses", python("import sys; print('why'); sys.exit(3)")),
        Check("behind", python("print(1)"), after=("crashes",)),
        Check("passes", python("""print('{"state": "ok", "found": "all well", "metrics": {"a": 1}}')""")),
        Check("absent", reason="no CUDA"),
    )
    assert {name: (result.state, result.found) for name, result in found.items()} == {
        "crashes": ("failed", "ended by SIGSEGV"),
        "hangs": ("failed", "stopped after its limit of 1 s"),
        "refuses": ("failed", "why"),
        "behind": ("not run", "crashes did not end well"),
        "passes": ("ok", "all well"),
        "absent": ("not run", "no CUDA"),
    }
    assert found["passes"].figures == {"a": 1}


def test_what_is_timed_runs_alone_and_last_and_too_late_is_said(tmp_path: Path) -> None:
    order: list[str] = []
    Runner(tmp_path, 2, 600, lambda result: order.append(result.name)).run(
        [Check("timed", python("print(1)"), alone=True), Check("other", python("import time; time.sleep(0.5)"))]
    )
    assert order == ["other", "timed"]
    late = ran(tmp_path, Check("late", python("print(1)")), seconds=-1)
    assert (late["late"].state, late["late"].found) == ("not run", "no time left")


def test_each_check_is_told_its_device(tmp_path: Path) -> None:
    found = ran(tmp_path, Check("cuda", python("import os; print(os.environ['FEATHERWEIGHT_DEVICE'])"), device="cuda"))
    assert found["cuda"].found == "cuda"


def test_every_stage_is_checked_and_every_engine_is_named(tmp_path: Path) -> None:
    names = [one.name for one in checks(tmp_path, cuda=True, speed=False)]
    stages = {node.stage for node in plan_of(STAGES).nodes.values()}
    assert stages == set(EVERY_STAGE) - {"load"}, "engines.yaml loads"
    assert {name.split()[0] for name in names if name.endswith("on cuda")} >= stages - {
        *("text", "gate", "export", "compile", "evaluate", "decide", "register", "promote")
    }
    recipe = load_recipe(at(ENGINES, tmp_path, tmp_path / "engines.yaml"))
    served = {spec.engine for spec in (*recipe.stages.compile.values(), *recipe.stages.export.values())}
    on_cpus = {"torch-static", "llama.cpp", "openvino", "tvm", "torch-aoti", "torchscript"}
    assert served == set(RUNTIMES) - on_cpus, "these compute on CPUs alone"


def test_without_cuda_each_says_so(tmp_path: Path) -> None:
    found = checks(tmp_path, cuda=False, speed=False)
    assert {one.reason for one in found if one.device == "cuda" or one.name.endswith("on cuda")} == {"no CUDA"}
    assert [one for one in found if one.reason is None]


@pytest.mark.slow
def test_weights_and_losses_are_held_to_their_bound(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    cpu, cuda = (folder_of(tmp_path, device, "rtn8") for device in ("cpu", "cuda"))
    for folder in (cpu, cuda):
        shutil.copytree(tiny_checkpoint, folder)
    assert comparing.weights_apart(cpu, cuda) == (0.0, 0.0)
    file = next(cuda.glob("*.safetensors"))
    weights = load_file(file)
    name = next(name for name in weights if "down_proj" in name)
    weights[name] *= 1.01
    save_file(weights, file, {"format": "pt"})
    differ, furthest = comparing.weights_apart(cpu, cuda)
    assert differ == pytest.approx(weights[name].numel() / sum(weight.numel() for weight in weights.values()), rel=1e-2)
    assert furthest == pytest.approx(0.01, rel=1e-2)
    rtn = plan_of(STAGES).nodes["rtn8"]
    assert comparing.bound_of(rtn) is comparing.EQUAL


def test_the_bundle_takes_the_lock_but_what_is_there_and_what_no_check_uses() -> None:
    lock = "torch==2.13.0  # via x\nPydantic_core==1 ; python_version > '3'\nruff==0.17\nnvidia-cublas==13\nctranslate2==4.8.5\n"
    assert bundle.lacking(lock, {"torch"}, ("bitsandbytes", "ctranslate2")) == [
        "Pydantic_core==1 ; python_version > '3'",
        "ctranslate2==4.8.5",
        "bitsandbytes",
    ]


def test_the_page_shows_what_failed_first() -> None:
    results = [Result("fine", "ok", "good", 1.0), Result("bad", "failed", "a | b", 2.0)]
    text = page("A card", ["said"], results)
    assert text.index("| bad |") < text.index("| fine |") and "a \\| b" in text and "- said" in text
    assert "1 ok, 1 failed, 0 not run" in text


def test_a_chosen_check_brings_what_it_needs() -> None:
    every = [Check("a"), Check("b", after=("a",)), Check("c", after=("b",)), Check("d")]
    assert [one.name for one in chosen(every, ["c"])] == ["a", "b", "c"]
    assert chosen(every, []) == every


@pytest.mark.parametrize(("found", "state"), [('{"a": 1.0, "b": 2.0}', "ok"), ('{"a": 1.0, "b": NaN}', "failed"), ("{}", "failed")])
def test_a_scan_that_is_no_number_fails(found: str, state: str, tmp_path: Path) -> None:
    for device, text in (("cpu", '{"a": 1.0, "b": 2.0}'), ("cuda", found)):
        folder = folder_of(tmp_path, device, "mix4+sensitivity")
        folder.mkdir(parents=True)
        (folder / "sensitivity.json").write_text(text)
    assert comparing.compared(plan_of(STAGES).nodes["mix4+sensitivity"], tmp_path)[0] == state


def test_what_the_bundle_leaves_out_skips_its_tests_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "LEFT_OUT", {"left_out"})
    with pytest.raises(pytest.skip.Exception, match="the bundle leaves out left_out"), failures._Skipping():
        raise ModuleNotFoundError(name="left_out")
    with pytest.raises(ModuleNotFoundError), failures._Skipping():
        raise ModuleNotFoundError(name="another")


def test_the_bundle_is_known_as_the_installed_package_is(tmp_path: Path) -> None:
    bundle._project(tmp_path / "project.tar.xz")
    with tarfile.open(tmp_path / "project.tar.xz") as packed:
        packed.extractall(tmp_path / "project", filter="data")
    (found,) = importlib.metadata.distributions(name="featherweight", path=[str(tmp_path / "project")])
    assert found.version == importlib.metadata.version("featherweight")
    assert {entry.name for entry in found.entry_points} >= {"featherweight"}
