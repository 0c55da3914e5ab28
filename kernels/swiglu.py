"""SwiGLU: y = silu(a) * b for rows x = [a, b], silu(a) = a sigmoid(a) (Shazeer, 2020).

x [M, 2 N], float32 arithmetic, rounded once. Backward: with s = sigmoid(a), da = dy b (s + a s (1 - s)) and
db = dy a s, both computed from x, so that neither silu(a) nor y need be kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastvr.kernels.activations import sigmoid_and_grad
from fastvr.kernels.common import ceil_div, launch


@triton.jit(do_not_specialize=["M"])
def _swiglu_fwd_kernel(
    x_ptr,  # [M, 2 N]
    y_ptr,  # [M, N]
    M,
    N,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :]
    gate = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x_ptrs + N, mask=mask, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp2(-1.4426950408889634 * gate)) * value
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _swiglu_bwd_kernel(
    grad_ptr,  # [M, N]
    x_ptr,  # [M, 2 N]
    dx_ptr,  # [M, 2 N]
    M,
    N,
    stride_gm,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :]
    gate = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x_ptrs + N, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offs_m[:, None] * stride_gm + offs_n[None, :], mask=mask, other=0.0)
    grad = grad.to(tl.float32)
    s, ds = sigmoid_and_grad(gate)
    dx_ptrs = dx_ptr + offs_m[:, None] * (2 * N) + offs_n[None, :]
    dtype = dx_ptr.dtype.element_ty
    tl.store(dx_ptrs, (grad * value * (s + gate * ds)).to(dtype), mask=mask)
    tl.store(dx_ptrs + N, (grad * gate * s).to(dtype), mask=mask)


def candidate_configs(n: int, arch: str) -> list[dict[str, int]]:
    """Configurations for rows of two halves of ``n`` each; the first is the default."""
    if arch == "interpreter":
        # there a program costs more than its elements; the second makes several
        return [_config(64, 256, 4), _config(4, 32, 4)]
    # 8 or 16 elements a thread of either half: two or four loads of 16 bytes in 16-bit types
    width = min(1024, triton.next_power_of_2(n))
    return [_config(max(1, size // width), width, warps) for size, warps in ((1024, 4), (2048, 4), (2048, 8))]


def default_config(n: int, arch: str) -> dict[str, int]:
    return candidate_configs(n, arch)[0]


def _config(m: int, n: int, warps: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": 1}


def _contiguous_features(rows: torch.Tensor) -> bool:
    # the stride of one feature alone says nothing
    return rows.stride(1) == 1 or rows.shape[1] == 1


def launch_swiglu_fwd(*, x: torch.Tensor, y: torch.Tensor, config: dict[str, int]) -> None:
    """x [M, 2 N] with contiguous features, y [M, N] contiguous."""
    m, n = y.shape
    assert x.shape == (m, 2 * n)
    assert _contiguous_features(x)
    assert y.is_contiguous()
    grid = (ceil_div(m, config["BLOCK_M"]), ceil_div(n, config["BLOCK_N"]))
    launch(_swiglu_fwd_kernel, grid, config, x_ptr=x, y_ptr=y, M=m, N=n, stride_xm=x.stride(0))


def launch_swiglu_bwd(
    *, grad: torch.Tensor, x: torch.Tensor, dx: torch.Tensor, config: dict[str, int]
) -> None:
    """grad [M, N] and x [M, 2 N] with contiguous features, dx [M, 2 N] contiguous."""
    m, n = grad.shape
    assert x.shape == dx.shape == (m, 2 * n)
    assert _contiguous_features(x)
    assert _contiguous_features(grad)
    assert dx.is_contiguous()
    launch(
        _swiglu_bwd_kernel,
        (ceil_div(m, config["BLOCK_M"]), ceil_div(n, config["BLOCK_N"])),
        config,
        grad_ptr=grad,
        x_ptr=x,
        dx_ptr=dx,
        M=m,
        N=n,
        stride_gm=grad.stride(0),
        stride_xm=x.stride(0),
    )
