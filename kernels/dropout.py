"""Dropout's random numbers by their place: the words of Philox 4x32-10 (Salmon et al., 2011) at a counter
that says which sample, head, query and key they are for. Whatever a program's tiles, forward or backward, the
same cell finds the same word, and nothing is kept.

One counter gives four words, for four keys that are neighbours. `fastvr.reference.dropout` is the same in
PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept(
    seed_ptr,  # [2] int64: Philox's key, and the last word of its counter
    plane,  # sample * heads + head
    first_query,
    first_key,  # a multiple of 4
    threshold,  # int32: a word below it, as a signed number, drops its cell
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,  # a multiple of 4
):
    """Which cells of a block [QUERIES, KEYS] of attention weights stay."""
    GROUPS: tl.constexpr = KEYS // 4
    queries = first_query + tl.arange(0, QUERIES)[:, None]
    groups = first_key // 4 + tl.arange(0, GROUPS)[None, :]
    zeros = tl.zeros((QUERIES, GROUPS), tl.int32)
    last = tl.load(seed_ptr + 1).to(tl.int32)
    a, b, c, d = tl.philox(tl.load(seed_ptr), zeros + groups, zeros + queries, zeros + plane, zeros + last)
    # bytes: what moves between threads where a block's layout is the product's
    a = (a.to(tl.int32, bitcast=True) >= threshold).to(tl.int8)
    b = (b.to(tl.int32, bitcast=True) >= threshold).to(tl.int8)
    c = (c.to(tl.int32, bitcast=True) >= threshold).to(tl.int8)
    d = (d.to(tl.int32, bitcast=True) >= threshold).to(tl.int8)
    four = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(four, (QUERIES, KEYS)) != 0
