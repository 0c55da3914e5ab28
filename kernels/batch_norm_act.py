"""BatchNorm by the batch's own statistics (Ioffe, Szegedy, 2015), residual addition and activation.

x is [M, C]: the pixels of a channels_last map. y = act((x - mean) * rstd * weight + bias + residual),
rstd = 1 / sqrt(var + eps), with mean and biased variance of each channel over all pixels, of x as stored.

Statistics: a program walks through rows of its own and leaves their sum, their mean and M2, the sum of
squared deviations; sums of squares would lose everything at a mean of 1,000 deviations. Every lane of its
tile takes the recurrence of Youngs and Cramer (1971) on values from which the first pixel's is subtracted;
lanes, and in a second launch parts, are merged by the formula of Chan, Golub and LeVeque (1979), for many
sets at once and in a fixed order. The mean itself comes from plain sums: what is subtracted and added again
would round at its own size. The third launch normalises.

Backward: with xhat = (x - mean) * rstd and g = dy where y > 0, dbias = sum(g), dweight = sum(g * xhat) and
dx = weight * rstd * (g - dbias / M - xhat * dweight / M); dresidual = g. One launch leaves shares of both
sums, the second adds them in a fixed order, the third writes dx and dresidual.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastvr.kernels.activations import relu
from fastvr.kernels.common import ceil_div, launch, sum_shares


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
    parts_ptr,  # [ceil(M / ROWS), 3, C] float32: sum, mean - x[0], M2
    mean_ptr,  # [C] float32
    var_ptr,  # [C] float32
    M,
    C,
    ROWS,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < C
    num_parts = tl.cdiv(M, ROWS)
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    shifted = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < num_parts)[:, None] & mask_n[None, :]
        size = tl.minimum(M - offs_p * ROWS, ROWS).to(tl.float32)[:, None]
        parts = parts_ptr + offs_p.to(tl.int64)[:, None] * 3 * C + offs_n[None, :]
        total += tl.load(parts, mask=mask, other=0.0)
        shifted += tl.load(parts + C, mask=mask, other=0.0) * size
    whole = tl.sum(shifted, 0) / M
    m2 = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < num_parts)[:, None] & mask_n[None, :]
        size = tl.minimum(M - offs_p * ROWS, ROWS).to(tl.float32)[:, None]
        parts = parts_ptr + offs_p.to(tl.int64)[:, None] * 3 * C + offs_n[None, :]
        deviation = tl.load(parts + C, mask=mask, other=0.0) - whole[None, :]
        inner = tl.load(parts + 2 * C, mask=mask, other=0.0)
        m2 += tl.where(mask, inner + size * deviation * deviation, 0.0)
    tl.store(mean_ptr + offs_n, tl.sum(total, 0) / M, mask=mask_n)
    tl.store(var_ptr + offs_n, tl.sum(m2, 0) / M, mask=mask_n)


@triton.jit(do_not_specialize=["M"])
def _batch_norm_act_fwd_kernel(
    x_ptr,  # [M, C]
    mean_ptr,  # [C] float32
    var_ptr,  # [C] float32
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    residual_ptr,  # [M, C] or None
    y_ptr,  # [M, C]
    M,
    C,
    eps,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_c = tl.cdiv(C, BLOCK_C)
    offs_m = tl.program_id(0) // num_c * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(0) % num_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_m < M)[:, None] & mask_c[None, :]
    offs = offs_m.to(tl.int64)[:, None] * C + offs_c[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    rstd = tl.rsqrt(tl.load(var_ptr + offs_c, mask=mask_c, other=0.0) + eps)
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    y = (x - mean[None, :]) * (rstd * weight)[None, :] + bias[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        y = relu(y)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _masked_grad(grad_ptr, y_ptr, deviation, weight_ptr, bias_ptr, rstd, offs, offs_c, mask, mask_c):
    """The gradient behind the activation, where the result was above 0: by y, or with a bias, where there is
    no residual, by what it is computed from; without both there is no activation."""
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        # a NaN lets the gradient through, as PyTorch has it
        grad = tl.where(deviation * (rstd * weight)[None, :] + bias[None, :] <= 0.0, 0.0, grad)
    elif y_ptr is not None:
        y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        grad = tl.where(y <= 0.0, 0.0, grad)
    return grad


@triton.jit(do_not_specialize=["M", "ROWS"])
def _batch_norm_act_bwd_sums_kernel(
    grad_ptr,  # [M, C]
    x_ptr,  # [M, C]
    y_ptr,  # [M, C] or None
    mean_ptr,  # [C] float32
    var_ptr,  # [C] float32
    weight_ptr,  # [C]
    bias_ptr,  # [C] or None
    parts_ptr,  # [ceil(M / ROWS), 2, C] float32: shares of dbias, then of dweight
    M,
    C,
    ROWS,  # of each part
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_c = tl.cdiv(C, BLOCK_C)
    part = tl.program_id(0) // num_c
    offs_c = tl.program_id(0) % num_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    rstd = tl.rsqrt(tl.load(var_ptr + offs_c, mask=mask_c, other=0.0) + eps)
    first = part * ROWS
    stop = tl.minimum(first + ROWS, M)
    dbias = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    along = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(first, stop, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < stop)[:, None] & mask_c[None, :]
        offs = rows.to(tl.int64)[:, None] * C + offs_c[None, :]
        deviation = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        grad = _masked_grad(
            grad_ptr, y_ptr, deviation, weight_ptr, bias_ptr, rstd, offs, offs_c, mask, mask_c
        )
        dbias += grad
        along += grad * deviation
    parts = parts_ptr + part.to(tl.int64) * 2 * C + offs_c
    tl.store(parts, tl.sum(dbias, 0), mask=mask_c)
    tl.store(parts + C, tl.sum(along, 0) * rstd, mask=mask_c)


@triton.jit(do_not_specialize=["PARTS"])
def _batch_norm_act_bwd_merge_kernel(
    parts_ptr,  # [PARTS, 2, C] float32
    sums_ptr,  # [2, C] float32: dbias and dweight, unrounded
    dweight_ptr,  # [C] or None
    dbias_ptr,  # [C], with dweight
    PARTS,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums over all parts, BLOCK_N columns of one of the two a program."""
    blocks = tl.cdiv(C, BLOCK_N)
    which = tl.program_id(0) // blocks
    offs_n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < C
    result = sum_shares(parts_ptr, which, offs_n, PARTS, C, BLOCK_P, BLOCK_N)
    tl.store(sums_ptr + which * C + offs_n, result, mask=mask_n)
    if dweight_ptr is not None:
        if which == 0:
            tl.store(dbias_ptr + offs_n, result.to(dbias_ptr.dtype.element_ty), mask=mask_n)
        else:
            tl.store(dweight_ptr + offs_n, result.to(dweight_ptr.dtype.element_ty), mask=mask_n)


@triton.jit(do_not_specialize=["M"])
def _batch_norm_act_bwd_kernel(
    grad_ptr,  # [M, C]
    x_ptr,  # [M, C]
    y_ptr,  # [M, C] or None
    mean_ptr,  # [C] float32
    var_ptr,  # [C] float32
    weight_ptr,  # [C]
    bias_ptr,  # [C] or None
    sums_ptr,  # [2, C] float32, with dx
    dx_ptr,  # [M, C] or None
    dresidual_ptr,  # [M, C] or None
    M,
    C,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_c = tl.cdiv(C, BLOCK_C)
    offs_m = tl.program_id(0) // num_c * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(0) % num_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_m < M)[:, None] & mask_c[None, :]
    offs = offs_m.to(tl.int64)[:, None] * C + offs_c[None, :]
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    rstd = tl.rsqrt(tl.load(var_ptr + offs_c, mask=mask_c, other=0.0) + eps)
    # of no use to dresidual, and not loaded then
    deviation = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    grad = _masked_grad(grad_ptr, y_ptr, deviation, weight_ptr, bias_ptr, rstd, offs, offs_c, mask, mask_c)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + offs, grad.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if dx_ptr is not None:
        weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        dbias = tl.load(sums_ptr + offs_c, mask=mask_c, other=0.0) / M
        along = tl.load(sums_ptr + C + offs_c, mask=mask_c, other=0.0) / M * rstd
        dx = grad - dbias[None, :] - deviation * along[None, :]
        dx = dx * (rstd * weight)[None, :]
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


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
_MERGE = {"BLOCK_P": 64, "BLOCK_N": 16}


def rows_a_part(m: int, c: int, config: dict[str, int]) -> int:
    """How many of ``m`` rows a reducing program walks through; a multiple of its tile's."""
    most = max(1, _PROGRAMS // ceil_div(c, config["BLOCK_C"]))
    return ceil_div(ceil_div(m, config["BLOCK_M"]), most) * config["BLOCK_M"]


def _merge_config(config: dict[str, int]) -> dict[str, int]:
    return _MERGE | {name: config[name] for name in ("num_warps", "num_stages")}


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
    launch(
        _batch_norm_merge_kernel,
        (ceil_div(C, _MERGE["BLOCK_N"]),),
        _merge_config(config),
        parts_ptr=parts,
        mean_ptr=mean,
        var_ptr=var,
        ROWS=ROWS,
        **sizes,
    )


def launch_batch_norm_act_fwd(
    *,
    x: torch.Tensor,  # [M, C], this and all that follows contiguous
    mean: torch.Tensor,  # [C] float32
    var: torch.Tensor,  # [C] float32
    weight: torch.Tensor,  # [C]
    bias: torch.Tensor,  # [C]
    residual: torch.Tensor | None,  # [M, C]
    y: torch.Tensor,  # [M, C]
    eps: float,
    act: str,
    config: dict[str, int],
) -> None:
    M, C = x.shape
    launch(
        _batch_norm_act_fwd_kernel,
        (ceil_div(M, config["BLOCK_M"]) * ceil_div(C, config["BLOCK_C"]),),
        config,
        x_ptr=x,
        mean_ptr=mean,
        var_ptr=var,
        weight_ptr=weight,
        bias_ptr=bias,
        residual_ptr=residual,
        y_ptr=y,
        eps=eps,
        RELU=act == "relu",
        M=M,
        C=C,
    )


def merge_gradient_sums(
    *,
    parts: torch.Tensor,  # [P, 2, C] float32, this and all that follows contiguous
    sums: torch.Tensor,  # [2, C] float32
    dweight: torch.Tensor | None,  # [C]
    dbias: torch.Tensor | None,  # [C], with dweight
    config: dict[str, int],
) -> None:
    C = parts.shape[2]
    launch(
        _batch_norm_act_bwd_merge_kernel,
        (2 * ceil_div(C, _MERGE["BLOCK_N"]),),
        _merge_config(config),
        parts_ptr=parts,
        sums_ptr=sums,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        PARTS=len(parts),
        C=C,
    )


def launch_batch_norm_act_bwd(
    *,
    grad: torch.Tensor,  # [M, C], this and all that follows contiguous
    x: torch.Tensor,  # [M, C]
    y: torch.Tensor | None,  # [M, C], of an activation behind a residual
    mean: torch.Tensor,  # [C] float32
    var: torch.Tensor,  # [C] float32
    weight: torch.Tensor,  # [C]
    bias: torch.Tensor | None,  # [C], of an activation without one
    parts: torch.Tensor | None,  # [ceil(M / rows_a_part), 2, C] float32, with dx or dweight
    sums: torch.Tensor | None,  # [2, C] float32, with parts
    dx: torch.Tensor | None,  # [M, C]
    dweight: torch.Tensor | None,  # [C]
    dbias: torch.Tensor | None,  # [C], with dweight
    dresidual: torch.Tensor | None,  # [M, C]
    eps: float,
    config: dict[str, int],
) -> None:
    M, C = x.shape
    maps: dict[str, Any] = {
        "grad_ptr": grad,
        "x_ptr": x,
        "y_ptr": y,
        "mean_ptr": mean,
        "var_ptr": var,
        "weight_ptr": weight,
        "bias_ptr": bias,
    }
    num_c = ceil_div(C, config["BLOCK_C"])
    if parts is not None:
        launch(
            _batch_norm_act_bwd_sums_kernel,
            (len(parts) * num_c,),
            config,
            **maps,
            parts_ptr=parts,
            M=M,
            C=C,
            ROWS=rows_a_part(M, C, config),
            eps=eps,
        )
        assert sums is not None
        merge_gradient_sums(parts=parts, sums=sums, dweight=dweight, dbias=dbias, config=config)
    if dx is not None or dresidual is not None:
        launch(
            _batch_norm_act_bwd_kernel,
            (ceil_div(M, config["BLOCK_M"]) * num_c,),
            config,
            **maps,
            sums_ptr=sums,
            dx_ptr=dx,
            dresidual_ptr=dresidual,
            M=M,
            C=C,
            eps=eps,
        )
