"""What is left out of imports stays out, and what it was for still works; what is kept of them is what would be read."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import import_utils

from featherweight.system import transformers_import

SEEN = """
import gc, sys
import featherweight
from transformers import AutoModelForCausalLM, LlamaForCausalLM
heavy = {"sklearn", "pandas", "scipy", "boto3", "torchao"} & sys.modules.keys()
assert not heavy, heavy
assert gc.isenabled()
import sklearn
from transformers.loss import loss_for_object_detection, loss_rt_detr
from transformers.quantizers import quantizer_torchao
from transformers.utils import import_utils
for matching in (loss_for_object_detection.linear_sum_assignment, loss_rt_detr.linear_sum_assignment):
    assert matching([[0, 1], [1, 0]])[1].tolist() == [0, 1]
assert quantizer_torchao.flatten_tensor_state_dict({})
import scipy.optimize, torchao
assert scipy.optimize.minimize
assert import_utils.PACKAGE_DISTRIBUTION_MAPPING.get("torch") == ["torch"]
assert import_utils.PACKAGE_DISTRIBUTION_MAPPING.get("yaml") == ["PyYAML"]
assert import_utils.PACKAGE_DISTRIBUTION_MAPPING.get("nothing of this name") is None
"""
EXPECTED = """
import sys
import featherweight
import great_expectations.expectations as gxe
assert not {"altair", "scipy.stats"} & sys.modules.keys()
from great_expectations.expectations.core import expect_column_kl_divergence_to_be_less_than as divergence
assert abs(divergence.stats.entropy([0.5, 0.5], [0.9, 0.1]) - 0.5108256) < 1e-6
import scipy.stats
assert divergence.stats.norm is scipy.stats.norm and divergence.alt.Chart.__name__
"""
MODELS = Path(import_utils.__file__).parents[1] / "models"


def test_a_model_opens_without_what_nothing_asks_for(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    seen = subprocess.run([sys.executable, "-c", SEEN], capture_output=True, text=True, timeout=300, env=environment)
    assert seen.returncode == 0, seen.stderr


def test_expectations_are_read_without_what_few_of_them_ask_for() -> None:
    seen = subprocess.run([sys.executable, "-c", EXPECTED], capture_output=True, text=True, timeout=300)
    assert seen.returncode == 0, seen.stderr


def test_assisted_generation_works_without_scikit_learn() -> None:
    small = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model, draft = LlamaForCausalLM(small).eval(), LlamaForCausalLM(small).eval()
    ids, asked = torch.tensor([[1, 2, 3]]), {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    assert model.generate(ids, assistant_model=draft, **asked).tolist() == model.generate(ids, **asked).tolist()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two of transformers' models, which are read; and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("llama", "bert"):
        (tmp_path / "models" / name).mkdir(parents=True)
        for file in (MODELS / name).glob("*.py"):
            (tmp_path / "models" / name / file.name).write_bytes(file.read_bytes())
    return tmp_path / "models"


def test_what_is_kept_is_what_is_read(package: Path) -> None:
    structure = import_utils.create_import_structure_from_path(str(package))
    assert "LlamaForCausalLM" in structure["llama"][frozenset({"torch"})]["modeling_llama"]
    assert transformers_import.known(package) is None
    assert transformers_import.learnt(package, structure) == structure
    assert transformers_import.known(package) == structure


@pytest.mark.parametrize("harm", ["cut", "another form", "a module more", "a module less", "another place"])
def test_what_is_not_of_the_package_as_it_lies_there_is_read_anew(package: Path, tmp_path: Path, harm: str) -> None:
    transformers_import.learnt(package, import_utils.create_import_structure_from_path(str(package)))
    (file,) = (tmp_path / "cache" / "featherweight").iterdir()
    if harm == "cut":
        file.write_text(file.read_text()[:-10])
    elif harm == "another form":
        file.write_text("[1, 2, 3]")
    elif harm == "a module more":
        (package / "bert" / "modeling_more.py").touch()
    elif harm == "a module less":
        (package / "llama" / "modeling_llama.py").unlink()
    else:
        package = package.rename(tmp_path / "elsewhere")
    assert transformers_import.known(package) is None


def test_a_cache_that_cannot_be_written_keeps_nothing(package: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert transformers_import.learnt(package, {"llama": {}}) == {"llama": {}}
    assert transformers_import.known(package) is None


def test_transformers_finds_its_names_as_without_it() -> None:
    described = importlib.util.spec_from_file_location("transformers.utils.unchanged", import_utils.__file__)
    unchanged = importlib.util.module_from_spec(described)
    described.loader.exec_module(unchanged)
    for path in (MODELS, str(MODELS / "__init__.py")):
        assert import_utils.create_import_structure_from_path(path) == unchanged.create_import_structure_from_path(path)
