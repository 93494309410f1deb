"""What an engine reads from memory to generate for one sequence: the weights as it holds them, and its cache.

Every tensor of the served files has a role: read for each token (`step`), once for a generation (`once`: an encoder, and the
keys and values of its output), or one row of it for each token (`row`: tables of embeddings and positions). A tied embedding is
the head as well, and read whole.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from featherweight.errors import IntegrityError
from featherweight.measure.roofline import BytesRead, cache_position_bytes
from featherweight.model.architecture import auto_class, family_of
from featherweight.store.served_folder import Serving
from featherweight.system.machine import gpus

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Role = Literal["row", "once", "step"]
ROLES: tuple[Role, ...] = ("row", "once", "step")
"""The later, the more is read; a tensor with several names has the last of their roles."""
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
CROSS_KEYS_AND_VALUES = re.compile(r"(encoder_attn\.[kv]_proj|EncDecAttention\.[kv])$")
EXPERT = re.compile(r"\.experts\.")


@dataclass(frozen=True)
class HeldTensor:
    """A tensor as the engine holds it while it serves. rows: its first dimension, 0 of a scalar. share: of it that is read."""

    role: Role
    size_bytes: float
    rows: int
    share: float = 1.0


def bytes_read(served: Path) -> BytesRead | None:
    """What serving that folder reads; None where memory is not the roof, or not this machine's.

    That is so for an encoder, which reads its weights once for all tokens of a text, for an engine on a GPU, and for weights in
    a format that is not known here, or without the configuration beside them.
    """
    from transformers import AutoConfig

    serving = Serving.read(served)
    if not (served / "config.json").is_file():
        return None
    config = AutoConfig.from_pretrained(served, local_files_only=True)
    if family_of(config) == "encoder" or _on_gpu(serving):
        return None
    tensors = [one for one in _held(served / serving.weights, serving, config) if one.rows]
    if not tensors:
        return None
    weights = {role: sum(one.size_bytes * one.share for one in tensors if one.role == role) for role in ("step", "once")}
    rows = sum(one.size_bytes / one.rows for one in tensors if one.role == "row")
    return _with_cache(weights["step"] + rows, weights["once"], config, _cache_width(serving))


def _on_gpu(serving: Serving) -> bool:
    options = serving.options
    return options.get("device") == "cuda" or "bitsandbytes" in options or (serving.engine == "vllm" and bool(gpus()))


def _with_cache(step: float, once: float, config: PreTrainedConfig, width: float) -> BytesRead:
    """The weights, with keys and values `width` bytes wide."""
    names = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")
    layers = next(value for name in names if (value := getattr(config, name, None)))
    heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    position = cache_position_bytes(layers, kv_heads, head_dim, width)
    return BytesRead(step, once, position, position if config.is_encoder_decoder else 0.0)


def _cache_width(serving: Serving) -> int:
    """Bytes of one number of the cache."""
    options = serving.options
    if options.get("kv_cache_dtype") == "fp8":
        return 1
    return _float_width(serving)


def _float_width(serving: Serving) -> int:
    """Bytes of the floats that an engine computes in, which float weights become as they are loaded."""
    return 2 if serving.options.get("dtype") in ("float16", "bfloat16") else 4


def _held(folder: Path, serving: Serving, config: PreTrainedConfig) -> Iterator[HeldTensor]:
    """The tensors of a folder, by the files that lie in it."""
    if (folder / "model.bin").is_file():
        with (folder / "model.bin").open("rb") as file:
            yield from _ctranslate2(file, serving.options.get("compute_type", "float32"))
    elif (folder / "model.onnx").is_file():
        yield from _onnx(folder / "model.onnx")
    elif (folder / "packed.safetensors").is_file():
        yield from _packed(folder, serving.engine, config)
    else:
        yield from _safetensors(folder, _float_width(serving), config)


# -- safetensors -------------------------------------------------------------------------------------------------------


class _Roles:
    """Roles of the parameters of a transformers model, by the path of their module."""

    def __init__(self, config: PreTrainedConfig) -> None:
        from torch import nn

        model = _skeleton(config)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        self.head = id(head.weight) if head is not None else None
        self.ends = {self.head, id(embedding.weight)}
        self.tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        parameters = model.named_parameters(remove_duplicate=False)
        self.weights = {name.removesuffix(".weight"): id(one) for name, one in parameters if name.endswith(".weight")}
        inside = set(model.get_encoder().modules()) if config.is_encoder_decoder else set()
        self.encoder = {name for name, module in model.named_modules() if module in inside}
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        self.active = config.num_experts_per_tok / experts if experts else 1.0

    def is_vocabulary(self, path: str) -> bool:
        """Whether a module is the token embedding or the output head."""
        return self.weights.get(path) in self.ends

    def of(self, path: str) -> tuple[Role, float]:
        """(role, share that is read) of what belongs to a module."""
        identity = self.weights.get(path)
        if identity is not None and identity == self.head:
            return "step", 1.0
        if identity in self.tables:
            return "row", 1.0
        if path in self.encoder or CROSS_KEYS_AND_VALUES.search(path):
            return "once", 1.0
        return "step", self.active if EXPERT.search(f"{path}.") else 1.0


def _skeleton(config: PreTrainedConfig) -> Any:
    """The model without memory, its tied parameters tied."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config)
    model.tie_weights()
    return model


def _safetensors(folder: Path, width: int, config: PreTrainedConfig) -> Iterator[HeldTensor]:
    """transformers' own files: floats become `width` bytes wide as they are loaded, integers stay."""
    roles = _Roles(config)
    for name, shape, dtype, size in _headers(folder):
        role, share = roles.of(name.rpartition(".")[0])
        held = math.prod(shape) * width if dtype in FLOATS else size
        yield HeldTensor(role, held, shape[0] if shape else 0, share)


def _headers(folder: Path) -> Iterator[tuple[str, list[int], str, int]]:
    """(name, shape, dtype, bytes) of every tensor of the safetensors files of a folder, the data unread."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            tree = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, one in tree.items():
            if name != "__metadata__":
                yield name, one["shape"], one["dtype"], one["data_offsets"][1] - one["data_offsets"][0]


def _packed(folder: Path, engine: str, config: PreTrainedConfig) -> Iterator[HeldTensor]:
    """PyTorch's quantized engines: an integer takes a byte whatever its bits; the vocabulary is float where they say so."""
    from featherweight.runtimes.torch.formats import FORMATS
    from featherweight.runtimes.torch.storage import Packed

    roles, packed = _Roles(config), Packed.read(folder)
    for name, q in packed.quantized.q.items():
        path = name.removesuffix(".weight")
        role, share = roles.of(path)
        scales = packed.quantized.scales[name]
        floats = not FORMATS[engine].vocabulary and roles.is_vocabulary(path)
        size = q.numel() * 4 if floats else q.numel() + scales.numel() * 4
        yield HeldTensor(role, size, q.shape[0], share)
    for name, tensor in packed.rest.items():
        role, share = roles.of(name.rpartition(".")[0])
        yield HeldTensor(role, tensor.numel() * 4, tensor.shape[0] if tensor.ndim else 0, share)


# -- CTranslate2 -------------------------------------------------------------------------------------------------------

CT2_WIDTHS = (4, 1, 2, 4, 2, 2)
"""Bytes of float32, int8, int16, int32, float16, bfloat16, as their ids in the file count them."""


def _ctranslate2(file: BinaryIO, compute_type: str) -> Iterator[HeldTensor]:
    """`model.bin` (see ctranslate2.specs.model_spec). int8 weights become float32 where it computes in that."""
    try:
        found, names = _ct2_tensors(file)
    except struct.error as error:
        raise IntegrityError(f"{file.name} ends early; export the variant again") from error
    for name, (shape, kind) in found.items():
        weight = name.removesuffix("_scale")  # which has no second name where its weight has one
        role = max((_ct2_role(alias) for alias in (name, *names.get(weight, ()))), key=ROLES.index)
        width = 4 if compute_type == "float32" else CT2_WIDTHS[kind]
        yield HeldTensor(role, math.prod(shape) * width, shape[0] if shape else 0)


def _ct2_tensors(file: BinaryIO) -> tuple[dict[str, tuple[list[int], int]], dict[str, list[str]]]:
    """(shape, id of the type) of every variable, and the other names of each."""
    read = _Reader(file)
    read.number("I"), read.text(), read.number("I")  # version of the format, name and revision of the model
    found: dict[str, tuple[list[int], int]] = {}
    for _ in range(read.number("I")):
        name = read.text()
        shape = [read.number("I") for _ in range(read.number("B"))]
        found[name] = shape, read.number("B")
        file.seek(read.number("I"), 1)
    aliases: dict[str, list[str]] = {name: [] for name in found}
    for _ in range(read.number("I")):
        alias, name = read.text(), read.text()
        aliases[name].append(alias)
    return found, aliases


def _ct2_role(name: str) -> Role:
    if "embeddings" in name or "position_encodings" in name:
        return "row"
    if name.startswith("encoder/") or re.search(r"/attention/linear_1/", name):
        return "once"
    return "step"


class _Reader:
    """Numbers and texts of CTranslate2's file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def number(self, form: str) -> int:
        return int(struct.unpack(f"<{form}", self.file.read(struct.calcsize(form)))[0])

    def text(self) -> str:
        return self.file.read(self.number("H"))[:-1].decode()


# -- ONNX --------------------------------------------------------------------------------------------------------------

LOOKED_UP = ("Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding")
"""Operators that read rows of a constant: of an embedding, or of the cosines and sines of positions."""
VIEWS = ("Reshape", "Transpose", "Identity")


def _onnx(path: Path) -> Iterator[HeldTensor]:
    """A decoder's graph: what reads a constant tells its role. The weights' own file is not opened."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    behind = {one.name: one.name for one in graph.initializer}
    roles: dict[str, Role] = {}
    for node in graph.node:
        if node.op_type in VIEWS and node.input[0] in behind:
            behind[node.output[0]] = behind[node.input[0]]
            continue
        role: Role = "row" if node.op_type in LOOKED_UP else "step"
        for name in {behind[value] for value in node.input if value in behind}:
            roles[name] = max(role, roles.get(name, role), key=ROLES.index)
    for one in graph.initializer:
        if one.name in roles:
            size = math.prod(one.dims) * onnx.helper.tensor_dtype_to_np_dtype(one.data_type).itemsize
            yield HeldTensor(roles[one.name], size, one.dims[0] if one.dims else 0)
