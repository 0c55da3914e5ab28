"""Statistics of the channels of a map, and how the passes of BatchNorm in training over maps are laid out.

x is [M, C]: the pixels of a channels_last map. A program walks through rows of its own and leaves their sum,
their mean and M2, the sum of squared deviations; sums of squares would lose everything at a mean of 1,000
deviations. Every lane of its tile takes the recurrence of Youngs and Cramer (1971) on values from which the
first pixel's is subtracted; lanes, and in a second launch parts, are merged by the formula of Chan, Golub and
LeVeque (1979), for many sets at once and in a fixed order. The mean itself comes from plain sums: what is
subtracted and added again would round at its own size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastvr.kernels.common import ceil_div, launch


@triton.jit(do_not_specialize=["M", "ROWS"])
def _batch_norm_stats_kernel(
    x_ptr,  # [M, C]
    parts_ptr,  # [ceil(M / ROWS), 3, C] float32: sum, mean - x[0], M2
    M,
    C,
    ROWS,  # of each part
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_c = tl.cdiv(C, BLOCK_C)
    part = tl.program_id(0) // num_c
    lanes = tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(0) % num_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    first = part * ROWS
    stop = tl.minimum(first + ROWS, M)
    # exactly subtracted where the mean is many deviations
    base = tl.load(x_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    count = 0.0
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    shifted = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(first, stop, BLOCK_M):
        rows = start + lanes
        mask = (rows < stop)[:, None] & mask_c[None, :]
        x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * C + offs_c[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        count += 1.0
        total += x
        x = tl.where(mask, x - base, 0.0)
        shifted += x
        # the first row deviates by 0 from its own mean
        deviation = tl.where(mask, count * x - shifted, 0.0)
        m2 += deviation * deviation * (1.0 / tl.maximum(count * (count - 1.0), 1.0))
    # how many rows each lane has taken
    taken = tl.maximum((stop - first - lanes + BLOCK_M - 1) // BLOCK_M, 0).to(tl.float32)[:, None]
    whole = tl.sum(shifted, 0) / (stop - first)
    deviation = shifted / tl.maximum(taken, 1.0) - whole[None, :]
    parts = parts_ptr + part.to(tl.int64) * 3 * C + offs_c
    tl.store(parts, tl.sum(total, 0), mask=mask_c)
    tl.store(parts + C, whole, mask=mask_c)
    tl.store(parts + 2 * C, tl.sum(m2 + taken * deviation * deviation, 0), mask=mask_c)


@triton.jit(do_not_specialize=["M", "ROWS"])
def _batch_norm_merge_kernel(
    parts_ptr,  # [ceil(M / ROWS), 3, C] float32: sum, mean - x[0], M2; or [ceil(M / ROWS), 2, C]: sum, M2
    mean_ptr,  # [C] float32
    var_ptr,  # [C] float32
    M,
    C,
    ROWS,
    SHIFTED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    SUMS: tl.constexpr = 3 if SHIFTED else 2
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < C
    num_parts = tl.cdiv(M, ROWS)
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    shifted = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < num_parts)[:, None] & mask_n[None, :]
        size = tl.minimum(M - offs_p * ROWS, ROWS).to(tl.float32)[:, None]
        parts = parts_ptr + offs_p.to(tl.int64)[:, None] * SUMS * C + offs_n[None, :]
        share = tl.load(parts, mask=mask, other=0.0)
        total += share
        if SHIFTED:
            share = tl.load(parts + C, mask=mask, other=0.0) * size
        shifted += share
    whole = tl.sum(shifted, 0) / M
    m2 = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < num_parts)[:, None] & mask_n[None, :]
        size = tl.minimum(M - offs_p * ROWS, ROWS).to(tl.float32)[:, None]
        parts = parts_ptr + offs_p.to(tl.int64)[:, None] * SUMS * C + offs_n[None, :]
        if SHIFTED:
            mean = tl.load(parts + C, mask=mask, other=0.0)
        else:
            mean = tl.load(parts, mask=mask, other=0.0) / tl.maximum(size, 1.0)
        deviation = mean - whole[None, :]
        inner = tl.load(parts + (SUMS - 1) * C, mask=mask, other=0.0)
        m2 += tl.where(mask, inner + size * deviation * deviation, 0.0)
    tl.store(mean_ptr + offs_n, tl.sum(total, 0) / M, mask=mask_n)
    tl.store(var_ptr + offs_n, tl.sum(m2, 0) / M, mask=mask_n)


def _tile(m: int, c: int, num_warps: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_C": c, "num_warps": num_warps, "num_stages": 1}


def candidate_configs(c: int, dtype: torch.dtype, arch: str) -> list[dict[str, int]]:
    """Tiles of the passes over the maps, forward and backward; the first is the default.

    64 channels of 16 bits are whole cache lines. The passes that reduce hold up to three float32 sums beside
    what they load: 16 of each a thread leave room for several programs a multiprocessor.
    """
    if arch == "interpreter":
        return [_tile(512, 64, 4), _tile(32, 32, 4)]
    # as many bytes whatever the dtype
    size = 4096 // dtype.itemsize
    wide = [_tile(size // 128, 128, 4)] if c > 64 else []
    return [_tile(size // 64, 64, 4), *wide, _tile(2 * size // 64, 64, 8), _tile(size // 128, 64, 4)]


def default_config(c: int, dtype: torch.dtype, arch: str) -> dict[str, int]:
    return candidate_configs(c, dtype, arch)[0]


# Programs that reduce: a large GPU holds about this many at a time. More make nothing faster, and each leaves
# a part that is read again.
_PROGRAMS = 512
MERGE = {"BLOCK_P": 64, "BLOCK_N": 16}


def rows_a_part(m: int, c: int, config: dict[str, int]) -> int:
    """How many of ``m`` rows a reducing program walks through; a multiple of its tile's."""
    most = max(1, _PROGRAMS // ceil_div(c, config["BLOCK_C"]))
    return ceil_div(ceil_div(m, config["BLOCK_M"]), most) * config["BLOCK_M"]


def merge_config(config: dict[str, int]) -> dict[str, int]:
    return MERGE | {name: config[name] for name in ("num_warps", "num_stages")}


def launch_batch_norm_stats(
    *,
    x: torch.Tensor,  # [M, C], this and all that follows contiguous
    parts: torch.Tensor,  # [ceil(M / rows_a_part), 3, C] float32
    mean: torch.Tensor,  # [C] float32
    var: torch.Tensor,  # [C] float32
    config: dict[str, int],
) -> None:
    M, C = x.shape
    sizes = {"M": M, "C": C}
    ROWS = rows_a_part(M, C, config)
    num_c = ceil_div(C, config["BLOCK_C"])
    launch(
        _batch_norm_stats_kernel, (len(parts) * num_c,), config, x_ptr=x, parts_ptr=parts, ROWS=ROWS, **sizes
    )
    merge_moments(parts=parts, mean=mean, var=var, M=M, ROWS=ROWS, config=config)


def merge_moments(
    *,
    parts: torch.Tensor,  # [ceil(M / ROWS), 3 or 2, C] float32: sum, mean - x[0] or nothing, M2
    mean: torch.Tensor,  # [C] float32
    var: torch.Tensor,  # [C] float32
    M: int,
    ROWS: int,
    config: dict[str, int],
) -> None:
    sums, C = parts.shape[1:]
    # a convolution leaves a part a tile, thousands of them
    block_p = 256 if sums == 2 else MERGE["BLOCK_P"]
    launch(
        _batch_norm_merge_kernel,
        (ceil_div(C, MERGE["BLOCK_N"]),),
        merge_config(config) | {"BLOCK_P": block_p},
        parts_ptr=parts,
        mean_ptr=mean,
        var_ptr=var,
        M=M,
        C=C,
        ROWS=ROWS,
        SHIFTED=sums == 3,
    )
