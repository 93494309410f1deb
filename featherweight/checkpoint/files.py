"""The files of a checkpoint folder, wherever they lie: which there are, which a checkpoint needs, and whether all are there."""

from __future__ import annotations

import codecs
import fcntl
import json
import operator
import os
import shutil
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

from featherweight.checkpoint.tensor_header import header_fault
from featherweight.errors import CheckpointError
from featherweight.model.sparsity import FILE as SPARSITY

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")


KEPT_ADAPTERS = "served_adapters"
"""Where adapters that are not merged lie below a checkpoint: a folder each, by its name."""


VOCABULARIES = (
    *("tokenizer.json", "tokenizer.*.json", "tokenizer.model", "tokenizer.model.v*", "tekken.json", "*.tiktoken"),
    *("spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model", "spm_char.model", "source.spm"),
    *("vocab.json", "vocab.txt", "vocab-src.json", "vocab.bpe", "dict.txt", "prophetnet.tokenizer"),
)
"""What holds the pieces of a tokenizer: each is enough to know that there is one. Shell patterns."""


COMPANIONS = (
    *VOCABULARIES,
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "kept_tokens.json"),
    *("merges.txt", "bpe.codes", "encoder.json", "target.spm", "target_vocab.json", "vocab-tgt.json"),
    *("emoji.json", "normalizer.json", "byte_maps.json", "entity_vocab.json", "word_shape.json", "word_pronunciation.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("modules.json", "sentence_*_config.json", "config_sentence_transformers.json", "[0-9]_*/config.json"),
    "[0-9]_*/model.safetensors",
    *(f"{KEPT_ADAPTERS}/*/{name}" for name in (ADAPTER, ADAPTER_WEIGHTS[0])),
)
"""Everything that a checkpoint carries beside configuration and weights, as shell patterns of names below its folder: each
tokenizer's files as transformers names them, chat templates, generation settings, what sentence-transformers does after the
model, adapters that are kept beside it. The one list: whoever loads, copies, saves or serves a model takes these."""


WITHOUT_VOCABULARY = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
"""Tokenizers that need no file but their configuration: their pieces are bytes or characters."""


LFS = b"version https://git-lfs.github.com/spec/"
"""What a file begins with that Git LFS has left in the place of a large one."""


FICLONE = 0x40049409
"""Linux's request to share the bytes of one file with another, copied when one of them is written (linux/fs.h)."""


_WITHOUT_CONFIG = {
    ADAPTER: "it is an adapter: merge it into its base model first",
    "modules.json": "copy the files of sentence-transformers' first module, such as 0_Transformer, up beside modules.json",
    "model_index.json": "it is a pipeline of diffusers, which makes images; name a folder that holds one transformer",
    WEIGHTS: "copy the config.json that these weights were saved with beside them",
    INDEX: "copy the config.json that these weights were saved with beside them",
    TOKENIZER_CONFIG: "it is a tokenizer alone; copy config.json and the weights of its model beside it",
}
"""What to do about a folder that has no config.json, by what it has."""


# safetensors itself refuses longer headers.
_MAX_HEADER = 100_000_000
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_MAX_JSON = 1 << 24
_MAX_LIST = 1 << 28
"""Bytes of JSON: of settings, the largest seen have a few MB, and of what lists a vocabulary or the tensors of all shards."""
_PIECE = 1 << 22


@dataclass(frozen=True)
class Listing:
    """A checkpoint's files wherever they lie.

    sizes: in bytes, by name below its folder. `read(name, n)`: the first n bytes of one. `stream(name)`: all of them, in pieces.
    """

    where: str
    sizes: Mapping[str, int]
    read: Callable[[str, int], bytes]
    stream: Callable[[str], Iterator[bytes]] | None = None

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, in pieces that fit into memory where the place can give them so."""
        return self.stream(name) if self.stream else iter((self.read(name, self.sizes[name]),))

    @classmethod
    def of(cls, folder: Path) -> Listing:
        """The files right inside a local folder, and companions below it; raises CheckpointError where it is missing."""
        if not folder.is_dir():
            problem = "is a file, not a folder" if folder.is_file() else "does not exist"
            raise CheckpointError(f"checkpoint folder {folder} {problem}; check its path in the recipe")
        inside = [path for pattern in COMPANIONS if "/" in pattern for path in folder.glob(pattern)]
        found = sorted(path for path in (*folder.iterdir(), *inside) if path.is_file())
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
        return cls(str(folder), sizes, lambda name, length: _head(folder / name, length), lambda name: _pieces(folder / name))


@dataclass(frozen=True)
class Weights:
    """The files that hold the tensors. `index` maps each tensor to its shard; None where there is one file only."""

    files: tuple[str, ...]
    index: Mapping[str, str] | None = None
    pickled: bool = False


def _head(path: Path, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def missing_part(listing: Listing) -> str | None:
    """What a checkpoint still lacks, in one line; None when it is complete. Reads headers only, so that polling is cheap."""
    try:
        if ADAPTER in listing.sizes and not has_weights(listing):
            _require_adapter(listing)
        else:
            _require_model(listing)
        for name in companions(listing.sizes):
            if name.endswith(".json"):
                _parse(listing, name)
    except CheckpointError as error:
        return str(error)
    return None


def _require_model(listing: Listing) -> None:
    read_json(listing, CONFIG)
    weights = find_weights(listing, allow_pickle=True)
    for name in weights.files if not weights.pickled else ():
        check_length(listing, name)
    require_tokenizer(listing)


def _require_adapter(listing: Listing) -> None:
    """Its settings and its weights; the tokenizer may be the base model's."""
    read_json(listing, ADAPTER)
    weights = [name for name in adapter_files(listing) if name != ADAPTER]
    if not weights:
        raise CheckpointError(f"{listing.where} has {ADAPTER} and no {ADAPTER_WEIGHTS[0]}; copy it in too")
    for name in weights:
        if name.endswith(".safetensors"):
            check_length(listing, name)


def needed_files(listing: Listing, weights: Weights, *, trust_remote_code: bool = False) -> list[str]:
    """Names of the files to take: configuration, weights, their zeros, tokenizer; code only where it is trusted. Nothing else."""
    wanted = {CONFIG, SPARSITY, *weights.files, *companions(listing.sizes)}
    if weights.index is not None:
        wanted.add(PICKLE_INDEX if weights.pickled else INDEX)
    return [name for name in sorted(listing.sizes) if name in wanted or (trust_remote_code and name.endswith(".py"))]


def files_of(listing: Listing, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> list[str]:
    """Names of the files to fetch: those of a checkpoint, those of an adapter, or both."""
    adapter = adapter_files(listing)
    if adapter and not has_weights(listing):
        return sorted({*adapter, *companions(listing.sizes)})
    weights = find_weights(listing, allow_pickle=allow_pickle)
    return sorted({*needed_files(listing, weights, trust_remote_code=trust_remote_code), *adapter})


def adapter_files(listing: Listing) -> list[str]:
    """The files of peft's adapter in the folder; none where there is none."""
    return [name for name in (ADAPTER, *ADAPTER_WEIGHTS) if name in listing.sizes] if ADAPTER in listing.sizes else []


def has_weights(listing: Listing) -> bool:
    """Whether there are weights of a whole model."""
    return any(name in listing.sizes for name in (WEIGHTS, INDEX, PICKLE, PICKLE_INDEX))


def base_named(adapter: Path | Listing) -> str | None:
    """The source of the base model that an adapter names, a path or a repository; None where it names none, or is none.

    A path counts from where we are, or from the adapter's folder.
    """
    if isinstance(adapter, Path) and not adapter.is_dir():
        return None
    listing = Listing.of(adapter) if isinstance(adapter, Path) else adapter
    if not adapter_files(listing) or has_weights(listing):
        return None
    told = read_json(listing, ADAPTER).get("base_model_name_or_path")
    if told is not None and not isinstance(told, str):
        raise CheckpointError(f"{listing.where}/{ADAPTER}: base_model_name_or_path is no text")
    if not told or ":" in told or Path(told).expanduser().exists():
        return told or None
    if isinstance(adapter, Path) and (adapter / told).exists():
        return str(adapter / told)
    return f"hf:{told}" if told.count("/") == 1 and told[0] not in "./~" else str(told)


def companions(names: Iterable[str]) -> list[str]:
    """Those of `names` that a checkpoint carries beside configuration and weights."""
    return [name for name in names if is_companion(name)]


def is_companion(name: str, patterns: Iterable[str] = COMPANIONS) -> bool:
    """Whether `name`, below a checkpoint's folder, is one of the files that it carries."""
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def has_tokenizer(listing: Listing) -> bool:
    """Whether there is a file that holds a tokenizer's pieces, or the configuration of one that needs none."""
    if any(is_companion(name, VOCABULARIES) for name in listing.sizes):
        return True
    told = read_json(listing, TOKENIZER_CONFIG) if TOKENIZER_CONFIG in listing.sizes else {}
    return told.get("tokenizer_class") in WITHOUT_VOCABULARY


def find_weights(listing: Listing, *, allow_pickle: bool = False) -> Weights:
    """The weight files, safetensors first. Raises CheckpointError where there are none, a shard is missing, or only pickles."""
    if WEIGHTS in listing.sizes:
        return Weights((WEIGHTS,))
    if INDEX in listing.sizes:
        return _shards(listing, INDEX)
    if PICKLE not in listing.sizes and PICKLE_INDEX not in listing.sizes:
        raise CheckpointError(
            f"{listing.where} holds no weights: expected {WEIGHTS}, or shards and {INDEX}{_found_instead(listing)}"
        )
    if not allow_pickle:
        raise CheckpointError(
            f"{listing.where} holds its weights as a pickle ({PICKLE}), which can run code; ask for a safetensors copy, "
            "or set checkpoint.allow_pickle: true to convert it"
        )
    if PICKLE in listing.sizes:
        return Weights((PICKLE,), pickled=True)
    return _shards(listing, PICKLE_INDEX, pickled=True)


def _found_instead(listing: Listing) -> str:
    """What lies there of other weights, and what to do about it."""
    for ending, advice in _OTHER_WEIGHTS.items():
        found = next((name for name in listing.sizes if name.endswith(ending) and "/" not in name), None)
        if found:
            return f"; {found} is {advice}"
    return ""


_OTHER_WEIGHTS = {
    ".safetensors": f"none of these by its name: a shard wants {INDEX}, and a file of its own is to be called {WEIGHTS}",
    **dict.fromkeys(
        (".bin", ".pth", ".pt", ".ckpt"), "a pickle that transformers does not look for; save the model by save_pretrained"
    ),
    **dict.fromkeys((".h5", ".msgpack"), "of another framework; save the model by PyTorch's save_pretrained"),
    ".onnx": "a graph, of which no checkpoint is made; give the folder that it was exported from",
}
"""By how a file's name ends: what it is instead of the weights that are looked for."""


def _shards(listing: Listing, index: str, *, pickled: bool = False) -> Weights:
    mapping = read_json(listing, index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(file, str) for file in mapping.values()):
        raise CheckpointError(f"{listing.where}/{index} has no weight_map of tensors to shards; copy it again")
    files = tuple(sorted(set(mapping.values())))
    missing = [name for name in files if name not in listing.sizes]
    if missing and "/" in missing[0]:
        raise CheckpointError(
            f"{listing.where}: {index} names shard {missing[0]}, which does not lie right in the folder; put it there"
        )
    if missing:
        raise CheckpointError(
            f"{listing.where}: {index} names shard {missing[0]}, which is missing "
            f"({len(files) - len(missing)} of {len(files)} shards are there); copy the whole checkpoint"
        )
    return Weights(files, mapping, pickled)


def read_json(listing: Listing, name: str) -> dict[str, Any]:
    """A JSON object of the checkpoint."""
    if name not in listing.sizes:
        instead = _instead_of_config(listing) if name == CONFIG else "is it a Hugging Face checkpoint?"
        raise CheckpointError(f"{listing.where} has no {name}; {instead}")
    value = _parse(listing, name)
    if not isinstance(value, dict):
        raise CheckpointError(f"{listing.where}/{name} must hold a JSON object, found {type(value).__name__}")
    return value


def _instead_of_config(listing: Listing) -> str:
    """What to do about a folder that has no config.json."""
    found = next((file for file in _WITHOUT_CONFIG if file in listing.sizes), "")
    modules = _parse(listing, found) if found == "modules.json" else None
    first = modules[0] if isinstance(modules, list) and modules else None
    kind = str(first.get("type")).rpartition(".")[2] if isinstance(first, dict) else "Transformer"
    if kind != "Transformer":
        return f"its vectors come from sentence-transformers' {kind} module, and not from a transformer; take a model that has one"
    return _WITHOUT_CONFIG.get(found, "is it a Hugging Face checkpoint?")


def read_list(listing: Listing, name: str) -> list[dict[str, Any]]:
    """A JSON array of objects of the checkpoint."""
    value = _parse(listing, name)
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise CheckpointError(f"{listing.where}/{name} must hold a JSON array of objects")
    return value


def _parse(listing: Listing, name: str) -> Any:
    most = _MAX_LIST if name in (INDEX, PICKLE_INDEX) or is_companion(name, VOCABULARIES) else _MAX_JSON
    if listing.sizes[name] > most:
        raise CheckpointError(f"{listing.where}/{name} has {listing.sizes[name]:,} bytes; none is so large; copy it again")
    content = listing.read(name, listing.sizes[name])
    try:
        return json.loads(content.decode())  # as the libraries read it: UTF-8 alone, and no mark before it
    except (ValueError, RecursionError) as error:
        if _is_pointer(listing, name):
            raise _pointer(listing, name) from error
        if content.startswith(_MARKS):
            raise CheckpointError(f"{listing.where}/{name} begins with a byte order mark; save it as plain UTF-8") from error
        raise CheckpointError(f"{listing.where}/{name} is not JSON ({error}); copy it again") from error


def _is_pointer(listing: Listing, name: str) -> bool:
    return listing.read(name, len(LFS)) == LFS


def _pointer(listing: Listing, name: str) -> CheckpointError:
    return CheckpointError(f"{listing.where}/{name} is a pointer of Git LFS, not the file; run 'git lfs pull' there")


def require_indexed(where: str, weights: Weights, names: Mapping[str, Collection[str]]) -> None:
    """Raise CheckpointError where a file lacks a tensor that the shard index puts there, or two files have one, which may hold
    other values: `names` of the tensors in each file.
    """
    first: dict[str, str] = {}
    for shard, there in names.items():
        if twice := next((name for name in there if first.setdefault(name, shard) != shard), None):
            raise CheckpointError(
                f"{where}: tensor {twice} is in both {first[twice]} and {shard}, and engines differ on which they take; "
                "save the model again by save_pretrained"
            )
    for name, shard in (weights.index or {}).items():
        if name not in names[shard]:
            raise CheckpointError(f"{where}/{shard} lacks tensor {name}, which the shard index puts there; copy it again")


def check_length(listing: Listing, name: str) -> dict[str, Any]:
    """Compare a safetensors file's size with what its header promises, and give the header (see read_header)."""
    size = listing.sizes[name]
    header = read_header(listing, name)
    expected = header_bytes(listing, name) + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        _refuse_length(listing, name, str(expected), shorter=size < expected)
    if fault := header_fault(header):
        raise CheckpointError(f"{listing.where}/{name} is corrupt ({fault}); copy it again")
    return header


def read_header(listing: Listing, name: str) -> dict[str, Any]:
    """What a safetensors file says of each of its tensors: `dtype`, `shape` and `data_offsets`. Reads nothing else of it."""
    size, until = listing.sizes[name], header_bytes(listing, name)
    if size < until:
        _refuse_length(listing, name, f"at least {until}", shorter=True)
    try:
        header = json.loads(listing.read(name, until)[8:])
        tensors = {key: entry for key, entry in header.items() if key != "__metadata__"}
        [len(entry["shape"]) + sum(map(operator.index, _two(*entry["data_offsets"]))) for entry in tensors.values()]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _headless(listing, name) from error
    return tensors


def _two(first: int, last: int) -> tuple[int, int]:
    """Raises TypeError for any other number of them."""
    return first, last


def header_bytes(listing: Listing, name: str) -> int:
    """Where the header ends: 8 bytes tell its length."""
    lead = listing.read(name, 8)
    length = struct.unpack("<Q", lead)[0] if len(lead) == 8 else _MAX_HEADER + 1
    if length > _MAX_HEADER:
        raise _headless(listing, name)
    return 8 + int(length)


def _headless(listing: Listing, name: str) -> CheckpointError:
    if _is_pointer(listing, name):
        return _pointer(listing, name)
    return CheckpointError(f"{listing.where}/{name} ({listing.sizes[name]} bytes) has no safetensors header; copy it again")


def _refuse_length(listing: Listing, name: str, expected: str, *, shorter: bool) -> NoReturn:
    problem = "is truncated" if shorter else "has bytes after its end"
    raise CheckpointError(f"{listing.where}/{name} {problem}: {listing.sizes[name]} of {expected} bytes; copy it again")


def require_tokenizer(listing: Listing) -> None:
    if not has_tokenizer(listing):
        raise CheckpointError(f"{listing.where} has no tokenizer (expected tokenizer.json or tokenizer.model); copy it in too")


def link(source: Path, target: Path) -> None:
    """`source`, a file of our own, again at the new path `target`; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        copy(source, target)


def copy(source: Path, target: Path) -> None:
    """A file of its own with the bytes of `source`, in the place of what was at `target`: they never share an inode.

    The bytes lie on disk once where the file system can share them until one of the two is written (reflink).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        with source.open("rb") as there, target.open("xb") as here:
            fcntl.ioctl(here, FICLONE, there.fileno())
    except OSError:
        shutil.copyfile(source, target)
