"""BatchNorm by the batch's own statistics (Ioffe, Szegedy, 2015), residual addition and activation.

x is [M, C]: the pixels of a channels_last map. y = act((x - mean) * rstd * weight + bias + residual),
rstd = 1 / sqrt(var + eps), with mean and biased variance of each channel over all pixels, of x as stored:
`batch_norm_stats` takes them.

Backward: with xhat = (x - mean) * rstd and g = dy where y > 0, dbias = sum(g), dweight = sum(g * xhat) and
dx = weight * rstd * (g - dbias / M - xhat * dweight / M); dresidual = g. One launch leaves shares of both
sums, the second adds them in a fixed order, the third writes dx and dresidual. Of statistics that are given
dx = weight * rstd * g, which the first writes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastvr.kernels.activations import relu
from fastvr.kernels.batch_norm_stats import MERGE, merge_config, rows_a_part
from fastvr.kernels.common import ceil_div, launch, sum_shares


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
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.load(var_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32) + eps)
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
    parts_ptr,  # [ceil(M / ROWS), 2, C] float32: shares of dbias, then of dweight; or None
    dx_ptr,  # [M, C], of statistics that are given; or None
    dresidual_ptr,  # [M, C], with dx or in its place; or None
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
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.load(var_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32) + eps)
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
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offs, grad.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if dx_ptr is not None:
            weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
            dx = grad * (rstd * weight)[None, :]
            tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dbias += grad
        along += grad * deviation
    if parts_ptr is not None:
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
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.load(var_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32) + eps)
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
        (2 * ceil_div(C, MERGE["BLOCK_N"]),),
        merge_config(config),
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
    parts: torch.Tensor | None,  # [ceil(M / rows_a_part), 2, C] float32, with dweight or, unless frozen, dx
    sums: torch.Tensor | None,  # [2, C] float32, with parts
    dx: torch.Tensor | None,  # [M, C]
    dweight: torch.Tensor | None,  # [C]
    dbias: torch.Tensor | None,  # [C], with dweight
    dresidual: torch.Tensor | None,  # [M, C]
    frozen: bool,  # mean and var are not the batch's
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
    if parts is not None or frozen:
        ROWS = rows_a_part(M, C, config)
        launch(
            _batch_norm_act_bwd_sums_kernel,
            (ceil_div(M, ROWS) * num_c,),
            config,
            **maps,
            parts_ptr=parts,
            dx_ptr=dx if frozen else None,
            dresidual_ptr=dresidual if frozen else None,
            M=M,
            C=C,
            ROWS=ROWS,
            eps=eps,
        )
    if parts is not None:
        assert sums is not None
        merge_gradient_sums(parts=parts, sums=sums, dweight=dweight, dbias=dbias, config=config)
    if not frozen and (dx is not None or dresidual is not None):
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
