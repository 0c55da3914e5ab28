"""Configurations of `linear.py`: what a tuner may choose from, and what runs without a measurement."""

from __future__ import annotations

from typing import Literal

import torch

from fastvr.kernels.common import ceil_div

Config = dict[str, int]
# What a launch does beside linear's: row statistics behind it, LayerNorm folded into the weight, LayerNorm on
# the way in, an activation there, an activation's derivative behind it. Each is a kernel of its own to the
# compiler.
Kind = Literal[
    "linear", "linear_stats", "norm_linear", "layernorm_linear", "act_linear", "linear_act_backward"
]

_THIN_ROWS = 32  # half of a 64-row tile and less
_SPLIT_ROWS = 512  # 96 tiles of 64x64 where N is 768, fewer than a large GPU has multiprocessors


def _tile(m: int, n: int, k: int, num_warps: int, num_stages: int, **choices: int) -> Config:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}
    return {**blocks, **choices, "num_warps": num_warps, "num_stages": num_stages}


def candidate_configs(
    dtype: torch.dtype, arch: str, *, kind: Kind = "linear", m: int | None = None, dropout: bool = False
) -> list[Config]:
    """Configurations that fit ``arch``; the first is for many rows, the last for a few (one class token a
    sample). Those that split K come with the ``m`` rows that are few enough for it. With ``dropout`` the
    epilogue draws random numbers.

    None has warp specialisation: Triton's pass for it on sm_90 halves x's block for two groups of warps,
    where a host descriptor cannot follow, and stops at the reductions of the row statistics.
    """
    if arch == "interpreter":
        # there a program costs more than its elements, but random numbers cost the most
        return [_tile(128, 128, 64, 4, 1), _tile(16, 64 if dropout else 256, 128, 4, 1)]
    if dtype == torch.float32:
        # IEEE float32 has no matrix instruction on NVIDIA: fused multiply-adds out of registers
        tiles = [_tile(64, 64, 32, 4, 2), _tile(32, 64, 16, 4, 2), _tile(16, 64, 16, 4, 2)]
        if kind != "linear_stats":  # there this one spills
            tiles.insert(1, _tile(64, 64, 16, 8, 2))
        return tiles
    # what is done on the way in goes through registers, which TMA does not
    through_registers = kind in ("layernorm_linear", "act_linear")
    tma = {"TMA": 1} if arch in ("sm_90", "sm_100") and not through_registers else {}
    stages, thin_k = (2, 64) if arch.startswith("gfx") else (3, 128)
    if kind == "layernorm_linear" and arch in ("sm_86", "sm_89", "sm_120"):
        stages = 2  # under autocast x is float32, and with three its blocks do not fit 99 KB
    # 98 KB and at most 128 registers with TMA: two programs fit a multiprocessor, so that one's epilogue runs
    # beneath the other's product, and with ViT's short K the epilogue is no small part
    tiles = [_tile(128, 128, 64, 8, stages, **tma)]
    if tma:
        if kind != "linear_act_backward" or not dropout:  # where these spill
            # a quarter less to load for each product, but alone on its multiprocessor
            tiles.append(_tile(128, 256, 64, 8, 4, **tma))
            tiles.append(_tile(128, 256, 64, 8, 4, **tma, PERSISTENT=1))
        tiles.append(_tile(128, 128, 64, 8, stages))
    if kind != "linear_act_backward":  # there this one spills
        tiles.append(_tile(128, 64, 64, 4, stages))
    tiles.append(_tile(64, 64, 64, 4, stages))
    if m is not None and m <= _SPLIT_ROWS:
        tiles.append(_tile(64, 64, 64, 4, stages, SPLIT_K=4))
    if m is not None and m <= _THIN_ROWS:
        tiles.append(_tile(16, 64, 64, 4, stages, SPLIT_K=4))
    tiles.append(_tile(16, 64, thin_k, 4, stages))
    return tiles


def default_config(
    m: int, n: int, dtype: torch.dtype, arch: str, *, kind: Kind = "linear", dropout: bool = False
) -> Config:
    """The largest tile that still makes two waves of programs on a large GPU; a thin one for few rows. K is
    never split: whether that is worth its second launch is for a measurement to say."""
    tiles = candidate_configs(dtype, arch, kind=kind, dropout=dropout)
    if m <= _THIN_ROWS:
        return tiles[-1]
    for tile in tiles[:-1]:
        if ceil_div(m, tile["BLOCK_M"]) * ceil_div(n, tile["BLOCK_N"]) >= 256:
            return tile
    return tiles[-2] if len(tiles) > 2 else tiles[0]
