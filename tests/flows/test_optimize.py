"""The main job end to end, through the command line, on every engine; then what its user does with the result."""

from __future__ import annotations

import html
import inspect
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from featherweight.errors import GateError
from featherweight.recipe.reading import load_recipe
from featherweight.registry.remeasurement import Remeasurement
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.store.workspace import Workspace
from flows.remeasure import rebuilt
from tests.support.command import COMMAND, command_here, featherweight
from tests.support.paths import TINY_RECIPE

pytestmark = [pytest.mark.engine, pytest.mark.server, pytest.mark.slow]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny recipe has run; `result.json` holds what it printed."""
    folder = tmp_path_factory.mktemp("optimize")
    finished = featherweight("optimize", str(TINY_RECIPE), "--json", cwd=folder)
    assert finished.returncode == 0, finished.stderr
    (folder / "result.json").write_text(finished.stdout)
    (folder / "progress.txt").write_text(finished.stderr)
    return folder


@pytest.fixture
def result(done: Path) -> dict:
    return json.loads((done / "result.json").read_text())


def test_every_variant_is_measured_on_its_engine(result: dict) -> None:
    rows = {row["name"]: row for row in result["variants"]}
    assert rows["two/half/qat4/ct2-int8"]["status"] == "ruled-out"
    engines = {row["engine"] for row in rows.values() if row["status"] in ("winner", "loser", "baseline")}
    assert {"torch", "onnxruntime-genai", "ctranslate2"} <= engines
    if RUNTIMES["vllm"].missing() is None:
        assert rows["two/half/vllm"]["status"] in ("winner", "loser"), rows["two/half/vllm"]["reason"]
    for row in rows.values():
        if row["status"] in ("winner", "loser"):
            metrics = row["metrics"]
            assert metrics["quality_change_low"] <= metrics["quality_change"] <= metrics["quality_change_high"]
            assert metrics["speedup_1"] > 0
            assert metrics["tokens_per_s_2"] > 0
            assert metrics["peak_memory_bytes"] > 1e6
            assert row["threads"]


def test_float_exports_compute_what_pytorch_computes(result: dict) -> None:
    rows = {row["name"]: row for row in result["variants"]}
    assert abs(rows["ct2"]["metrics"]["quality_change"]) < 1e-4
    assert rows["ct2"]["metrics"]["parity"] < 1e-3


def noted(row: dict) -> list[str]:
    """What is said of a variant, whatever else the machine does while tests run."""
    return [note for note in row["notes"] if not note.startswith("other programs")]


def test_a_sparse_variant_keeps_its_zeros_and_says_what_they_are_worth(done: Path, result: dict) -> None:
    row = next(row for row in result["variants"] if row["name"] == "sparse24/ct2")
    assert row["metrics"]["zero_share"] == 0.5
    assert row["metrics"]["parity"] < 1e-3
    (note,) = noted(row)
    assert note.startswith("50 % of the pruned weights are zero; ctranslate2 stores and multiplies them all: no gain")
    dense = next(row for row in result["variants"] if row["name"] == "ct2")
    assert row["metrics"]["size_bytes"] == pytest.approx(dense["metrics"]["size_bytes"], rel=0.01)
    assert note in html.unescape((done / "report.html").read_text())
    assert f"sparse24/ct2: {note}" in command_here("variants", cwd=done).stdout


def test_the_report_tells_a_method_from_rounding_to_nearest(done: Path, result: dict) -> None:
    rows = {row["name"]: row for row in result["variants"]}
    (note,) = noted(rows["gptq8/ct2-int8"])
    assert re.fullmatch(r"gptq8: a loss of \S+ nats on the calibration text, \S+ by rounding to nearest, \S+ in float", note)
    assert note in html.unescape((done / "report.html").read_text())


def test_the_winner_is_promoted_and_each_loser_has_a_reason(done: Path, result: dict) -> None:
    assert result["winner"]
    assert all(row["reason"] for row in result["variants"] if row["status"] not in ("winner", "baseline"))
    told = command_here("lineage", "tiny@champion", "--verify", "--json", cwd=done)
    assert told.returncode == 0, told.stderr
    lineage = json.loads(told.stdout)
    assert lineage["graph"]["variant"] == result["winner"]
    assert {verdict["state"] for verdict in lineage["verdicts"]} == {"ok"}
    stages = {node["stage"] for node in lineage["graph"]["nodes"]}
    assert {"text", "train", "evaluate", "decide"} <= stages
    row = next(row for row in result["variants"] if row["status"] == "winner")
    assert lineage["graph"]["reason"] == row["reason"]
    (decision,) = (node for node in lineage["graph"]["nodes"] if node["stage"] == "decide")
    assert decision["parents"].keys() == {row["name"] for row in result["variants"] if row["metrics"]}


def test_it_leaves_records_of_registration_and_promotion(done: Path, result: dict) -> None:
    nodes = {node["id"]: node for node in result["nodes"]}
    assert [nodes[id]["status"] for id in ("decide", "register", "promote")] == ["done"] * 3
    client = Workspace.at(done / ".featherweight").client()
    with tempfile.TemporaryDirectory() as folder:
        records = [
            json.loads(Path(client.download_artifacts(nodes[id]["run_id"], f"artifact/{name}.json", folder)).read_text())
            for id, name in (("register", "registered"), ("promote", "promoted"))
        ]
    (version,) = client.search_model_versions("name='tiny'")
    registered, promoted = records
    assert (registered["version"], registered["uri"], registered["new"]) == (str(version.version), "models:/tiny/1", True)
    assert registered["digest"] == version.tags["featherweight.digest"]
    assert (promoted["stage"], promoted["changed"]) == ("production", True)
    assert [gate["gate"] for gate in promoted["gates"]] == ["max_quality_loss", "champion", "smoke"]
    assert promoted["gates"][0]["value"] <= promoted["gates"][0]["bound"] == 5.0


def test_it_says_what_it_does(done: Path) -> None:
    lines = (done / "progress.txt").read_text().splitlines()
    assert any("start" in line and "checkpoint" in line for line in lines)
    assert any("winner:" in line for line in lines)


@pytest.mark.usefixtures("named_prefect")
def test_the_second_run_recomputes_nothing(done: Path, result: dict) -> None:
    again = command_here("optimize", str(TINY_RECIPE), "--json", cwd=done)
    assert again.returncode == 0, again.stderr
    second = json.loads(again.stdout)
    acting = {"register", "promote"}
    assert {node["status"] for node in second["nodes"] if node["id"] not in acting} <= {"cached", "skipped"}
    assert {node["status"] for node in second["nodes"] if node["id"] in acting} == {"done"}
    assert second["registered"] == "registered as tiny version 1, in production (version 1 is in production already)"
    assert second["winner"] == result["winner"]
    versions = Workspace.at(done / ".featherweight").client().search_model_versions("name='tiny'")
    assert len(versions) == 1


@pytest.mark.usefixtures("named_prefect")
def test_where_every_variant_fails_nothing_is_registered(done: Path) -> None:
    hot = ["--set", "stages.prune.half.finetune.learning_rate=1e9", "--set", "variants=[{prune: half, serve: ct2}]"]
    failed = command_here("optimize", str(TINY_RECIPE), *hot, "--json", cwd=done)
    assert failed.returncode == 5
    assert failed.stderr.splitlines()[-1].startswith("featherweight: no variant was made, and nothing registered")
    told = json.loads(failed.stdout)
    rows = {row["name"]: row for row in told["variants"]}
    assert told["winner"] is None and told["registered"] == ""
    assert rows["half/ct2"]["status"] == "failed" and "diverged" in rows["half/ct2"]["reason"]
    assert {node["id"]: node["status"] for node in told["nodes"]}["register"] == "done"
    assert len(Workspace.at(done / ".featherweight").client().search_model_versions("name='tiny'")) <= 1


@pytest.mark.usefixtures("named_prefect")
def test_where_no_variant_keeps_the_constraints_nothing_is_registered(done: Path) -> None:
    strict = ["--set", "constraints.max_size_bytes=1", "--set", "promote.model=strict", "--set", "variants=[{serve: ct2}]"]
    ended = command_here("optimize", str(TINY_RECIPE), *strict, "--json", cwd=done)
    assert ended.returncode == 8, ended.stderr
    assert "no variant keeps the constraints" in ended.stderr.splitlines()[-1]
    assert json.loads(ended.stdout)["registered"] == ""
    assert not Workspace.at(done / ".featherweight").client().search_registered_models("name='strict'")


def test_the_champion_measured_again_is_what_it_was(done: Path) -> None:
    """Its windows to the last bit; of the clock nothing is asked."""
    ended = command_here("remeasure", "tiny", "--json", cwd=done)
    told = json.loads(ended.stdout)
    assert {one["what"] for one in told["drifts"]} <= {"speed"}
    assert ended.returncode == (8 if told["drifts"] else 0), ended.stderr
    assert told["now"]["bits_per_byte"] == told["then"]["bits_per_byte"]
    assert (told["otherwise"], told["same_machine"], told["text"]) == ({}, True, "")
    run = Workspace.at(done / ".featherweight").client().get_run(told["run"])
    assert (run.info.status, run.data.tags["featherweight.kind"]) == ("FINISHED", "remeasurement")
    assert run.data.tags["featherweight.model"] == "tiny/1"
    assert run.data.metrics["bits_per_byte"] == told["now"]["bits_per_byte"]


@pytest.mark.usefixtures("named_prefect")
def test_on_text_of_another_kind_it_has_drifted(done: Path) -> None:
    """By the flow that a schedule runs, which fails then."""
    from flows.remeasure_schedule import remeasure_flow

    words = [" ".join(f"zq{(place * 7919 + word * 104729) % 99991:x}vj~" for word in range(90)) for place in range(12)]
    (done / "fresh.txt").write_text("\n\n".join(words))
    with pytest.raises(GateError, match=r"version 1 of 'tiny' has drifted.*text: bits per byte of the untouched checkpoint \+"):
        remeasure_flow("tiny", str(done / "fresh.txt"), workspace=str(done / ".featherweight"))


def test_a_rebuild_is_of_the_versions_own_recipe_on_the_fresh_text(done: Path) -> None:
    workspace, asked = Workspace.at(done / ".featherweight"), []

    def run(recipe: Path, overrides: list[str]) -> str:
        asked.append(load_recipe(recipe, tuple(overrides)))
        return "registered as tiny version 1"

    found = rebuilt(workspace, Remeasurement("tiny", "1", "fresh text.txt", {}, {}, {}, True, ()), run)
    assert (found.rebuilt, found.replaced) == ("registered as tiny version 1", False)
    (recipe,) = asked
    assert (recipe.name, recipe.data.evaluation, recipe.promote.model) == ("tiny", "fresh text.txt", "tiny")


def test_plan_knows_what_is_cached(done: Path) -> None:
    shown = json.loads(command_here("plan", str(TINY_RECIPE), "--json", cwd=done).stdout)
    assert {node["basis"] for node in shown["nodes"]} <= {"cached", "measured", "estimated"}
    # a toolchain that is not here costs two, the registration and the promotion are done each time
    assert sum(node["basis"] == "cached" for node in shown["nodes"]) >= len(shown["nodes"]) - 4
    assert [node["id"] for node in shown["nodes"]][-3:] == ["decide", "register", "promote"]


LIGHT_PLAN = """
import sys
from flows import cli
sys.argv = ["featherweight", "plan", sys.argv[1], "--json"]
try:
    cli.main()
finally:
    print(*{"mlflow", "numpy", "prefect", "torch"} & sys.modules.keys(), file=sys.stderr)
"""


def test_what_is_cached_is_known_without_prefect_and_mlflow(done: Path) -> None:
    """Prefect's results are read as Prefect itself reads them, here in the test's process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_TRACKING"))}
    command = [sys.executable, "-c", LIGHT_PLAN, str(TINY_RECIPE)]
    seen = subprocess.run(command, cwd=done, env=environment, capture_output=True, text=True, timeout=300)
    theirs = json.loads(command_here("plan", str(TINY_RECIPE), "--json", cwd=done).stdout)
    assert (seen.returncode, seen.stderr.strip()) == (0, "")
    assert [node["basis"] for node in json.loads(seen.stdout)["nodes"]] == [node["basis"] for node in theirs["nodes"]]


def test_mlflow_holds_the_runs_the_variants_and_the_report(done: Path, result: dict) -> None:
    client = Workspace.at(done / ".featherweight").client()
    run = client.get_run(result["runs"]["mlflow"])
    assert {"report.html", "result.json", "recipe.yaml", "plan.json"} <= {f.path for f in client.list_artifacts(run.info.run_id)}
    nested = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
    assert {"train", "prune", "quantize", "evaluate", "gate"} <= {r.data.tags["featherweight.stage"] for r in nested}
    models = client.search_logged_models([run.info.experiment_id])
    assert {"baseline", "ct2"} <= {model.name for model in models}


def test_prefect_shows_stage_variant_and_method(done: Path) -> None:
    with sqlite3.connect(done / ".featherweight" / "prefect" / "prefect.db") as prefect:
        names = {name for (name,) in prefect.execute("select name from task_run")}
    assert {"gptq8 [quantize gptq int8]", "gptq8/ort8 [compile onnxruntime-genai int8]", "two [distill]"} <= names


def test_the_command_line_runs_the_flow_that_deployments_run(done: Path) -> None:
    from flows.optimize import optimize_flow

    with sqlite3.connect(done / ".featherweight" / "prefect" / "prefect.db") as prefect:
        query = "select flow.name, flow_run.parameters from flow join flow_run on flow_run.flow_id = flow.id"
        runs = [(name, json.loads(parameters)) for name, parameters in prefect.execute(query)]
    assert {name for name, _ in runs} == {"optimize"}
    assert {parameters["recipe"] for _, parameters in runs} == {str(TINY_RECIPE)}
    assert all(parameters.keys() <= set(inspect.signature(optimize_flow.fn).parameters) for _, parameters in runs)


def test_the_champion_answers(done: Path) -> None:
    script = (
        "import mlflow; model = mlflow.pyfunc.load_model('models:/tiny@champion');"
        "print(list(model.predict(['def add('], params={'max_new_tokens': 5})))"
    )
    env = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{done / '.featherweight' / 'mlflow.db'}"}
    answer = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip().startswith("[")


@pytest.mark.usefixtures("named_prefect")
def test_a_kill_resumes_without_recomputing(tmp_path: Path) -> None:
    """SIGKILL once the checkpoint is trained, again a little later; what was done stays done."""
    options = ["optimize", str(TINY_RECIPE), "--json", "--set", "variants=[{quantize: gptq8, serve: ct2-int8}]"]
    finished: set[str] = set()
    own_server = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    for _ in range(2):
        process = subprocess.Popen([COMMAND, *options], cwd=tmp_path, env=own_server, **pipes)
        finished |= _read_until_done(process, finished, 5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = command_here(*options, cwd=tmp_path)
    assert last.returncode == 0, last.stderr
    nodes = {node["id"]: node["status"] for node in json.loads(last.stdout)["nodes"]}
    assert "checkpoint" in finished
    assert all(nodes[id] == "cached" for id in finished)
    runs = Workspace.at(tmp_path / ".featherweight").client().search_runs(["1"], "attributes.status = 'RUNNING'")
    assert runs == []


def _read_until_done(process: subprocess.Popen[str], known: set[str], wanted: int) -> set[str]:
    """Ids of the nodes that finished, read from the progress lines until `wanted` new ones have."""
    assert process.stderr
    found: set[str] = set()
    for line in process.stderr:
        words = line.split()
        if len(words) > 2 and words[1] == "done":
            found.add(words[2])
        if len(found - known) >= wanted:
            break
    return found
