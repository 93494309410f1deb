"""Keys of a pruning that nothing would read are refused."""

from __future__ import annotations

from typing import Any

import pytest

from featherweight.pruning.spec import PruneSpec


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"criterion": "activation"}, "criterion\n.*vectorize"),
        ({"scope": "global", "mlp": False}, "it wants mlp"),
        ({"method": "attention"}, "wants kv_heads"),
        ({"kv_heads": 1}, "kv_heads plays no role with method structured"),
        ({"layers": 2}, "layers plays no role with method structured"),
        ({"method": "width", "stack": "decoder"}, "stack plays no role with method width"),
        ({"method": "width", "scope": "global"}, "scope plays no role with method width"),
        ({"method": "width", "hidden": 32, "ratio": 0.5}, "ratio plays no role beside hidden"),
        ({"method": "depth", "layers": 2, "ratio": 0.5}, "ratio plays no role beside layers"),
        ({"method": "depth", "criterion": "l1"}, "criterion plays no role with method depth"),
        ({"method": "depth", "pattern": "2:4"}, "pattern plays no role with method depth"),
        ({"method": "attention", "kv_heads": 1, "ratio": 0.25}, "ratio plays no role with method attention"),
        ({"method": "sparse", "ratio": 0.5}, "ratio plays no role with method sparse"),
        ({"method": "sparse", "mlp": True}, "mlp plays no role with method sparse"),
        ({"sparsity": 0.5}, "sparsity plays no role with method structured"),
    ],
)
def test_keys_that_would_be_ignored_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PruneSpec.of(**options)
