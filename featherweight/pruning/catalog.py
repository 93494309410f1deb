"""The pruning methods: a file and a line each. Another package adds its own through an entry point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from featherweight.catalog import Catalog

if TYPE_CHECKING:
    from featherweight.pruning.interface import Pruner

DEFAULT = "structured"
"""The method of a recipe that names none."""

PRUNERS: Catalog[Pruner[Any]] = Catalog(
    "pruning method",
    "featherweight.pruners",
    {
        "structured": "featherweight.pruning.structured:STRUCTURED",
        "depth": "featherweight.pruning.depth:DEPTH",
        "width": "featherweight.pruning.width:WIDTH",
        "attention": "featherweight.pruning.attention:ATTENTION",
        "vocabulary": "featherweight.pruning.vocabulary:VOCABULARY",
        "sparse": "featherweight.pruning.sparse:SPARSE",
    },
)
