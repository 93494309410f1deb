"""Refusals that several runtimes share, each a line that says why."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from featherweight.model.architecture import answers_by_decoder, family_of, task_of
from featherweight.model.decoding import OWN_ATTENTION, WITHOUT_KEYS_AND_VALUES, other_layers
from featherweight.model.positions import rotary_kinds
from featherweight.runtimes.spec import ComputeType, ExportSpec
from featherweight.spec import Task
from featherweight.system.device import CUDA, Device

if TYPE_CHECKING:
    from featherweight.runtimes.interface import Grids

SILU: tuple[str, ...] = ("silu", "swish")
"""The names that transformers has for it."""


def activation_refusal(engine: str, config: Any, kind: str, computed: Mapping[str, tuple[str, ...]]) -> str | None:
    """Why an engine that computes one activation for a model type, by its names, does not serve a model that names another."""
    told = getattr(config, "hidden_act", None) or getattr(config, "activation", None)
    if told is None or told in computed.get(kind, (told,)):
        return None
    return f"{engine} computes {computed[kind][0]} in {kind} models, and this one's activation is {told}; take another engine"


def compute_type_refusal(engine: str, known: tuple[ComputeType, ...], wanted: ComputeType) -> str | None:
    """Why `engine` does not serve a compute type; None where it does."""
    return None if wanted in known else f"{engine} serves {', '.join(known)}, not {wanted}"


def cache_refusal(engine: str, spec: ExportSpec) -> str | None:
    """Why an engine that keeps keys and values in float takes no other cache."""
    return f"kv_cache: {engine} keeps keys and values in float; leave it out" if spec.kv_cache else None


def float_of_rounded_refusal(precision: str) -> str:
    """Why rounded weights are not served as floats."""
    return f"{precision} would store rounded weights at full size, no smaller and no faster than unrounded ones"


def rows_of_8_bits_refusal(holds: str, grids: Grids) -> str | None:
    """Why an engine whose products are of 8-bit integers of one scale per row does not take these grids; None where it does."""
    every = [grid for grid in (grids.body, grids.head, grids.finer) if grid]
    other = next((grid for grid in every if grid.kind != "int" or grid.bits != 8 or grid.group_size), None)
    return f"{holds}, not {other.name}; take another engine" if other else None


def both_stacks_refusal(engine: str, task: Task) -> str | None:
    """Why an engine whose graphs are of one stack of layers has no encoder-decoders; None for other tasks."""
    encoder_decoder = f"{engine}'s graphs here are of decoders and of encoders, not of both in one; take another engine"
    return encoder_decoder if task == "text2text-generation" else None


def fp8_refusal() -> str:
    """Why an engine of integers does not take 8-bit floats."""
    return "it holds integers, not fp8; take an engine that holds 8-bit floats"


def devices_refusal(engine: str, device: Device) -> str:
    """Why an engine is not asked to serve from a device that it does not have."""
    return f"{engine} serves from the {'CPU' if device == CUDA else 'GPU'} alone"


def cuda_package_refusal(engine: str, distribution: str) -> str | None:
    """Why an engine does not serve from the GPU here: another distribution of it, with kernels for CUDA, is not installed."""
    if any(True for _ in metadata.distributions(name=distribution)):
        return None
    return f"{devices_refusal(engine, CUDA)} here: {distribution}, its package for CUDA, is not installed"


def on_cpu_refusal(engine: str, compute_type: str) -> str:
    """Why a compute type that only CUDA has is not served from the CPU of a machine that has a GPU."""
    return f"{engine} {compute_type} is computed on CUDA GPUs alone"


def gpu_refusal(engine: str, compute_type: str) -> str:
    """Why a compute type that only CUDA has is not served on a CPU."""
    return f"{engine} {compute_type} needs a CUDA GPU, and there is none here; take a CPU type such as int8"


def answers_refusal(engine: str, config: Any) -> str | None:
    """Why an engine that answers by vectors or labels of encoders gives none of this model: it is a decoder. None for others."""
    if not answers_by_decoder(config):
        return None
    what = "makes vectors" if task_of(config) == "feature-extraction" else "labels texts"
    others = "openvino, llama.cpp, torch-aoti, torch-compile or torch"
    return f"{engine} {what} with encoders alone here, and {config.model_type} is a decoder; take {others}"


def rotary_length_refusal(engine: str, config: Any) -> str | None:
    """Why an engine of compiled graphs does not serve rotary embeddings that ask for the length at every step; None for others."""
    asking = rotary_kinds(config) & {"dynamic", "longrope"}
    if not asking:
        return None
    return f"{engine} compiles no rotary embeddings that depend on the length ({min(asking)}); take another engine"


def keys_and_values_refusal(engine: str, config: Any) -> str | None:
    """Why an engine whose compiled step has a place for keys and values does not serve a model that keeps none; None for others."""
    if config.model_type not in WITHOUT_KEYS_AND_VALUES or family_of(config) != "causal":
        return None
    return f"a {config.model_type} model keeps no keys and values, for which {engine}'s step has its place; take another engine"


def other_layers_refusal(engine: str, config: Any) -> str | None:
    """Why an engine that keeps keys and values of every layer does not serve a decoder with other layers; None where it does."""
    others = other_layers(config) if family_of(config) == "causal" or answers_by_decoder(config) else []
    if not others:
        return None
    layers = f"layers of {' and '.join(others)}"
    return f"{engine}'s step keeps keys and values of every layer, and this {config.model_type} has {layers}; take another engine"


def own_attention_refusal(engine: str, config: Any) -> str | None:
    """Why an engine that puts its own attention in the place of a decoder's does not serve this one; None where it can."""
    if config.model_type not in OWN_ATTENTION or family_of(config) != "causal":
        return None
    return f"{engine} computes attention itself, and a {config.model_type}'s is part of transformers' module; take another engine"


def compiler_refusal(engine: str) -> str | None:
    """Why an engine that compiles and links C++ cannot here: there is no compiler; None where there is one."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler):
        return None
    return f"{engine} needs a C++ compiler, and there is no {compiler} on the PATH (apt install g++)"
