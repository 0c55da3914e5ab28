"""What lies around the vendor's convolutions in the gradient of y = act(bn(conv(x)) + residual), BatchNorm by
its running statistics.

With g = dy where y > 0, scale = bn_weight / sqrt(running_var + eps), and P the convolution's gradient of
its weight for g:

    dx = conv's gradient of x for g with the weight W * scale
    dW = P * scale
    dbn_bias = sum(g)

so what the convolution made is neither kept nor made again. One launch masks dy and leaves shares of sum(g),
one scales the weight, and the last, behind the convolution, makes the parameters' gradients. Shares are added
in a fixed order. (That of bn_weight could come from sum(W * P), but P is rounded, and where g has a mean that
leaves errors which PyTorch's own has not.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastvr.kernels.batch_norm_stats import rows_a_part
from fastvr.kernels.common import ceil_div, launch


@triton.jit(do_not_specialize=["M", "ROWS"])
def _masked_grad_kernel(
    grad_ptr,  # [M, C]
    y_ptr,  # [M, C] or None
    masked_ptr,  # [M, C], with y
    parts_ptr,  # [ceil(M / ROWS), C] float32 or None
    M,
    C,
    ROWS,  # of each part
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_c = tl.cdiv(C, BLOCK_C)
    part = tl.program_id(0) // num_c
    offs_c = tl.program_id(0) % num_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    first = part * ROWS
    stop = tl.minimum(first + ROWS, M)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(first, stop, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < stop)[:, None] & mask_c[None, :]
        offs = rows.to(tl.int64)[:, None] * C + offs_c[None, :]
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if y_ptr is not None:
            # a NaN lets the gradient through, as PyTorch has it
            y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            grad = tl.where(y <= 0.0, 0.0, grad)
            tl.store(masked_ptr + offs, grad.to(masked_ptr.dtype.element_ty), mask=mask)
        total += grad
    if parts_ptr is not None:
        tl.store(parts_ptr + part.to(tl.int64) * C + offs_c, tl.sum(total, 0), mask=mask_c)


@triton.jit
def _scale(bn_weight_ptr, var_ptr, offs_n, mask_n, eps, BLOCK_N: tl.constexpr):
    """bn_weight / sqrt(var + eps), without what is absent."""
    scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    if var_ptr is not None:
        scale = tl.rsqrt(tl.load(var_ptr + offs_n, mask=mask_n, other=1.0).to(tl.float32) + eps)
    if bn_weight_ptr is not None:
        scale *= tl.load(bn_weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    return scale


@triton.jit
def _scaled_weight_kernel(
    weight_ptr,  # [N, K]
    bn_weight_ptr,  # [N] or None
    var_ptr,  # [N] or None
    scaled_ptr,  # [N, K]
    N,
    K,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_k = tl.cdiv(K, BLOCK_K)
    offs_n = tl.program_id(0) // num_k * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(0) % num_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_k < K)[None, :]
    scale = _scale(bn_weight_ptr, var_ptr, offs_n, mask_n, eps, BLOCK_N)
    offs = offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(scaled_ptr + offs, (weight * scale[:, None]).to(scaled_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["PARTS"])
def _parameters_kernel(
    product_ptr,  # [N, K] or None
    parts_ptr,  # [PARTS, N] float32 or None
    bn_weight_ptr,  # [N] or None
    var_ptr,  # [N] or None
    dweight_ptr,  # [N, K], with product
    dbn_bias_ptr,  # [N], with parts
    N,
    K,
    PARTS,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if product_ptr is not None:
        scale = _scale(bn_weight_ptr, var_ptr, offs_n, mask_n, eps, BLOCK_N)
        for start in range(0, K, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            mask = mask_n[:, None] & (offs_k < K)[None, :]
            offs = offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
            product = tl.load(product_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            tl.store(
                dweight_ptr + offs, (product * scale[:, None]).to(dweight_ptr.dtype.element_ty), mask=mask
            )
    if parts_ptr is not None:
        total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
        for start in range(0, PARTS, BLOCK_P):
            offs_p = start + tl.arange(0, BLOCK_P)
            parts = parts_ptr + offs_p.to(tl.int64)[:, None] * N + offs_n[None, :]
            total += tl.load(parts, mask=(offs_p < PARTS)[:, None] & mask_n[None, :], other=0.0)
        dbn_bias = tl.sum(total, 0).to(dbn_bias_ptr.dtype.element_ty)
        tl.store(dbn_bias_ptr + offs_n, dbn_bias, mask=mask_n)


# Rows of a weight are short, and a few of them a program make programs enough
_ROWS = {"BLOCK_N": 4, "BLOCK_K": 256, "num_warps": 4, "num_stages": 1}


def launch_masked_grad(
    *,
    grad: torch.Tensor,  # [M, C], this and all that follows contiguous
    y: torch.Tensor | None,  # [M, C]
    masked: torch.Tensor | None,  # [M, C], with y
    parts: torch.Tensor | None,  # [ceil(M / rows_a_part), 1, C] float32
    config: dict[str, int],
) -> None:
    M, C = grad.shape
    ROWS = rows_a_part(M, C, config)
    launch(
        _masked_grad_kernel,
        (ceil_div(M, ROWS) * ceil_div(C, config["BLOCK_C"]),),
        config,
        grad_ptr=grad,
        y_ptr=y,
        masked_ptr=masked,
        parts_ptr=parts,
        M=M,
        C=C,
        ROWS=ROWS,
    )


def launch_scaled_weight(
    *,
    weight: torch.Tensor,  # [N, K], this and all that follows contiguous
    bn_weight: torch.Tensor | None,  # [N]
    var: torch.Tensor | None,  # [N]
    scaled: torch.Tensor,  # [N, K]
    eps: float,
) -> None:
    N, K = weight.shape
    launch(
        _scaled_weight_kernel,
        (ceil_div(N, _ROWS["BLOCK_N"]) * ceil_div(K, _ROWS["BLOCK_K"]),),
        _ROWS,
        weight_ptr=weight,
        bn_weight_ptr=bn_weight,
        var_ptr=var,
        scaled_ptr=scaled,
        N=N,
        K=K,
        eps=eps,
    )


def launch_parameters(
    *,
    product: torch.Tensor | None,  # [N, K], this and all that follows contiguous
    parts: torch.Tensor | None,  # [P, 1, N] float32
    bn_weight: torch.Tensor | None,  # [N]
    var: torch.Tensor | None,  # [N]
    dweight: torch.Tensor | None,  # [N, K], with product
    dbn_bias: torch.Tensor | None,  # [N], with parts
    eps: float,
) -> None:
    given = product if dbn_bias is None else dbn_bias
    assert given is not None
    N = len(given)
    launch(
        _parameters_kernel,
        (ceil_div(N, _ROWS["BLOCK_N"]),),
        _ROWS | {"BLOCK_P": 64},
        product_ptr=product,
        parts_ptr=parts,
        bn_weight_ptr=bn_weight,
        var_ptr=var,
        dweight_ptr=dweight,
        dbn_bias_ptr=dbn_bias,
        N=N,
        K=0 if product is None else product.shape[1],
        PARTS=0 if parts is None else len(parts),
        eps=eps,
    )
