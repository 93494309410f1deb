"""The text stage: reads a source of documents and writes one of its splits (training, calibration, evaluation).

Sources, as a recipe's `data.source` (and `data.evaluation`, `data.calibration` where they are sources of their own) names them:
- `python-stdlib`: the running interpreter's own standard library, a module each document;
- a file, which is what its content says: JSON (lines, an array, an object with a list), CSV or TSV, Parquet, each with the text
  under `field`; or prose, documents between `separator` or the whole file. Any of them but Parquet may be compressed (gzip, bzip2,
  xz, Zstandard) and in any Unicode encoding with a byte order mark, UTF-8 without one. Anything else is refused;
- a folder: each file that `pattern` matches, read as above;
- `s3://bucket/key-or-prefix/`: the same, from S3.
A document that is over a tenth of the text, or one of fewer than three, would be most of a split: it is cut at blank lines into
documents of 2000 to 4000 characters.

Splits hold whole documents. A document's place comes from a hash of its normalized text and the seed: it does not move when
documents are added, beyond the few at the border. Exact copies are dropped; near copies stay in training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from featherweight.errors import DataError, RecipeError
from featherweight.progress import Metrics, Progress
from featherweight.text.documents import Document, write_documents
from featherweight.text.overlap import NEAR_COPY, copied_shares, digest, ngrams
from featherweight.text.sources import read_source, source_fingerprint
from featherweight.text.spec import DataSpec, TextSpec
from tasks.stage import stage

SPLITS = ("train", "calibration", "evaluation")
Split = Literal["train", "calibration", "evaluation"]
Held = tuple[dict[str, list[Document]], int]


@dataclass(frozen=True)
class Splits:
    """All splits of a recipe's text, in the order of the source; `near_copies` were kept out of the held-out splits."""

    train: list[Document]
    calibration: list[Document]
    evaluation: list[Document]
    duplicates: dict[str, int] = field(default_factory=dict)
    near_copies: int = 0

    def metrics(self, split: Split) -> Metrics:
        """Counts and sizes of one split."""
        documents: list[Document] = getattr(self, split)
        return {
            "documents": len(documents),
            "bytes": sum(len(document.content.encode(errors="surrogatepass")) for document in documents),
            "duplicates_dropped": self.duplicates.get(split, 0),
            "near_copies_kept_in_training": self.near_copies,
        }


@stage("text", source=lambda spec: source_fingerprint(spec.data))
def text(spec: TextSpec, *, out: Path, seed: int = 0, progress: Progress = Progress()) -> Metrics:
    """Write one split of the text as a text folder. All splits of a recipe must be made with the same seed.

    Raises DataError for a source that is missing, empty, no text, without the field, or too small to split.
    """
    progress.note(f"reading {spec.data.source}")
    splits = split_text(spec.data, seed)
    write_documents(out, getattr(splits, spec.split))
    return splits.metrics(spec.split)


def split_text(data: DataSpec, seed: int = 0) -> Splits:
    """Read every source once and split the documents. `max_bytes` holds for each source by itself."""
    source = read_source(data.source, data)
    shares = {name: share for name in SPLITS[1:] if isinstance(share := getattr(data, name), float)}
    own = {name: read_source(other, data) for name in SPLITS[1:] if isinstance(other := getattr(data, name), str)}
    held, near_copies = _hold_out(source.documents, shares, seed, data.source)
    taken = {id(document) for documents in held.values() for document in documents}
    documents = {name: read.documents for name, read in own.items()} | held
    return Splits(
        train=[document for document in source.documents if id(document) not in taken],
        calibration=documents["calibration"],
        evaluation=documents["evaluation"],
        duplicates={name: own.get(name, source).duplicates for name in SPLITS},
        near_copies=near_copies,
    )


def _hold_out(documents: list[Document], shares: dict[str, float], seed: int, source: str) -> Held:
    """The held-out splits, each of at least one document that is no near copy, and how many near copies were passed over."""
    if not shares:
        return {}, 0
    if sum(shares.values()) >= 1:
        raise RecipeError(f"data: the shares {shares} leave nothing to train on; together they must stay under 1")
    copied = copied_shares([ngrams(document.content) for document in documents])
    distinct = [document for document, share in zip(documents, copied, strict=True) if share <= NEAR_COPY]
    names = [name for name in ("evaluation", "calibration") if name in shares]
    if len(distinct) < len(names) or len(documents) <= len(names):
        raise DataError(
            f"{source} holds {len(documents)} documents, {len(distinct)} of them no near copies of others: too few to hold "
            f"out {' and '.join(names)}; give more text, or sources of their own"
        )
    most = min(len(distinct), len(documents) - 1)
    return _take(distinct, [(name, shares[name]) for name in names], seed, most), len(documents) - len(distinct)


def _take(documents: list[Document], shares: list[tuple[str, float]], seed: int, most: int) -> dict[str, list[Document]]:
    """Intervals of the documents' ranks: at least one document each, at most `most` in all, in the documents' order."""
    ranks = [int(digest(document.content, str(seed))[:16], 16) / 2**64 for document in documents]
    order = sorted(range(len(documents)), key=lambda place: (ranks[place], place))
    held: dict[str, list[Document]] = {}
    start, border = 0, 0.0
    for number, (name, share) in enumerate(shares, 1):
        border += share
        end = max(start + 1, sum(rank < border for rank in ranks))
        end = min(end, most - (len(shares) - number))
        held[name] = [documents[place] for place in sorted(order[start:end])]
        start = end
    return held
