"""What is left out of imports stays out, and what it was for still works."""

import subprocess
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SEEN = """
import sys
import featherweight
from transformers import AutoModelForCausalLM
heavy = {"sklearn", "pandas"} & sys.modules.keys()
assert not heavy, heavy
import sklearn
"""


def test_a_model_opens_without_scikit_learn() -> None:
    seen = subprocess.run([sys.executable, "-c", SEEN], capture_output=True, text=True, timeout=300)
    assert seen.returncode == 0, seen.stderr


def test_assisted_generation_works_without_it() -> None:
    small = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model, draft = LlamaForCausalLM(small).eval(), LlamaForCausalLM(small).eval()
    ids, asked = torch.tensor([[1, 2, 3]]), {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    assert model.generate(ids, assistant_model=draft, **asked).tolist() == model.generate(ids, **asked).tolist()
