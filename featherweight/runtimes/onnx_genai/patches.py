"""What the model builder of onnxruntime-genai 0.18 does beside building, left out; and what it gets wrong, put right."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, partialmethod
from typing import TYPE_CHECKING, Any

from featherweight.store.mapped import SMALL

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EPSILONS = ("layer_norm_eps", "norm_eps", "layer_norm_epsilon")
OLMO_EPSILON = 1e-5
"""Of OLMo's layer norms, in transformers' own code: no configuration says it."""


@contextmanager
def weights_of(model: PreTrainedModel | None) -> Iterator[None]:
    """It loads all weights once more, in the type that they are stored in, and adds Gemma's 1 to the norms in bfloat16.

    It gets them of `model`, where one is given: in float32, or from their files, and writes them a stretch at a time.
    """
    base = sys.modules["builders.base"].Model
    load, initializer = base.load_weights, base.make_initializer
    if model is not None:
        base.load_weights = lambda *_: model
        base.make_initializer = partialmethod(_make_initializer, initializer)
    try:
        yield
    finally:
        base.load_weights, base.make_initializer = load, initializer


def _make_initializer(builder: Any, as_it_was: Callable[..., None], tensor: Any, name: str, **options: Any) -> None:
    from torch import Tensor

    as_it_was(builder, tensor, name, **options)
    whole = builder.values[name].const_value
    if isinstance(tensor, Tensor) and tensor.nbytes >= SMALL and whole.dtype == whole.dtype.FLOAT:
        from featherweight.runtimes.onnx_genai.stretches import InStretches

        builder.values[name].const_value = InStretches(tensor, name)


def without_commit() -> None:
    """It writes the commit of whatever repository its environment lies in into the graph: the same weights, other bytes."""
    sys.modules["builders.base"].Model.get_genai_commit = lambda: None


def silent() -> None:
    """The builder prints its every step; to redirect stdout would also swallow what other threads print."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "builders" or name == "onnxruntime_genai.models.builder":
            vars(module)["print"] = lambda *_, **__: None
            if hasattr(module, "tqdm"):
                vars(module)["tqdm"] = partial(module.tqdm, disable=True)


def mend() -> None:
    """Norms as the model has them: their epsilon, which it reads by one name alone, and OLMo's, which are no RMS norms.

    And Gemma's embeddings times the square root of their width as it is, not rounded to two digits.
    """
    base, olmo = sys.modules["builders.base"].Model, sys.modules["builders.olmo"].OLMoModel
    gemma = sys.modules["builders.gemma"].GemmaModel
    if base.__init__ is _made:
        return
    _as_it_was.init, _as_it_was.norm, _as_it_was.gemma = base.__init__, olmo.make_layernorm, gemma.__init__
    base.__init__, olmo.make_layernorm, gemma.__init__ = _made, _layer_norm, _gemma


class _as_it_was:
    init: Any
    norm: Any
    gemma: Any


def _gemma(model: Any, config: Any, *arguments: Any) -> None:
    _as_it_was.gemma(model, config, *arguments)
    model.embed_attrs["scale"] = model.hidden_size**0.5


def _made(model: Any, config: Any, *arguments: Any) -> None:
    if getattr(config, "rms_norm_eps", None) is None:
        told = (getattr(config, name, None) for name in EPSILONS)
        usual = OLMO_EPSILON if config.model_type == "olmo" else None
        epsilon = next((value for value in told if value is not None), usual)
        if epsilon is not None:
            config.rms_norm_eps = epsilon
    _as_it_was.init(model, config, *arguments)


def _layer_norm(model: Any, layer: int, norm: Any, skip: bool, simple: bool, location: str) -> None:
    _as_it_was.norm(model, layer, norm, skip, False, location)
