"""Where a residual block in training ends: y = relu(bn(z) + shortcut), the shortcut a map or bn of one.

z is [M, C]: the pixels of a channels_last map; both BatchNorms by batch statistics that are given. Beside y
its signs are written, eight to a byte: backward reads these, a sixteenth of a 16-bit map, in place of y.

Backward: g = dy where the bit is set is the gradient of both branches. With xhat = (z - mean) * rstd,
dbias = sum(g), dweight = sum(g * xhat) and dz = weight * rstd * (g - dbias / M - xhat * dweight / M), of each
branch that a BatchNorm ends; the other receives g. One launch leaves shares of the sums of both branches,
`batch_norm_act`'s merge adds them in a fixed order, the last writes both gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastvr.kernels.activations import relu
from fastvr.kernels.batch_norm_act import merge_gradient_sums
from fastvr.kernels.batch_norm_stats import rows_a_part
from fastvr.kernels.common import ceil_div, launch


@triton.jit
def _channels(mean_ptr, var_ptr, offs_c, mask_c, eps):
    """Mean and 1 / deviation of channels, as rows."""
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    rstd = tl.rsqrt(tl.load(var_ptr + offs_c, mask=mask_c, other=0.0) + eps)
    return mean[None, :], rstd[None, :]


@triton.jit
def _normalised(z_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, offs, offs_c, mask, mask_c, eps):
    z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    mean, rstd = _channels(mean_ptr, var_ptr, offs_c, mask_c, eps)
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    return (z - mean) * (rstd * weight) + bias


@triton.jit
def _signs(signs_ptr, rows, first_c, stop, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """The bits of a tile, one a lane."""
    offs = first_c // 8 + tl.arange(0, BLOCK_C // 8)
    mask = (rows < stop)[:, None] & (offs * 8 < C)[None, :]
    signs_ptrs = signs_ptr + rows.to(tl.int64)[:, None] * (C // 8) + offs[None, :]
    bytes = tl.load(signs_ptrs, mask=mask, other=0).to(tl.int32)
    bits = (bytes[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_M, BLOCK_C)) != 0


@triton.jit
def _masked_grad(
    grad_ptr,
    signs_ptr,  # or None
    y_ptr,  # without signs
    rows,
    first_c,
    stop,
    C,
    offs,
    mask,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if signs_ptr is not None:
        return tl.where(_signs(signs_ptr, rows, first_c, stop, C, BLOCK_M, BLOCK_C), grad, 0.0)
    else:
        y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        # a NaN lets the gradient through, as PyTorch has it
        return tl.where(y <= 0.0, 0.0, grad)


@triton.jit(do_not_specialize=["M"])
def _residual_block_fwd_kernel(
    z_ptr,  # [M, C]
    mean_ptr,  # [C] float32, and var
    var_ptr,
    weight_ptr,  # [C], and bias
    bias_ptr,
    shortcut_ptr,  # [M, C]
    shortcut_mean_ptr,  # [C] float32, or None: the shortcut is added as it is
    shortcut_var_ptr,
    shortcut_weight_ptr,
    shortcut_bias_ptr,
    y_ptr,  # [M, C]
    signs_ptr,  # [M, C / 8] uint8 or None
    M,
    C,
    eps,
    shortcut_eps,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_c = tl.cdiv(C, BLOCK_C)
    offs_m = tl.program_id(0) // num_c * BLOCK_M + tl.arange(0, BLOCK_M)
    first_c = tl.program_id(0) % num_c * BLOCK_C
    offs_c = first_c + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_m < M)[:, None] & mask_c[None, :]
    offs = offs_m.to(tl.int64)[:, None] * C + offs_c[None, :]
    y = _normalised(z_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, offs, offs_c, mask, mask_c, eps)
    if shortcut_mean_ptr is not None:
        y += _normalised(
            shortcut_ptr, shortcut_mean_ptr, shortcut_var_ptr, shortcut_weight_ptr, shortcut_bias_ptr,
            offs, offs_c, mask, mask_c, shortcut_eps,
        )  # fmt: skip
    else:
        y += tl.load(shortcut_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, relu(y).to(y_ptr.dtype.element_ty), mask=mask)
    if signs_ptr is not None:
        # a NaN counts as let through
        bits = tl.where(y <= 0.0, 0, 1)
        bits = tl.reshape(bits, (BLOCK_M, BLOCK_C // 8, 8)) << tl.arange(0, 8)[None, None, :]
        offs_b = first_c // 8 + tl.arange(0, BLOCK_C // 8)
        mask_b = (offs_m < M)[:, None] & (offs_b * 8 < C)[None, :]
        signs_ptrs = signs_ptr + offs_m.to(tl.int64)[:, None] * (C // 8) + offs_b[None, :]
        tl.store(signs_ptrs, tl.sum(bits, 2).to(tl.uint8), mask=mask_b)


@triton.jit(do_not_specialize=["M", "ROWS"])
def _residual_block_bwd_sums_kernel(
    grad_ptr,  # [M, C]
    signs_ptr,  # [M, C / 8] uint8, or None with y
    y_ptr,  # [M, C] or None
    z_ptr,  # [M, C]
    mean_ptr,  # [C] float32, and var
    var_ptr,
    shortcut_ptr,  # [M, C] or None, and so are its mean and var
    shortcut_mean_ptr,
    shortcut_var_ptr,
    parts_ptr,  # [ceil(M / ROWS), 2, C] float32: shares of dbias, then of dweight
    shortcut_parts_ptr,  # likewise of the shortcut's, or None
    M,
    C,
    ROWS,  # of each part
    eps,
    shortcut_eps,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_c = tl.cdiv(C, BLOCK_C)
    part = tl.program_id(0) // num_c
    first_c = tl.program_id(0) % num_c * BLOCK_C
    offs_c = first_c + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean, rstd = _channels(mean_ptr, var_ptr, offs_c, mask_c, eps)
    first = part * ROWS
    stop = tl.minimum(first + ROWS, M)
    dbias = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    along = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    shortcut_along = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(first, stop, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < stop)[:, None] & mask_c[None, :]
        offs = rows.to(tl.int64)[:, None] * C + offs_c[None, :]
        grad = _masked_grad(grad_ptr, signs_ptr, y_ptr, rows, first_c, stop, C, offs, mask, BLOCK_M, BLOCK_C)
        dbias += grad
        z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        along += grad * (z - mean)
        if shortcut_ptr is not None:
            shortcut_mean = tl.load(shortcut_mean_ptr + offs_c, mask=mask_c, other=0.0)[None, :]
            z = tl.load(shortcut_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            shortcut_along += grad * (z - shortcut_mean)
    share = part.to(tl.int64) * 2 * C + offs_c
    total = tl.sum(dbias, 0)
    tl.store(parts_ptr + share, total, mask=mask_c)
    tl.store(parts_ptr + share + C, tl.sum(along * rstd, 0), mask=mask_c)
    if shortcut_ptr is not None:
        _, rstd = _channels(shortcut_mean_ptr, shortcut_var_ptr, offs_c, mask_c, shortcut_eps)
        tl.store(shortcut_parts_ptr + share, total, mask=mask_c)
        tl.store(shortcut_parts_ptr + share + C, tl.sum(shortcut_along * rstd, 0), mask=mask_c)


@triton.jit
def _through_batch_norm(
    grad, z_ptr, mean_ptr, var_ptr, weight_ptr, sums_ptr, offs, offs_c, mask, mask_c, M, C, eps
):
    z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    mean, rstd = _channels(mean_ptr, var_ptr, offs_c, mask_c, eps)
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    dbias = tl.load(sums_ptr + offs_c, mask=mask_c, other=0.0)[None, :] / M
    along = tl.load(sums_ptr + C + offs_c, mask=mask_c, other=0.0)[None, :] / M * rstd
    return (grad - dbias - (z - mean) * along) * (rstd * weight)


@triton.jit(do_not_specialize=["M"])
def _residual_block_bwd_kernel(
    grad_ptr,  # [M, C]
    signs_ptr,  # [M, C / 8] uint8, or None with y
    y_ptr,  # [M, C] or None
    z_ptr,  # [M, C]
    mean_ptr,  # [C] float32, and var
    var_ptr,
    weight_ptr,  # [C]
    sums_ptr,  # [2, C] float32, with dz
    shortcut_ptr,  # [M, C] or None, and so are its mean, var, weight and sums
    shortcut_mean_ptr,
    shortcut_var_ptr,
    shortcut_weight_ptr,
    shortcut_sums_ptr,
    dz_ptr,  # [M, C] or None
    dshortcut_ptr,  # [M, C] or None
    M,
    C,
    eps,
    shortcut_eps,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_c = tl.cdiv(C, BLOCK_C)
    offs_m = tl.program_id(0) // num_c * BLOCK_M + tl.arange(0, BLOCK_M)
    first_c = tl.program_id(0) % num_c * BLOCK_C
    offs_c = first_c + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_m < M)[:, None] & mask_c[None, :]
    offs = offs_m.to(tl.int64)[:, None] * C + offs_c[None, :]
    grad = _masked_grad(grad_ptr, signs_ptr, y_ptr, offs_m, first_c, M, C, offs, mask, BLOCK_M, BLOCK_C)
    if dz_ptr is not None:
        dz = _through_batch_norm(
            grad, z_ptr, mean_ptr, var_ptr, weight_ptr, sums_ptr, offs, offs_c, mask, mask_c, M, C, eps
        )
        tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    if dshortcut_ptr is not None:
        if shortcut_ptr is not None:
            grad = _through_batch_norm(
                grad, shortcut_ptr, shortcut_mean_ptr, shortcut_var_ptr, shortcut_weight_ptr,
                shortcut_sums_ptr, offs, offs_c, mask, mask_c, M, C, shortcut_eps,
            )  # fmt: skip
        tl.store(dshortcut_ptr + offs, grad.to(dshortcut_ptr.dtype.element_ty), mask=mask)


def launch_residual_block_fwd(
    *,
    z: torch.Tensor,  # [M, C], this and all that follows contiguous
    mean: torch.Tensor,  # [C] float32
    var: torch.Tensor,  # [C] float32
    weight: torch.Tensor,  # [C]
    bias: torch.Tensor,  # [C]
    eps: float,
    shortcut: torch.Tensor,  # [M, C]
    shortcut_mean: torch.Tensor | None,  # [C] float32; None, as the rest: added as it is
    shortcut_var: torch.Tensor | None,
    shortcut_weight: torch.Tensor | None,  # [C]
    shortcut_bias: torch.Tensor | None,
    shortcut_eps: float,
    y: torch.Tensor,  # [M, C]
    signs: torch.Tensor | None,  # [M, C / 8] uint8
    config: dict[str, int],
) -> None:
    M, C = z.shape
    launch(
        _residual_block_fwd_kernel,
        (ceil_div(M, config["BLOCK_M"]) * ceil_div(C, config["BLOCK_C"]),),
        config,
        z_ptr=z,
        mean_ptr=mean,
        var_ptr=var,
        weight_ptr=weight,
        bias_ptr=bias,
        shortcut_ptr=shortcut,
        shortcut_mean_ptr=shortcut_mean,
        shortcut_var_ptr=shortcut_var,
        shortcut_weight_ptr=shortcut_weight,
        shortcut_bias_ptr=shortcut_bias,
        y_ptr=y,
        signs_ptr=signs,
        M=M,
        C=C,
        eps=eps,
        shortcut_eps=shortcut_eps,
    )


def launch_residual_block_bwd(
    *,
    grad: torch.Tensor,  # [M, C], this and all that follows contiguous
    signs: torch.Tensor | None,  # [M, C / 8] uint8
    y: torch.Tensor | None,  # [M, C], without signs
    z: torch.Tensor,  # [M, C]
    mean: torch.Tensor,  # [C] float32
    var: torch.Tensor,  # [C] float32
    weight: torch.Tensor,  # [C]
    eps: float,
    dweight: torch.Tensor | None,  # [C]
    dbias: torch.Tensor | None,  # [C], with dweight
    shortcut: torch.Tensor | None,  # [M, C] that a BatchNorm ends, and what follows of it; else None
    shortcut_mean: torch.Tensor | None,
    shortcut_var: torch.Tensor | None,
    shortcut_weight: torch.Tensor | None,
    shortcut_eps: float,
    shortcut_dweight: torch.Tensor | None,
    shortcut_dbias: torch.Tensor | None,
    parts: torch.Tensor,  # [1 or 2 with a shortcut, ceil(M / rows_a_part), 2, C] float32
    sums: torch.Tensor,  # [1 or 2, 2, C] float32
    dz: torch.Tensor | None,  # [M, C]
    dshortcut: torch.Tensor | None,  # [M, C]
    config: dict[str, int],
) -> None:
    M, C = z.shape
    second = shortcut is not None
    maps: dict[str, Any] = {
        "grad_ptr": grad,
        "signs_ptr": signs,
        "y_ptr": y,
        "z_ptr": z,
        "mean_ptr": mean,
        "var_ptr": var,
        "shortcut_ptr": shortcut,
        "shortcut_mean_ptr": shortcut_mean,
        "shortcut_var_ptr": shortcut_var,
        "M": M,
        "C": C,
        "eps": eps,
        "shortcut_eps": shortcut_eps,
    }
    num_c = ceil_div(C, config["BLOCK_C"])
    launch(
        _residual_block_bwd_sums_kernel,
        (parts.shape[1] * num_c,),
        config,
        parts_ptr=parts[0],
        shortcut_parts_ptr=parts[1] if second else None,
        ROWS=rows_a_part(M, C, config),
        **maps,
    )
    merge_gradient_sums(parts=parts[0], sums=sums[0], dweight=dweight, dbias=dbias, config=config)
    if second:
        merge_gradient_sums(
            parts=parts[1], sums=sums[1], dweight=shortcut_dweight, dbias=shortcut_dbias, config=config
        )
    if dz is not None or dshortcut is not None:
        launch(
            _residual_block_bwd_kernel,
            (ceil_div(M, config["BLOCK_M"]) * num_c,),
            config,
            weight_ptr=weight,
            sums_ptr=sums[0],
            shortcut_weight_ptr=shortcut_weight,
            shortcut_sums_ptr=sums[1] if second else None,
            dz_ptr=dz,
            dshortcut_ptr=dshortcut,
            **maps,
        )
