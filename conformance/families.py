"""Which families there are: transformers is asked what it opens, and each engine's own library what it takes of that."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from featherweight.model.architecture import Family
from featherweight.runtimes.optimum import known
from featherweight.runtimes.tvm.runtime import DECODERS, ENCODERS
from featherweight.runtimes.vllm.installed import modules_by_architecture

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ModelFamily:
    """A model type of transformers with the head that its kind is measured by; `engines` name it as theirs.

    Where none does, it is PyTorch's alone, and those' who trace what PyTorch computes, whatever it is (OpenVINO, torch-compile,
    torch-aoti, torchscript).
    """

    model_type: str
    kind: Family
    architecture: str
    engines: tuple[str, ...]


@cache
def families() -> tuple[ModelFamily, ...]:
    """Every model type of text, by its kind and name."""
    loaders = {name: ask() for name, ask in ASKED.items()}
    found: dict[str, ModelFamily] = {}
    for kind, model_type, architecture, config in _opened():
        engines = tuple(name for name, takes in loaders.items() if takes(architecture, config)) or ALONE
        found.setdefault(model_type, ModelFamily(model_type, kind, architecture, engines))
    return tuple(sorted(found.values(), key=lambda one: (one.kind, one.model_type)))


def _opened() -> Iterator[tuple[Family, str, str, type[PreTrainedConfig]]]:
    """(kind, model type, architecture, configuration) of the models of text that transformers' auto classes open.

    A model type of several heads comes with the one that it was made for: an encoder-decoder's before a decoder's of it.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    tables: dict[Family, dict[str, str]] = {
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "encoder": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    for kind, table in tables.items():
        for model_type, architecture in table.items():
            if model_type not in CONFIG_MAPPING:
                continue
            config = CONFIG_MAPPING[model_type]
            if isinstance(architecture, str) and _of_text(config, kind):
                yield kind, model_type, architecture, config


def _of_text(config: type[PreTrainedConfig], kind: Family) -> bool:
    """Whether it describes one model of text, and not parts for pictures or sound beside one."""
    try:
        made = config()
    except Exception:  # what transformers cannot describe without being told more is no plain model of text
        return False
    parts, told = {"vision_config", "audio_config", "text_config", "num_mel_bins", "thinker_config"}, made.to_dict()
    stacks = (one for one in (told.get("encoder"), told.get("decoder")) if isinstance(one, dict))
    plain = made.get_text_config() is made if kind != "seq2seq" else made.is_encoder_decoder
    return bool(plain) and not any(parts & one.keys() for one in (told, *stacks))


def _ctranslate2() -> Callable[[str, type[PreTrainedConfig]], bool]:
    """Its converter has a loader for each configuration class; sound and heads other than the kind's are none of ours."""
    from ctranslate2.converters import transformers as loaders

    known = set(loaders._MODEL_LOADERS)
    return lambda architecture, config: config.__name__ in known


def _onnx_genai() -> Callable[[str, type[PreTrainedConfig]], bool]:
    """Its model builder compares the checkpoint's architecture with names, one branch each."""
    import onnxruntime_genai.models  # noqa: F401 - puts the builder's folder on the path, where it looks for its parts
    from onnxruntime_genai.models import builder

    known = set(re.findall(r'"(\w+)"', inspect.getsource(builder.create_model)))
    return lambda architecture, config: architecture in known


def _vllm() -> Callable[[str, type[PreTrainedConfig]], bool]:
    """Its registry's tables; nothing where the toolchain is not installed."""
    return lambda architecture, config: architecture in modules_by_architecture()


def _tvm() -> Callable[[str, type[PreTrainedConfig]], bool]:
    """Those that its graphs were tried with."""
    return lambda architecture, config: config.model_type in (*DECODERS, *ENCODERS)


def _optimum() -> Callable[[str, type[PreTrainedConfig]], bool]:
    """Its exporter registers model types; nothing where the toolchain is not installed."""
    return lambda architecture, config: known.is_exported(config.model_type)


ALONE = ("torch",)
ASKED = {"ctranslate2": _ctranslate2, "onnxruntime": _optimum, "onnxruntime-genai": _onnx_genai, "tvm": _tvm, "vllm": _vllm}
