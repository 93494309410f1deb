"""The tensors of a checkpoint folder, read one by one from safetensors or from a pickle of plain tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.files import Listing, Weights, check_length, find_weights, require_indexed
from featherweight.errors import CheckpointError, ServiceError, one_line
from featherweight.store.mapped import give_back, seal

if TYPE_CHECKING:
    from torch import Tensor


_CHUNK = 1 << 24


def read_shapes(listing: Listing, folder: Path, weights: Weights) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, from the headers; checks each file's length and the shard index."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for file in weights.files:
        if not weights.pickled:
            check_length(listing, file)
        found[file] = _pickled_shapes(folder / file) if weights.pickled else _header_shapes(folder / file)
    require_indexed(str(folder), weights, found)
    return {name: shape for shapes in found.values() for name, shape in shapes.items()}


def stored_type(folder: Path) -> str | None:
    """The one float, by torch's name, in which all floats of a folder of safetensors are stored; None where there are several."""
    weights = find_weights(Listing.of(folder), allow_pickle=True)
    if weights.pickled:
        return None
    names = (entry["dtype"] for file in weights.files for entry in check_length(Listing.of(folder), file).values())
    floats = {name for name in names if name.startswith(("F", "BF"))}
    return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(min(floats, default="")) if len(floats) == 1 else None


def _header_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)


def _pickled_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in load_pickle(path).items()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A memory-mapped safetensors file, its header validated."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path} is corrupt ({one_line(error)}); copy it again") from error


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, memory-mapped where the format allows it; anything but tensors is refused."""
    import pickle
    import zipfile

    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is not a pickle of plain tensors ({_unpickled(error)}); it was not loaded") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        other = (
            next((key for key, one in state.items() if not isinstance(one, torch.Tensor)), None)
            if isinstance(state, dict)
            else None
        )
        under = f", and {other!r} is none" if other is not None else ""
        raise CheckpointError(
            f"{path} must hold a mapping of names to tensors{under}; it was not loaded: save the model's state_dict alone"
        )
    odd = next((name for name, tensor in state.items() if tensor.is_meta or tensor.layout != torch.strided), None)
    if odd is not None:
        what = "without values (meta)" if state[odd].is_meta else f"in the layout {state[odd].layout}"
        raise CheckpointError(f"{path}: tensor {odd} was saved {what}; save the model by save_pretrained")
    return state


def require_finite(folder: Path, weights: Weights, unless: Callable[[str], bool] = lambda _: False) -> None:
    """Name the first tensor that holds NaN or infinity, of those whose values play a role: `unless` tells which do not."""
    for file, name, tensor in stream_tensors(folder, weights, sealed=True):
        if not (unless(name) or _is_finite(tensor)):
            raise CheckpointError(f"{folder / file}: tensor {name} holds NaN or infinite values; take an earlier checkpoint")


def stream_tensors(folder: Path, weights: Weights, *, sealed: bool = False) -> Iterator[tuple[str, str, Tensor]]:
    """(file, name, tensor) one by one; the tensors are memory-mapped.

    sealed: they are only read (see store/mapped.py); the pages of one are given back when the next is asked for.
    """
    for file in weights.files:
        if weights.pickled:
            yield from ((file, name, tensor) for name, tensor in load_pickle(folder / file).items())
            continue
        with _opened(folder / file) as opened:
            for place, name in enumerate(opened.keys()):
                tensor = opened.get_tensor(name)
                if sealed and place == 0:  # all lie in one mapping
                    seal(tensor)
                yield file, name, tensor
                give_back(tensor)


def _is_finite(tensor: Tensor) -> bool:
    """In one pass without temporaries: the extremes of a tensor are finite exactly when all of it is."""
    import torch

    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    for chunk in tensor.flatten().split(_CHUNK):
        wide = chunk.float() if chunk.element_size() == 1 else chunk
        if not torch.isfinite(torch.stack(torch.aminmax(wide))).all():
            return False
    return True


def _unpickled(error: Exception) -> str:
    """What torch found that is no tensor. Its own text advises to run whatever the file holds."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found:
        return f"it wants {found[1]} to be run"
    return one_line(error, 120) if str(error).strip() and "weights_only" not in str(error) else "it is empty, or cut short"


@contextmanager
def saving(out: Path) -> Iterator[None]:
    """safetensors tells of a full disk in words only."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if "os error 28" not in str(error) and "No space left" not in str(error):
            raise
        raise ServiceError(f"no space left on the disk while writing {out}; free some, run it again") from error
