"""Configurations of `conv_bn_relu.py` and `conv_boxes.py`: what a tuner may choose from, and what runs
without a measurement."""

from __future__ import annotations

import torch

from fastvr.kernels.common import ceil_div

Config = dict[str, int]

_SPLIT_PIXELS = 256  # 14 x 14 of one sample: 16 tiles of 64 x 64 where there are 256 channels
_THIN_PIXELS = 64  # 7 x 7 of one sample
_LONG_K = 2048  # 32 blocks of K, one after another, where a tile is not split


def _tile(m: int, n: int, k: int, num_warps: int, num_stages: int, **choices: int) -> Config:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}
    return {**blocks, **choices, "num_warps": num_warps, "num_stages": num_stages}


def candidate_configs(
    dtype: torch.dtype, arch: str, *, gathered: bool = False, boxes: bool = False, m: int | None = None
) -> list[Config]:
    """Configurations that fit ``arch``, from the largest tile to the thinnest (a late layer at batch 1).

    Args:
        gathered: operands are loaded element by element, not 16 bytes at a time.
        boxes: tensor descriptors can read them, by `conv_boxes.py`.
        m: how many output pixels there are; configurations that split K come where they are few.
    """
    if arch == "interpreter":
        return [_tile(256, 64, 64, 4, 1), _tile(128, 32, 32, 4, 1), _tile(16, 64, 64, 4, 1)]
    # ptxas spills a 64 x 64 tile of 4 warps on sm_100, a few registers to reach a fourth CTA
    square = 8 if arch == "sm_100" else 4
    if dtype == torch.float32:
        # IEEE float32 has no matrix instruction on NVIDIA: fused multiply-adds out of registers, which short
        # blocks of K keep from spilling
        return [_tile(64, 64, 16, square, 3), _tile(32, 64, 16, 4, 3), _tile(16, 64, 32, 4, 2)]
    if gathered:
        # every element has a pointer and a mask of its own: short blocks of K, or they spill
        return [_tile(128, 64, 32, 8, 2), _tile(64, 64, 32, 4, 2), _tile(16, 64, 32, 4, 2)]
    stages = 3
    if arch.startswith("gfx"):
        stages = 2
        tiles = [_tile(128, 128, 64, 8, 2), _tile(128, 64, 64, 4, 2), _tile(64, 64, 64, 4, 2)]
    elif arch in ("sm_80", "sm_90", "sm_100"):
        tiles = [_tile(128, 128, 64, 8, 3), _tile(128, 64, 64, 4, 3), _tile(64, 64, 64, square, 3)]
        if boxes and arch != "sm_80":
            # 98 KB: two programs an SM
            tiles[:0] = [_tile(128, 128, 64, 8, 3, TMA=1), _tile(128, 64, 64, 4, 4, TMA=1)]
    else:
        # 100 KB of shared memory an SM: shorter blocks of K, so that two programs fit
        stages = 2
        tiles = [_tile(128, 128, 32, 8, 3), _tile(128, 64, 32, 4, 3), _tile(64, 64, 64, 4, 2)]
    if m is not None and m <= _SPLIT_PIXELS:
        tiles += [_tile(64, 64, 64, square, stages, SPLIT_K=8), _tile(16, 64, 64, 4, stages, SPLIT_K=4)]
    thin = {"sm_80": 4, "sm_90": 4, "sm_100": 4}.get(arch, 2 if arch.startswith("gfx") else 3)
    return [*tiles, _tile(16, 64, 64, 4, thin)]


def default_config(
    m: int,
    n: int,
    dtype: torch.dtype,
    arch: str,
    *,
    gathered: bool = False,
    boxes: bool = False,
    k: int = 0,
) -> Config:
    """For ``m`` output pixels, ``n`` channels of a group and sums of ``k`` terms: the largest tile that is
    not mostly padding and still makes two waves of programs on a large GPU; for few pixels a thin one, and
    where sums are long too, one that splits K."""
    tiles = candidate_configs(dtype, arch, gathered=gathered, boxes=boxes)
    if m <= _THIN_PIXELS:
        split = [tile for tile in candidate_configs(dtype, arch, gathered=gathered, m=m) if "SPLIT_K" in tile]
        return split[-1] if split and k >= _LONG_K else tiles[-1]
    for tile in tiles[:-1]:
        padding = tile["BLOCK_N"] >= 2 * n and tile is not tiles[-2]
        if not padding and ceil_div(m, tile["BLOCK_M"]) * ceil_div(n, tile["BLOCK_N"]) >= 256:
            return tile
    return tiles[-2]
