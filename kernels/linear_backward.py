"""The gradients of a linear layer's parameters: dweight = grad.T @ norm(x), dbias = the sum of grad's rows.

grad [M, N], x [M, K], dweight [N, K], dbias [N]. Products and sums are in float32, rounded once on store.
grad's rows are summed by the programs that read them anyhow. With ``ln_weight`` x passes through LayerNorm on
its way in, by the ``moments`` that the forward pass left, and is rounded to grad's dtype: what the forward
pass multiplied need not be kept. With ``sample_scale`` grad is meant with a factor for each sample: x takes
it, on the way that LayerNorm takes.

- TMA: grad and x by tensor descriptors.
- SPLIT_M: so many programs share the rows. Each leaves its float32 part in a workspace, and a second launch
  sums them in their order: the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastvr.kernels.common import (
    ceil_div,
    dot_precision,
    launch,
    split_range,
    sum_parts,
    swizzle,
    tma_descriptor,
)

Config = dict[str, int]


@triton.jit(do_not_specialize=["M"])
def _linear_weight_bwd_kernel(
    grad,  # [M, N], a pointer; with TMA a descriptor of blocks [BLOCK_M, BLOCK_N]
    x,  # [M, K], a pointer; with TMA a descriptor of blocks [BLOCK_M, BLOCK_K]
    ln_weight_ptr,  # [K] or None: no LayerNorm on the way in
    ln_bias_ptr,  # [K] or None
    moments_ptr,  # [M, 2] float32, with ln_weight: mean and 1 / deviation
    sample_scale_ptr,  # [M / sample_rows] float32 or None: a factor for each sample's rows of grad
    dweight_ptr,  # [N, K] dense; with SPLIT_M [SPLIT_M, N, K] float32
    dbias_ptr,  # [N] or None; with SPLIT_M [SPLIT_M, N] float32
    M,
    N,
    K,
    sample_rows,  # rows of a sample
    stride_gm,
    stride_gn,
    stride_xm,
    stride_xk,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    SPLIT_M: tl.constexpr = 1,
    TMA: tl.constexpr = 0,
):
    num_n, num_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    pid_n, pid_k = swizzle(tl.program_id(0), num_n, num_k, GROUP_N)
    first, stop = split_range(M, BLOCK_M, SPLIT_M)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside_k = offs_k < K
    if not TMA:
        # columns past the end repeat the last ones: no masks along them, and they are never stored
        g_columns = grad + tl.minimum(offs_n, N - 1)[None, :] * stride_gn
        x_columns = x + tl.minimum(offs_k, K - 1)[None, :] * stride_xk
    if ln_weight_ptr is not None:
        scale = tl.load(ln_weight_ptr + offs_k, mask=inside_k, other=0.0).to(tl.float32)
        if ln_bias_ptr is not None:
            shift = tl.load(ln_bias_ptr + offs_k, mask=inside_k, other=0.0).to(tl.float32)

    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, stop, BLOCK_M):
        rows = start + offs_m
        inside = rows < M
        if TMA:
            g_block = grad.load([start, pid_n * BLOCK_N])
            x_block = x.load([start, pid_k * BLOCK_K])
        else:
            wide = rows.to(tl.int64)[:, None]
            g_block = tl.load(g_columns + wide * stride_gm, mask=inside[:, None], other=0.0)
            x_block = tl.load(x_columns + wide * stride_xm, mask=inside[:, None], other=0.0)
        if ln_weight_ptr is not None:
            mean = tl.load(moments_ptr + rows * 2, mask=inside, other=0.0)
            rstd = tl.load(moments_ptr + rows * 2 + 1, mask=inside, other=0.0)
            normed = (x_block.to(tl.float32) - mean[:, None]) * rstd[:, None] * scale[None, :]
            if ln_bias_ptr is not None:
                normed += shift[None, :]
            # rows past the end are not 0 any more, and 0 times a bias that overflowed is NaN
            x_block = tl.where(inside[:, None], normed, 0.0).to(g_block.dtype)
        if sample_scale_ptr is not None:
            factor = tl.load(sample_scale_ptr + rows // sample_rows, mask=inside, other=0.0)
            x_block = (x_block.to(tl.float32) * factor[:, None]).to(g_block.dtype)
        acc = tl.dot(tl.trans(g_block), x_block, acc, input_precision=PRECISION)
        if dbias_ptr is not None:  # noqa: SIM102 (one is known to the compiler, the other is not)
            if pid_k == 0:
                summand = g_block.to(tl.float32)
                if sample_scale_ptr is not None:
                    summand *= factor[:, None]
                dbias += tl.sum(summand, 0)

    part = tl.program_id(1).to(tl.int64) if SPLIT_M > 1 else 0
    cells = (part * N + offs_n)[:, None] * K + offs_k[None, :]
    mask_n = offs_n < N
    dweight = acc.to(dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + cells, dweight, mask=mask_n[:, None] & inside_k[None, :])
    if dbias_ptr is not None:  # noqa: SIM102
        if pid_k == 0:
            total = dbias.to(dbias_ptr.dtype.element_ty)
            tl.store(dbias_ptr + part * N + offs_n, total, mask=mask_n)


@triton.jit
def _linear_weight_sum_kernel(
    workspace_ptr,  # [SPLIT_M, N, K] float32
    sums_ptr,  # [SPLIT_M, N] float32, with dbias
    dweight_ptr,  # [N, K]
    dbias_ptr,  # [N] or None
    N,
    K,
    SPLIT_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_k = tl.cdiv(K, BLOCK_K)
    offs_n = (tl.program_id(0) // num_k).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = (tl.program_id(0) % num_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    acc = sum_parts(workspace_ptr, offs_n, offs_k, N, K, SPLIT_M, BLOCK_N, BLOCK_K)
    cells = offs_n[:, None] * K + offs_k[None, :]
    mask = mask_n[:, None] & (offs_k < K)[None, :]
    tl.store(dweight_ptr + cells, acc.to(dweight_ptr.dtype.element_ty), mask=mask)
    if dbias_ptr is not None:  # noqa: SIM102
        if tl.program_id(0) % num_k == 0:
            total = tl.zeros((BLOCK_N,), tl.float32)
            for part in tl.static_range(SPLIT_M):
                total += tl.load(sums_ptr + part * N + offs_n, mask=mask_n, other=0.0)
            tl.store(dbias_ptr + offs_n, total.to(dbias_ptr.dtype.element_ty), mask=mask_n)


# A second launch has little to do: small tiles make many programs
_SUM = {"BLOCK_N": 8, "BLOCK_K": 128, "num_warps": 4}
# Rows that a program sums at least before their parts cost more than a fuller chip gains
_ROWS_A_PART = 1024
_A_WAVE = 144  # programs: about as many as a large GPU has multiprocessors


def _tile(m: int, n: int, k: int, num_warps: int, num_stages: int, **choices: int) -> Config:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_N": 8}
    return {**blocks, **choices, "num_warps": num_warps, "num_stages": num_stages}


def candidate_configs(dtype: torch.dtype, arch: str, *, norm: bool, m: int, n: int, k: int) -> list[Config]:
    """Configurations that fit ``arch``, each with as many parts as make one wave of programs on a large GPU,
    two, or with none; ``norm``: whether x is normalised or multiplied on its way in."""
    if arch == "interpreter":
        return [_tile(64, 128, 128, 4, 1), _tile(32, 64, 128, 4, 1, SPLIT_M=2)]
    if dtype == torch.float32:
        # IEEE float32 has no matrix instruction on NVIDIA: fused multiply-adds out of registers
        tiles = [_tile(16, 64, 64, 8, 2), _tile(16, 32, 64, 4, 2), _tile(16, 32, 32, 4, 2)]
    else:
        # what changes x on its way in goes through registers, which TMA does not
        tma = {"TMA": 1} if arch in ("sm_90", "sm_100") and not norm else {}
        stages = 2 if arch.startswith("gfx") else 3
        # registers hold what is transposed or normalised, except where products read shared memory
        rows = 64 if tma else 32
        # with a normalised x the wider one spills on sm_100
        tiles = [_tile(rows, 128, 64 if norm and arch == "sm_100" else 128, 8, stages, **tma)]
        if tma:
            tiles.append(_tile(rows, 128, 128, 8, stages))
        tiles.append(_tile(rows, 64, 128, 4, stages))
        if not norm or arch != "sm_120":  # where it spills
            tiles.append(_tile(rows, 64, 64, 4, stages))
    found = []
    for tile in tiles:
        programs = ceil_div(n, tile["BLOCK_N"]) * ceil_div(k, tile["BLOCK_K"])
        parts = (min(waves * _A_WAVE // programs, m // _ROWS_A_PART, 16) for waves in (1, 2, 0))
        # powers of two, so that few kernels are compiled
        for split in dict.fromkeys(1 << (max(count, 1).bit_length() - 1) for count in parts):
            found.append(tile | ({"SPLIT_M": split} if split > 1 else {}))
    return found


def default_config(dtype: torch.dtype, arch: str, *, norm: bool, m: int, n: int, k: int) -> Config:
    return candidate_configs(dtype, arch, norm=norm, m=m, n=n, k=k)[0]


def launch_linear_weight_bwd(
    *,
    grad: torch.Tensor,  # [M, N], any strides
    x: torch.Tensor,  # [M, K], any strides
    ln_weight: torch.Tensor | None,  # [K]
    ln_bias: torch.Tensor | None,  # [K]
    moments: torch.Tensor | None,  # [M, 2] float32, contiguous, with ln_weight
    sample_scale: torch.Tensor | None,  # [samples] float32, contiguous; M is a multiple of samples
    dweight: torch.Tensor,  # [N, K], contiguous
    dbias: torch.Tensor | None,  # [N]
    workspace: torch.Tensor | None,  # [SPLIT_M, N, K] float32, contiguous, where config has SPLIT_M
    sums: torch.Tensor | None,  # [SPLIT_M, N] float32, contiguous, with workspace and dbias
    config: Config,
) -> None:
    (M, N), K = grad.shape, x.shape[1]
    operands: tuple[Any, Any] = (grad, x)
    if config.get("TMA"):
        blocks = [(config["BLOCK_M"], config[columns]) for columns in ("BLOCK_N", "BLOCK_K")]
        described = [tma_descriptor(*pair) for pair in zip(operands, blocks, strict=True)]
        if None in described:
            config = config | {"TMA": 0}
        else:
            operands = (described[0], described[1])
    split = config.get("SPLIT_M", 1)
    launch(
        _linear_weight_bwd_kernel,
        (ceil_div(N, config["BLOCK_N"]) * ceil_div(K, config["BLOCK_K"]), split),
        config,
        grad=operands[0],
        x=operands[1],
        ln_weight_ptr=ln_weight,
        ln_bias_ptr=ln_bias,
        moments_ptr=moments,
        sample_scale_ptr=sample_scale,
        dweight_ptr=dweight if split == 1 else workspace,
        dbias_ptr=dbias if split == 1 else sums,
        M=M,
        N=N,
        K=K,
        sample_rows=1 if sample_scale is None else M // sample_scale.shape[0],
        stride_gm=grad.stride(0),
        stride_gn=grad.stride(1),
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        PRECISION=dot_precision(grad.dtype),
    )
    if split > 1:
        launch(
            _linear_weight_sum_kernel,
            (ceil_div(N, _SUM["BLOCK_N"]) * ceil_div(K, _SUM["BLOCK_K"]),),
            _SUM | {"SPLIT_M": split},
            workspace_ptr=workspace,
            sums_ptr=sums,
            dweight_ptr=dweight,
            dbias_ptr=dbias,
            N=N,
            K=K,
        )
