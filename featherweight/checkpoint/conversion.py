"""A checkpoint as it was found becomes a checked folder of our own: plain float safetensors, and a tokenizer that is proven."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from featherweight.checkpoint.adapters import base_of, has_adapter, merge
from featherweight.checkpoint.fetching import HUB, WORK, source_of
from featherweight.checkpoint.files import Listing, copy, find_weights, link, needed_files
from featherweight.checkpoint.gguf import convert_gguf, gguf_file
from featherweight.checkpoint.inspection import CheckpointInfo, inspect_checkpoint
from featherweight.checkpoint.quantized_formats import method_of
from featherweight.checkpoint.sanity import require_sane
from featherweight.checkpoint.settling import settle, settle_head
from featherweight.checkpoint.spec import LoadSpec
from featherweight.checkpoint.tensors import saving
from featherweight.checkpoint.tokenizer import by_its_file_alone, known_by_its_name, require_same_tokenizer
from featherweight.checkpoint.unpacking import read_config, unpack
from featherweight.errors import CheckpointError
from featherweight.progress import Progress


@dataclass(frozen=True)
class Adopted:
    """What a checkpoint is. settled: what was written otherwise; unpacked: of weights that came quantized, what became of them."""

    info: CheckpointInfo
    settled: Mapping[str, float] = field(default_factory=dict)
    unpacked: Mapping[str, float] = field(default_factory=dict)


def adopt(found: Path, spec: LoadSpec, work: Path, out: Path, progress: Progress) -> Adopted:
    """Check a local folder or GGUF file and put it into `out`, converted where it is not plain float safetensors.

    work: a folder below `out` for what is written on the way.
    """
    progress.note(f"checking {spec.source}")
    gguf = gguf_file(found)
    if gguf is not None:
        unpacked = convert_gguf(gguf, work, out, progress)
        with named(out, str(gguf)):
            return Adopted(inspect_checkpoint(out, task=spec.task), unpacked=unpacked)
    if has_adapter(found, spec):
        return _adopt_adapted(found, spec, work, out, progress)
    require_sane(Listing.of(found))
    folder, settled = settle(found, spec, work, progress)
    with named(folder, str(found)):
        info, unpacked = _adopt_folder(folder, spec, out, progress)
    tokenizer = by_its_file_alone(out) if _known_by_its_name(spec) else found
    with named(out, str(found)):
        require_same_tokenizer(tokenizer, out, trust_remote_code=spec.trust_remote_code)
    return Adopted(info, settled, unpacked)


def _known_by_its_name(spec: LoadSpec) -> bool:
    kind, place = source_of(spec)[0], str(spec.source)
    return kind == HUB and known_by_its_name(place.removeprefix(HUB).partition("@")[0])


def _adopt_adapted(found: Path, spec: LoadSpec, work: Path, out: Path, progress: Progress) -> Adopted:
    """The base model of an adapter with the adapter merged into it."""
    base, merged = work / "base", work / "merged"
    for folder in (base, base / WORK, merged):
        folder.mkdir()
    told = base_of(found, spec)
    plain = spec.model_copy(update={"source": told or spec.source, "base": None, "adapter": "ignore" if told is None else None})
    under = source_of(plain)[1].fetch(plain, base / WORK, progress) if told else found
    with named(under, plain.source):
        adopt(under, plain, base / WORK, base, progress)
    shutil.rmtree(base / WORK)
    with named(base, plain.source):
        merge(base, found, spec, merged, progress)
    folder, settled = settle(merged, spec, work, progress)
    with named(folder, str(found)):
        info, _ = _adopt_folder(folder, spec, out, progress)
    return Adopted(info, settled | {"adapters_merged": 1.0})


@contextmanager
def named(path: Path, source: str) -> Iterator[None]:
    """Errors name `source`, as whoever gave it knows it, not where it was fetched or written to."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(path), source)) from error


def _adopt_folder(found: Path, spec: LoadSpec, out: Path, progress: Progress) -> tuple[CheckpointInfo, dict[str, float]]:
    weights = find_weights(Listing.of(found), allow_pickle=spec.allow_pickle)
    config = read_config(found)
    if method_of(config) is not None:
        with saving(out):
            unpacked = unpack(found, config, weights, out, progress)
        with named(out, str(found)):
            unpacked |= settle_head(out, spec, progress)
            return inspect_checkpoint(out, task=spec.task), unpacked
    info = inspect_checkpoint(found, task=spec.task, allow_pickle=spec.allow_pickle, trust_remote_code=spec.trust_remote_code)
    for name in needed_files(Listing.of(found), weights, trust_remote_code=spec.trust_remote_code):
        _take((found / name).resolve(), out, name)
    return info, {}


def _take(source: Path, out: Path, name: str) -> None:
    """What was downloaded below `out` is ours; what anyone else holds must not reach our copy when it is written."""
    (link if out.resolve() in source.parents and source.suffix == ".safetensors" else copy)(source, out / name)
