"""What a graph's time goes into, in TVM's own language: products with packed weights, attention with a cache, norms.

Imported by who has opened TVM's toolchain (library.py). Sizes of a model are constants of a kernel; the number of sequences, of
their tokens and of the cache's places are known only when it runs.
"""

# mypy: disable-error-code="attr-defined, name-defined, valid-type, no-any-return"
from __future__ import annotations

from functools import cache
from typing import Any

from tvm.script import tirx as T

LANES = 64
"""Places of a cache that are looked at together; a cache holds a multiple of them."""
LOWEST = -3.0e38


def exponential(x: Any) -> Any:
    """e^x in float32 to 2 units in the last place, for x up to 88; 0 for what is too small (Cephes, expf)."""
    bound = T.max(T.min(x, T.float32(88.3)), T.float32(-87.3))
    whole = T.floor(bound * T.float32(1.44269504088896341) + T.float32(0.5))
    rest = bound - whole * T.float32(0.693359375) + whole * T.float32(2.12194440e-4)
    series = T.float32(1.9875691500e-4)
    for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        series = series * rest + T.float32(term)
    power = T.reinterpret("float32", (T.Cast("int32", whole) + 127) << 23)
    return (series * rest * rest + rest + T.float32(1)) * power


@cache
def linear(outputs: int, inputs: int, width: int, kind: str) -> Any:
    """x [rows, inputs] by weights in panels of `width` outputs, [panels, inputs, width], their scales, and a bias: [rows, outputs].

    kind: of the weights, float32 or int8; integers become floats as they are read, and are scaled once for each output. Six rows
    at a time share each weight that is read; with panels of four vectors that fills the registers of AVX-512.
    """
    panels = -(-outputs // width)

    @T.inline
    def tile(x, w, s, b, o, panel, first, count):
        acc = T.alloc_buffer((count, width), "float32", scope="local")
        for r in T.unroll(count):
            for j in T.vectorized(width):
                acc[r, j] = T.float32(0)
        for k in T.serial(inputs):
            for r in T.unroll(count):
                for j in T.vectorized(width):
                    acc[r, j] = acc[r, j] + x[first + r, k] * T.Cast("float32", w[panel, k, j])
        for r in T.unroll(count):
            for j in T.serial(width):
                if panel * width + j < outputs:
                    o[first + r, panel * width + j] = acc[r, j] * s[panel * width + j] + b[panel * width + j]

    @T.prim_func(private=True, s_tir=True)
    def kernel(px: T.handle, pw: T.handle, ps: T.handle, pb: T.handle, po: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        x = T.match_buffer(px, (rows, inputs), "float32")
        w = T.match_buffer(pw, (panels, inputs, width), kind)
        s = T.match_buffer(ps, (panels * width,), "float32")
        b = T.match_buffer(pb, (panels * width,), "float32")
        o = T.match_buffer(po, (rows, outputs), "float32")
        for panel in T.parallel(panels):
            for t in T.serial(rows // 6):
                tile(x, w, s, b, o, panel, t * 6, 6)
            if rows % 6 == 1:
                tile(x, w, s, b, o, panel, rows - 1, 1)
            if rows % 6 == 2:
                tile(x, w, s, b, o, panel, rows - 2, 2)
            if rows % 6 == 3:
                tile(x, w, s, b, o, panel, rows - 3, 3)
            if rows % 6 == 4:
                tile(x, w, s, b, o, panel, rows - 4, 4)
            if rows % 6 == 5:
                tile(x, w, s, b, o, panel, rows - 5, 5)

    return kernel


@cache
def attention(heads: int, groups: int, width: int, value_width: int, scale: float, causal: bool) -> Any:
    """Attention of new tokens to what the cache holds and to each other; their keys and values are put into the cache.

    Queries [batch, heads, tokens, width], keys and values [batch, groups, tokens, width]; keys are kept transposed,
    [layers, batch, groups, width, places], values [layers, batch, groups, places, value_width]. bounds, int64 [batch]: causal, the
    place of each sequence's first new token; else how many of its tokens are no padding. Out: [batch, tokens, heads, value_width].
    """
    share = heads // groups

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        pq: T.handle,
        pk: T.handle,
        pv: T.handle,
        pkeys: T.handle,
        pvalues: T.handle,
        pbounds: T.handle,
        player: T.handle,
        po: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        batch, tokens, layers, places = T.int64(), T.int64(), T.int64(), T.int64()
        q = T.match_buffer(pq, (batch, heads, tokens, width), "float32")
        k = T.match_buffer(pk, (batch, groups, tokens, width), "float32")
        v = T.match_buffer(pv, (batch, groups, tokens, value_width), "float32")
        keys = T.match_buffer(pkeys, (layers, batch, groups, width, places), "float32")
        values = T.match_buffer(pvalues, (layers, batch, groups, places, value_width), "float32")
        bounds = T.match_buffer(pbounds, (batch,), "int64")
        layer = T.match_buffer(player, (), "int64")
        o = T.match_buffer(po, (batch, tokens, heads, value_width), "float32")
        for bg in T.parallel(batch * groups):
            b: T.let = bg // groups
            g: T.let = bg % groups
            first: T.let = bounds[b] if causal else T.int64(0)
            scores = T.alloc_buffer((places,), "float32")
            acc = T.alloc_buffer((LANES,), "float32", scope="local")
            most = T.alloc_buffer((LANES,), "float32", scope="local")
            out = T.alloc_buffer((value_width,), "float32", scope="local")
            top = T.alloc_buffer((1,), "float32", scope="local")
            total = T.alloc_buffer((1,), "float32", scope="local")
            for i in T.serial(tokens):
                for d in T.serial(width):
                    keys[layer[()], b, g, d, first + i] = k[b, g, i, d]
                for d in T.serial(value_width):
                    values[layer[()], b, g, first + i, d] = v[b, g, i, d]
            for i, r in T.grid(tokens, share):
                seen: T.let = bounds[b] + i + 1 if causal else bounds[b]
                for j in T.vectorized(LANES):
                    most[j] = T.float32(LOWEST)
                for c in T.serial((seen + LANES - 1) // LANES):
                    for j in T.vectorized(LANES):
                        acc[j] = T.float32(0)
                    for d in T.serial(width):
                        for j in T.vectorized(LANES):
                            acc[j] = acc[j] + q[b, g * share + r, i, d] * keys[layer[()], b, g, d, c * LANES + j]
                    for j in T.vectorized(LANES):
                        acc[j] = T.Select(c * LANES + j < seen, acc[j] * T.float32(scale), T.float32(LOWEST))
                        most[j] = T.max(most[j], acc[j])
                        scores[c * LANES + j] = acc[j]
                top[0] = most[0]
                for j in T.serial(LANES):
                    top[0] = T.max(top[0], most[j])
                for j in T.vectorized(LANES):
                    acc[j] = T.float32(0)
                for c in T.serial((seen + LANES - 1) // LANES):
                    for j in T.vectorized(LANES):
                        scores[c * LANES + j] = exponential(scores[c * LANES + j] - top[0])
                    for j in T.vectorized(LANES):
                        acc[j] = acc[j] + T.Select(c * LANES + j < seen, scores[c * LANES + j], T.float32(0))
                total[0] = T.float32(0)
                for j in T.serial(LANES):
                    total[0] = total[0] + acc[j]
                for d in T.vectorized(value_width):
                    out[d] = T.float32(0)
                for j in T.serial(seen):
                    for d in T.vectorized(value_width):
                        out[d] = out[d] + scores[j] * values[layer[()], b, g, j, d]
                for d in T.vectorized(value_width):
                    o[b, i, g * share + r, d] = out[d] / total[0]

    return kernel
