"""vLLM's OpenAI-compatible server: how it is started, for a measurement and for users."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featherweight.checkpoint.description import described
from featherweight.errors import StageError
from featherweight.model.facts import Values
from featherweight.model.positions import head_width
from featherweight.runtimes.generation_settings import GenerationSettings
from featherweight.runtimes.interface import EngineServer, Limits
from featherweight.runtimes.vllm.capabilities import disabled_kernels
from featherweight.runtimes.vllm.ends import STARTED_BY, other_ends
from featherweight.runtimes.vllm.on_cpus import rotates_heads_apart, wants_bfloat16
from featherweight.store.served_folder import Serving
from featherweight.system.machine import gpus
from featherweight.system.toolchains import python

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize", "/version")
NOT_TRANSFORMERS = {"presence_penalty": 0.0, "frequency_penalty": 0.0}
"""What vLLM takes from a generation_config.json, and transformers knows nothing of."""
IN_PYTORCH = '{"custom_ops": ["-rotary_embedding"]}'
"""Rotary embeddings by vLLM's own lines of PyTorch, not by its kernel for CPUs."""


def engine_server(served: Path, name: str, limits: Limits, socket: Path) -> EngineServer:
    """The server of a variant for users, who are answered by the checkpoint's own generation settings.

    vLLM takes the ends from them. What they do not say about sampling would be as OpenAI has it, temperature 1.
    """
    serving, settings = Serving.read(served), GenerationSettings.read(served)
    ends = other_ends(served, settings.ends)
    told = ["--served-model-name", name, "--uds", str(socket)]
    # "auto" is the file beside the weights too; where it is named, its max_new_tokens bounds what requests may ask for.
    told += ["--generation-config", "auto", "--override-generation-config", json.dumps(sampling(settings))]
    return EngineServer(
        command=(
            *(program() if ends is None else [str(python("vllm")), str(STARTED_BY)]),
            *arguments(served, served / serving.weights, serving.options, limits),
            *told,
            "--disable-uvicorn-access-log",
        ),
        environment=environment(serving.options, limits.threads),
        paths=PATHS,
        example=("/v1/completions", {"model": name, "prompt": "The", "max_tokens": 4}),
        here_alone=ends and f"vLLM's own server {ends}, where transformers does not: 'featherweight serve' has it follow",
    )


def sampling(settings: GenerationSettings) -> dict[str, Any]:
    """How tokens are chosen, in vLLM's words: greedily where the settings do not ask for sampling, else as transformers samples."""
    values, sampled = settings.values, settings.values.get("do_sample", False)
    return {
        "temperature": values.get("temperature", 1.0) if sampled else 0.0,
        "top_k": values.get("top_k", 50) if sampled else 0,
        "top_p": values.get("top_p", 1.0) if sampled else 1.0,
        "repetition_penalty": values.get("repetition_penalty", 1.0),
        **NOT_TRANSFORMERS,
    }


def program() -> list[str]:
    """How it is started. Raises ToolchainError where it is not installed."""
    return [str(python("vllm")), "-m", "vllm.entrypoints.openai.api_server"]


def arguments(served: Path, weights: Path, options: Mapping[str, str], limits: Limits) -> list[str]:
    """What it is told, whoever asks it. Raises StageError for what was written for another kind of CPU."""
    kind = options.get("dtype", "float32")
    if kind != "bfloat16" and wants_bfloat16(options.get("compute_type", "")) and not gpus():
        raise StageError(
            f"its int8 was written for a CPU without AMX or a GPU, in {kind}, which vLLM cannot compute here; "
            "export it on this machine"
        )
    config = Values(described(weights)["config"])
    told = {
        "--model": weights,
        "--tokenizer": served,
        "--dtype": kind,
        "--max-model-len": limits.max_tokens,
        "--max-num-seqs": limits.max_batch,
        "--kv-cache-dtype": options.get("kv_cache_dtype", "auto"),
        "--kv-cache-memory-bytes": _cache_bytes(config, limits),
        "--tensor-parallel-size": options.get("tensor_parallel_size", "1"),
    }
    given = [*(str(part) for pair in told.items() for part in pair), "--enforce-eager", "--disable-log-stats"]
    return given if gpus() or not rotates_heads_apart(config) else [*given, "--compilation-config", IN_PYTORCH]


def environment(options: Mapping[str, str], threads: int) -> dict[str, str]:
    """What its environment has beside ours."""
    disabled = disabled_kernels(options.get("compute_type"), gpus())
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # "nobind" takes OMP_NUM_THREADS; the default would pin threads to cores that other processes may be using.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # The engine's process computes itself, and starts no worker for it.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        **({"VLLM_DISABLED_KERNELS": disabled} if disabled else {}),
    }


def _cache_bytes(config: Any, limits: Limits) -> int:
    """A key-value cache that holds the batch twice over, in blocks of 128 tokens and float32, at least 64 MiB."""
    config = config.get_text_config()  # which knows GPT-2's n_head and BLOOM's n_layer by these names, too
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
    per_token = 2 * 4 * config.num_hidden_layers * heads * (head_width(config) or 0)
    blocks = limits.max_batch * -(-limits.max_tokens // 128) + 2
    return max(2 * blocks * 128 * per_token, 2**26)
