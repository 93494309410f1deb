"""Quality of encoders that answer by vectors or labels: how far their answers are from the labels, or from the original's answers.

The loss of an example:
- a vector: 1 - the cosine to the original's (`embedding_distance`); beside it `rank_agreement`, Spearman's correlation of the
  cosines of all pairs of texts with the original's;
- labels: the cross-entropy to what the data says, where it says it, else to the original's own distribution, as a share of that of
  a guess among all labels alike (`cross_entropy`, a mean over the answers of the example); beside it `label_agreement`, the share
  of answers with the original's likeliest label, `accuracy` where the data has labels, and `rank_agreement` of the scores where
  there is one label only, as of a reranker;
- a number (`problem_type: regression`): the square of its distance from the original's, as a share of the variance of those, which
  is what saying their mean each time would cost (`score_error`); beside it `rank_agreement` of the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from featherweight.errors import StageError
from featherweight.measure.measurement import Quality

if TYPE_CHECKING:
    from numpy import ndarray

Rows = list[list[float]]
TINY = 1e-12
"""A variance below this is none: then any difference at all is too much."""
IGNORED = -100
"""The label of a position where nothing is to be said."""
EMBEDDING, LABELS, SCORE = "embedding_distance", "cross_entropy", "score_error"


def embedding_quality(found: Sequence[Rows], original: Sequence[Rows], sizes: tuple[int, ...]) -> Quality:
    """Of vectors, one row for each text. sizes: bytes of the texts."""
    ours, theirs = (_unit(rows) for rows in (found, original))
    losses = 1 - (ours * theirs).sum(1)
    return _quality(losses, EMBEDDING, sizes, {"rank_agreement": _rank_agreement(_cosines(ours), _cosines(theirs))})


def label_quality(
    found: Sequence[Rows], original: Sequence[Rows], labels: Sequence[list[int]], sizes: tuple[int, ...], single: bool
) -> Quality:
    """Of logits, a row for each answer. labels: of each answer, none where the data does not say. single: there is only one."""
    import numpy

    rows = [(_log_softmax(ours), _log_softmax(theirs), known) for ours, theirs, known in zip(found, original, labels, strict=True)]
    losses = [_cross_entropy(*row) for row in rows]
    same = numpy.concatenate([_counted(ours.argmax(-1) == theirs.argmax(-1), known) for ours, theirs, known in rows])
    figures = {"label_agreement": float(same.mean())}
    right = [_counted(ours.argmax(-1) == _array(known), known) for ours, _, known in rows if known]
    if right:
        figures["accuracy"] = float(numpy.concatenate(right).mean())
    if single:
        figures["rank_agreement"] = _rank_agreement(_scores(found), _scores(original))
    return _quality(numpy.array(losses), LABELS, sizes, figures)


def score_quality(found: Sequence[Rows], original: Sequence[Rows], sizes: tuple[int, ...]) -> Quality:
    """Of numbers, the logit of a single label for each text."""
    ours, theirs = _scores(found), _scores(original)
    losses = (ours - theirs) ** 2 / max(float(theirs.var()), TINY)
    return _quality(losses, SCORE, sizes, {"rank_agreement": _rank_agreement(ours, theirs)})


def _scores(answers: Sequence[Rows]) -> ndarray:
    """The logit of the only label of each text, which stands beside a zero (model/heads.py)."""
    import numpy

    return numpy.array([one[0][1] - one[0][0] for one in answers], dtype=float)


def _quality(losses: ndarray, name: str, sizes: tuple[int, ...], figures: dict[str, float]) -> Quality:
    broken = sum(not math.isfinite(loss) for loss in losses)
    if broken:
        raise StageError(f"answers that are no numbers in {broken} of {len(losses)} examples")
    return Quality(tuple(losses.tolist()), (1,) * len(losses), sizes, name, figures)


def _unit(rows: Sequence[Rows]) -> ndarray:
    import numpy

    vectors = numpy.array([one[0] for one in rows], dtype=float)
    return vectors / numpy.maximum(numpy.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _cosines(vectors: ndarray) -> ndarray:
    """Of all pairs of different texts."""
    import numpy

    return (vectors @ vectors.T)[numpy.triu_indices(len(vectors), 1)]


def _rank_agreement(one: ndarray, other: ndarray) -> float:
    """Spearman's rank correlation; 1 for fewer than three values, which cannot disagree by more than a tie."""
    import numpy

    if len(one) < 3:
        return 1.0
    ours, theirs = (values.argsort().argsort().astype(float) for values in (one, other))
    return float(numpy.corrcoef(ours, theirs)[0, 1])


def _log_softmax(rows: Rows) -> ndarray:
    import numpy

    logits = numpy.array(rows, dtype=float)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - numpy.log(numpy.exp(shifted).sum(-1, keepdims=True))


def _cross_entropy(ours: ndarray, theirs: ndarray, known: list[int]) -> float:
    """A mean over the answers, in shares of a guess's."""
    import numpy

    if known:
        labels, rows = _array(known), numpy.arange(len(known))
        values = -ours[rows, labels.clip(0)]
    else:
        values = -(numpy.exp(theirs) * ours).sum(-1)
    counted = _counted(values, known)
    return float(counted.mean() / math.log(ours.shape[1])) if len(counted) else 0.0


def _counted(values: Any, known: list[int]) -> Any:
    """The values of the answers that have a label, all where the data says none."""
    return values[_array(known) != IGNORED] if known else values


def _array(known: list[int]) -> ndarray:
    import numpy

    return numpy.array(known, dtype=int)
