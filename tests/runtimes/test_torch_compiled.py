"""torch.compile's step: whole for decoders that else count on the host what they have read, and the same text as PyTorch's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from featherweight.runtimes.interface import Limits
from featherweight.runtimes.torch.compiled import CompiledTorchModel
from featherweight.store.served_folder import Serving
from tests.support.families import family_checkpoint

BAMBA = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8},
}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("opt", {}),
        ("falcon", {"alibi": True, "new_decoder_architecture": False}),
        ("bamba", BAMBA),
    ],
)
def test_a_step_is_one_graph_and_writes_as_pytorch(
    kind: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo's graphs without Inductor's kernels, which take tens of seconds: whether each is whole, and over which places."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode=None, **told: compile(function, backend="eager", **told))
    checkpoint = family_checkpoint(kind, tmp_path, **changes)
    Serving("torch-compile").write(checkpoint)
    model, prompts = AutoModelForCausalLM.from_pretrained(checkpoint).eval(), [[9, 8, 7, 5], [12, 5, 9, 6]]
    theirs = partial(model.generate, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    engine = CompiledTorchModel(checkpoint, Serving.read(checkpoint), Limits(1, 64, 2))
    assert engine.generate(prompts, 12).tokens == theirs(torch.tensor(prompts))[:, 4:].tolist()
