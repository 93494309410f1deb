"""House rules: light imports, nothing of one machine is committed, what is shipped is valid, what is documented works."""

from __future__ import annotations

import ast
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from featherweight.recipe.reading import load_recipe
from tests.support.command import check_featherweight
from tests.support.paths import ROOT

LAYERS = ("featherweight", "tasks", "flows")
# Seconds of import each; whoever uses them imports them in the function that does.
HEAVY = {"torch", "transformers", "mlflow", "prefect", "great_expectations", "ctranslate2", "onnx", "onnxruntime"}
HEAVY |= {"onnxruntime_genai", "llmcompressor", "torch_pruning", "boto3", "plotly", "pandas"}
# Programs of an engine's own process, the model file that MLflow loads, the modules that only a flow loads.
FLOWS = "approval|optimize|watch|audit_schedule|remeasure_schedule"
MAY_BE_HEAVY = re.compile(rf"featherweight/(runtimes/|registry/pyfunc_model\.py)|flows/({FLOWS})\.py")
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]


def modules(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def imported(nodes: list[ast.stmt] | Iterator[ast.AST]) -> set[str]:
    """Top-level names of the packages that these nodes import."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout, so there are no tracked files to look at")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_property_has_a_deadline():
    """Hypothesis' own, 200 ms an example, is kept on no machine that stalls."""
    texts = {path.name: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    wrong = [name for name, text in texts.items() if len(re.findall(r"^@given", text, re.M)) > text.count("deadline=None")]
    assert wrong == []


@pytest.mark.parametrize("layer", LAYERS)
def test_heavy_libraries_are_imported_where_they_are_used(layer):
    wrong = {
        name: sorted(found)
        for path in modules(layer)
        if not MAY_BE_HEAVY.match(name := path.relative_to(ROOT).as_posix())
        and (found := imported(ast.parse(path.read_text()).body) & HEAVY)
    }
    assert not wrong


def test_the_folder_mlflow_never_shadows_the_package():
    assert not [path for path in (ROOT / "mlflow").rglob("*") if path.suffix in (".py", ".pyc", ".pyi", ".so")]


def test_nothing_of_one_machine_is_tracked():
    # Written in pieces, so that this file does not match itself.
    folders = "|".join(["/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/", "/Us" + "ers/", "/op" + "t/wheels", "/op" + "t/pypi"])
    hosts = "|".join(["pypi" + r"\.org", "python" + r"hosted\.org", "download" + r"\.pytorch\.org", "arti" + "factory"])
    private = re.compile(rf"(?<![\w.}}~])(?:{folders})|{hosts}|index-url[= ]+https?:")
    wrong = []
    for path in tracked():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        wrong += [f"{path.relative_to(ROOT)}: {match.group()}" for match in private.finditer(text)]
    assert not wrong


def test_nothing_that_runs_code_when_it_is_read_is_tracked():
    suffixes = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib"}
    assert not [path for path in tracked() if path.suffix in suffixes]


def test_there_are_recipes():
    assert {"demo.yaml", "stories15m.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_has_variants(path):
    from featherweight.recipe.plan import expand

    assert expand(load_recipe(path)).variants


def test_the_demo_leaves_out_no_engine_that_set_up_installs():
    from featherweight.recipe.plan import expand

    assert list(expand(load_recipe(ROOT / "recipes" / "demo.yaml")).ruled_out) == ["half/quarter/qat4/ct2-int8"]


@pytest.mark.parametrize("line", [*DIRECT, "uv", "vllm"])
def test_every_dependency_is_a_decision(line):
    name = Requirement(line).name
    text = (ROOT / "docs" / "decisions" / "dependencies.md").read_text()
    entry = re.search(rf"^### {re.escape(name)}\n((?:- .*\n?)+)", text, re.MULTILINE)
    assert entry, f"docs/decisions/dependencies.md has no entry '### {name}'"
    starts = [item.partition(":")[0] for item in entry.group(1).splitlines()]
    assert starts == ["- Why", "- Considered", "- Cost"]


# Which release goes with torch's build, and a torch for CUDA 12 pins itself.
UNLOCKED = {"nvidia-cublas-cu12"}


@pytest.mark.parametrize("line", [line for line in DIRECT if Requirement(line).name not in UNLOCKED])
def test_every_dependency_is_locked_within_its_bounds(line):
    wanted = Requirement(line)
    lock = (ROOT / "infra" / "toolchains" / "main.txt").read_text()
    pin = re.search(rf"^{re.escape(wanted.name)}==([^\s;]+)", lock, re.MULTILINE)
    assert pin, f"{wanted.name} is not in infra/toolchains/main.txt; run infra/lock"
    assert wanted.specifier.contains(pin.group(1)), f"{pin.group()} is outside '{line}'; run infra/lock"


def test_the_name_of_a_quantization_method_stands_in_its_file_and_the_catalog_alone():
    """In strings, that is; checkpoints' formats bear such names too, and what an exporter rounds itself is rounded to nearest."""
    from featherweight.quantization.catalog import QUANTIZERS

    files = {QUANTIZERS.reference(name).partition(":")[0].replace(".", "/") + ".py": name for name in QUANTIZERS}
    apart = {
        ROOT / "featherweight" / name
        for name in ("quantization/catalog.py", "checkpoint/quantized_formats.py", "model/matrices.py")
    }
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for path in (path for layer in LAYERS for path in modules(layer) if path not in apart)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in set(QUANTIZERS) - {files.get(path.relative_to(ROOT).as_posix())}
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("environment", "lint", "test", "shown", "code"),
    [
        (0, 0, 0, "environment lint test", 0),
        (0, 0, 2, "environment lint test", 2),
        (0, 3, 0, "environment lint test", 3),
        (0, 3, 2, "environment lint test", 2),
        (4, 0, 0, "environment", 4),
    ],
)
def test_continuous_integration_lints_and_tests(tmp_path, environment, lint, test, shown, code):
    """With a `make` that tells its verb and ends as it is told: what is shown, in order, and the exit code."""
    (tmp_path / "make").write_text(f'#!/bin/bash\necho "$2"\nenvironment={environment} lint={lint} test={test}\nexit "${{!2}}"\n')
    (tmp_path / "make").chmod(0o755)
    surroundings = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([ROOT / ".ci" / "run"], env=surroundings, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.returncode) == (shown.split(), code)


def test_licence():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["license"] == "Apache-2.0"


def test_help_takes_less_than_a_second():
    """CPU seconds, the best of three, so that a busy machine does not decide."""
    program = Path(sys.executable).parent / "featherweight"
    if not program.exists():
        pytest.skip("featherweight is not installed in this environment; run `make setup`")
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.run([str(program), "--help"], capture_output=True, text=True, check=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "optimize" in shown and "doctor" in shown
    assert min(seconds) < 1.0


PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted((ROOT / "docs").rglob("*.md"))


def readme_commands() -> list[list[str]]:
    """Every command line of the ```sh blocks of the README and of the documentation, then those in their sentences and tables."""
    texts = [path.read_text() for path in PAGES if path.exists()]
    blocks = [block for text in texts for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.DOTALL)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += [line for text in texts for line in re.findall(r"`(featherweight [a-z][^`\n]*)`", text)]
    words = (shlex.split(line.removeprefix("$ "), comments=True) for line in dict.fromkeys(lines))
    return [found for found in words if found]


def test_the_readme_opens_with_the_two_commands():
    first = [" ".join(words) for words in readme_commands()[:2]]
    assert first == ["make demo", "make test"]


@pytest.mark.parametrize("words", readme_commands(), ids=" ".join)
def test_the_readmes_commands_exist(words):
    program = Path(words[0]).name
    if program == "make":
        verbs = set(re.findall(r"^([\w-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in words[1:] if "=" not in word} <= verbs
    elif program == "featherweight":
        check_featherweight(words[1:])
    else:
        assert shutil.which(program) or program in (".", "cd", "export", "pip", "git"), f"what is {program}?"


MAY_SAY_CUDA = re.compile(r"featherweight/(system/(device|gpu|gpu_bandwidth)|runtimes/(gpu_findings|torch/cuda_report))\.py")
LIBRARIES_OF_CUDA = {"onnxruntime-genai-cuda", "/usr/local/cuda*/lib64"}


def test_one_place_decides_where_a_model_lives():
    """No module says 'cuda' by itself, and none asks torch for it: all ask featherweight/system/device.py."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (path for layer in LAYERS for path in modules(layer))
        if not MAY_SAY_CUDA.fullmatch(path.relative_to(ROOT).as_posix())
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda")
        or (isinstance(node, ast.Constant) and isinstance(node.value, str) and _names_cuda(node.value))
    ]
    assert not wrong


def _names_cuda(text: str) -> bool:
    """Whether a string is the name of the device; a sentence of documentation may speak of it."""
    return "\n" not in text and " " not in text and "cuda" in text.split(":")[0] and text not in LIBRARIES_OF_CUDA
