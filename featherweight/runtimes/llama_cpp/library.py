"""llama.cpp's own C functions, in the library that the wheel `xllamacpp` brings, or in that which was compiled for this CPU.

Its server tells no log-probabilities of a prompt; the functions of llama.h do. Two structs are passed by value, whose layout is
that of one version of the header: it is compared with the defaults that the library itself fills in, before anything is passed.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from featherweight.errors import ToolchainError
from featherweight.system import toolchains

MODULE = "xllamacpp"
NATIVE, NATIVE_FILE = "llama.cpp-native", "llama_cpp_native/libllama.so"
"""The toolchain that has the same sources compiled for this CPU, and the library in it."""
TESTED = "2026.10.11549"
"""The version whose header the structs below follow."""
FLOAT32, FLOAT16, Q8_0 = 0, 1, 8
"""ggml's numbers of the types that keys and values are kept in."""
UNFUSED, FUSED = 0, 1
"""LLAMA_FLASH_ATTN_TYPE_DISABLED."""
EVERY_TOKEN = 0
"""LLAMA_POOLING_TYPE_NONE: states behind all tokens, whatever the file says of a text's vector."""
_LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class ModelParameters(ctypes.Structure):
    """llama_model_params."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("devices", "tensor_buft_overrides")),
        *((name, c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, c_void_p) for name in ("tensor_split", "progress_callback", "progress_callback_user_data", "kv_overrides")),
        *((name, c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp")),
    ]


class ContextParameters(ctypes.Structure):
    """llama_context_params; `callbacks` are three pointers of which none is used here."""

    _fields_: ClassVar = [
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type", "pooling_type")),
        *((name, c_int32) for name in ("attention_type", "flash_attn_type")),
        *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        *((name, c_void_p) for name in ("cb_eval", "cb_eval_user_data")),
        *((name, c_int32) for name in ("type_k", "type_v")),
        ("callbacks", c_void_p * 3),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    ]


class Batch(ctypes.Structure):
    """llama_batch: tokens of any sequences, each with its position, and whether its logits are wanted."""

    _fields_: ClassVar = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_log_set": (None, [_LOG, c_void_p]),
    "llama_backend_init": (None, []),
    "llama_print_system_info": (c_char_p, []),
    "llama_model_default_params": (ModelParameters, []),
    "llama_context_default_params": (ContextParameters, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParameters]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),
    "llama_set_adapters_lora": (c_int32, [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParameters]),
    "llama_free": (None, [c_void_p]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_get_embeddings": (POINTER(c_float), [c_void_p]),
    "llama_model_n_embd": (c_int32, [c_void_p]),
    "ggml_quantize_chunk": (c_size_t, [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
}
MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "main_gpu": 0, "use_extra_bufts": True, "vocab_only": False}
CONTEXT_DEFAULTS = {
    **{"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max": 0, "n_threads": 4, "n_threads_batch": 4},
    **{"rope_scaling_type": -1, "pooling_type": -1, "attention_type": -1, "flash_attn_type": -1, "rope_freq_base": 0.0},
    **{"yarn_ext_factor": -1.0, "defrag_thold": -1.0, "type_k": FLOAT16, "type_v": FLOAT16},
    **{"embeddings": False, "offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True, "kv_unified": False},
}
"""What the library fills in where the structs have its layout."""


def file() -> Path | None:
    """The library: that which was compiled here where there is one, else the wheel's; None where there is neither."""
    if native := toolchains.find(NATIVE, NATIVE_FILE):
        return native
    found = find_spec(MODULE)
    return next(iter(sorted(Path(found.origin).parent.glob(f"{MODULE}*.so"))), None) if found and found.origin else None


def missing() -> str | None:
    """Why there is no library, and how to get one; None where there is one."""
    return None if file() else f"{MODULE} is not installed; {remedy()}"


@cache
def library() -> Any:
    """The library, its backend started and its log silenced. Raises ToolchainError where it is absent, or of another layout."""
    found = file()
    if found is None:
        raise ToolchainError(str(missing()))
    loaded = ctypes.CDLL(str(found))
    try:
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise ToolchainError(f"{MODULE} lacks one of llama.cpp's functions ({error}); {remedy()}") from error
    loaded.llama_log_set(_silent, None)
    _check_layout(loaded.llama_model_default_params(), MODEL_DEFAULTS)
    _check_layout(loaded.llama_context_default_params(), CONTEXT_DEFAULTS)
    loaded.llama_backend_init()
    return loaded


def remedy() -> str:
    """How to get it."""
    return f"run 'pip install {MODULE}=={TESTED}', or 'pip install featherweight[llamacpp]'"


def _check_layout(struct: ctypes.Structure, defaults: dict[str, Any]) -> None:
    other = [name for name, value in defaults.items() if getattr(struct, name) != value]
    if other:
        raise ToolchainError(f"this {MODULE} lays out llama.cpp's parameters otherwise ({other[0]}); {remedy()}")


@_LOG
def _silent(level: int, text: bytes, data: Any) -> None:
    """llama.cpp tells of each load and each context on stderr; what fails, its functions return."""


def built_with() -> str:
    """The CPU features that the library was compiled with, as it tells them: 'AVX2, FMA, ...'."""
    told = library().llama_print_system_info().decode().partition(":")[2]
    return ", ".join(name.strip() for name, _, value in (one.partition("=") for one in told.split("|")) if value.strip() == "1")


def load_model(path: Path, *, vocab_only: bool = False) -> int:
    """A model of a GGUF file, on the CPU; 0 where llama.cpp cannot load it. To be given to llama_model_free."""
    parameters = library().llama_model_default_params()
    parameters.n_gpu_layers, parameters.vocab_only = 0, vocab_only
    found = library().llama_model_load_from_file(str(path).encode(), parameters)
    return int(found or 0)
