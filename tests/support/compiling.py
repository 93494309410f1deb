"""Engines that compile: a tiny checkpoint compiled and held to PyTorch, and what its answers have to be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.interface import Limits, LoadedModel, Tokens
from featherweight.store.served_folder import Serving
from tests.support.families import family_checkpoint, write_words

LABELS = {"architectures": ["BertForSequenceClassification"], "num_labels": 3}
"""What makes a BERT one that labels texts."""


def configuration(**told: Any) -> Any:
    """What the refusals ask of a configuration, without transformers."""
    config = SimpleNamespace(is_encoder_decoder=False, max_position_embeddings=256, pad_token_id=0, **told)
    config.get_text_config, config.to_dict = lambda: config, lambda: told
    return config


def compiled(spec: Any, kind: str, folder: Path, **changes: Any) -> tuple[Path, LoadedModel]:
    """A tiny checkpoint, compiled to `folder`/out and held to PyTorch, and the engine that serves it."""
    from tasks.compile import compile

    checkpoint, text, out = family_checkpoint(kind, folder / "checkpoint", **changes), folder / "text", folder / "out"
    out.mkdir()
    metrics = compile(spec, checkpoint=checkpoint, calibration=write_words(text), out=out)
    assert metrics["parity_max_abs"] < 1e-4
    return checkpoint, RUNTIMES[spec.engine].loaded_model()(out, Serving.read(out), Limits(1, spec.max_tokens, 4))


def check_texts(checkpoint: Path, engine: LoadedModel, prompts: Tokens) -> None:
    """An engine writes all prompts at once as PyTorch each alone; on two threads as well."""
    import torch
    from transformers import AutoModelForCausalLM

    model, theirs = AutoModelForCausalLM.from_pretrained(checkpoint).eval(), []
    for prompt in prompts:
        made = model.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
        theirs.append(made[0, len(prompt) :].tolist())
    assert engine.generate(prompts, 12).tokens == theirs
    engine.set_threads(2)
    assert engine.generate(prompts, 12).tokens == theirs


def check_labels(checkpoint: Path, engine: LoadedModel) -> None:
    """Labels of texts of several lengths in one batch, the shorter ones padded, are those of each text alone."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    texts = [[1, 9, 8, 7, 2], [1, 12, 2], [1, *range(6, 30), 2]]
    found = engine.outputs(texts, [[0] * len(text) for text in texts])
    for text, rows in zip(texts, found, strict=True):
        assert torch.tensor(rows).flatten().allclose(model(torch.tensor([text])).logits.flatten(), atol=1e-5)
