"""patch_embed: image to tokens, with bias, prefix tokens and position embedding, one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Op, nbytes
from fastvr.ops.linear import result_dtype, unit_rows
from fastvr.reference.patch_embed import patch_embed as reference


def patch_embed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pos_embed: torch.Tensor | None = None,
    prefix_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tokens of an image in one launch: patches, class and register tokens, positions.

    Computes what ``cat([prefix_tokens, conv2d(x, weight, bias, stride=patch).flatten(2).transpose(1, 2)], 1)
    + pos_embed`` does for every sample; products are accumulated in float32 and the result is rounded once.
    Pixels at the right and bottom that fill no patch are ignored, as the convolution ignores them.

    Args:
        x: [B, C, H, W] of any strides, float32, float16 or bfloat16 (float64 runs in PyTorch).
        weight: [D, C, p_h, p_w] of any strides, x's dtype.
        bias: [D], x's dtype; for patches only.
        pos_embed: [P + (H // p_h) * (W // p_w), D], or with a leading 1, any floating dtype; its first P rows
            belong to the prefix tokens.
        prefix_tokens: [P, D], any floating dtype: class and register tokens, the same for every sample.

    Returns:
        [B, P + (H // p_h) * (W // p_w), D], contiguous, in the dtype that PyTorch's promotion of x,
        prefix_tokens and pos_embed gives.

    Under autocast x, weight and bias are cast to its dtype; pos_embed and prefix_tokens stay as they are.

    Raises:
        ValueError: an argument's shape, dtype or device; the message names it.
    """
    _check.operand("patch_embed", "x", x)
    _check.operand("patch_embed", "weight", weight)
    if (dtype := _check.autocast_dtype(x.device)) is not None:
        x, weight, bias = _check.cast(x, dtype), _check.cast(weight, dtype), _check.cast_or_none(bias, dtype)
    if weight.dim() != 4 or weight.numel() == 0:
        raise ValueError(f"patch_embed: weight must be [D, C, p_h, p_w]; got {list(weight.shape)}")
    d, channels, patch_h, patch_w = weight.shape
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(
            f"patch_embed: x must be [B, {channels}, H, W] for {channels} channels; got {list(x.shape)}"
        )
    if x.shape[2] < patch_h or x.shape[3] < patch_w:
        raise ValueError(
            f"patch_embed: x must be at least one patch of {patch_h} x {patch_w} in size; got {list(x.shape)}"
        )
    _check.companion("patch_embed", "weight", weight, (d, channels, patch_h, patch_w), x, dtype=x.dtype)
    _check.companion("patch_embed", "bias", bias, (d,), x, dtype=x.dtype)
    prefix = 0
    if prefix_tokens is not None:
        _check.operand("patch_embed", "prefix_tokens", prefix_tokens)
        if prefix_tokens.dim() != 2:
            raise ValueError(
                f"patch_embed: prefix_tokens must have shape [P, {d}]; got {list(prefix_tokens.shape)}"
            )
        prefix = prefix_tokens.shape[0]
        _check.companion("patch_embed", "prefix_tokens", prefix_tokens, (prefix, d), x)
        prefix_tokens = prefix_tokens if prefix else None
    if pos_embed is not None:
        _check.operand("patch_embed", "pos_embed", pos_embed)
        if pos_embed.dim() == 3 and pos_embed.shape[0] == 1:
            pos_embed = pos_embed.squeeze(0)
        tokens = prefix + (x.shape[2] // patch_h) * (x.shape[3] // patch_w)
        meaning = f" ({prefix} prefix tokens and {tokens - prefix} patches), or with a leading 1"
        _check.companion("patch_embed", "pos_embed", pos_embed, (tokens, d), x, meaning=meaning)
    return PATCH_EMBED(x, weight, bias, pos_embed, prefix_tokens)


def _size(x: torch.Tensor, weight: torch.Tensor, prefix_tokens: torch.Tensor | None) -> tuple[int, int, int]:
    patches = (x.shape[2] // weight.shape[2]) * (x.shape[3] // weight.shape[3])
    return x.shape[0], patches + (0 if prefix_tokens is None else prefix_tokens.shape[0]), weight.shape[0]


def table_key(m: int, weight: torch.Tensor, dtype: torch.dtype) -> str:
    d, channels, patch_h, patch_w = weight.shape
    return tuning.key("patch_embed", dtype, m=tuning.bucket(m), d=d, c=channels, h=patch_h, w=patch_w)


class Arguments(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    pos_embed: torch.Tensor | None
    prefix_tokens: torch.Tensor | None


def _kernel(a: Arguments) -> torch.Tensor:
    from fastvr.kernels.patch_embed import candidate_configs, default_config, launch_patch_embed_fwd

    batch, tokens, d = _size(a.x, a.weight, a.prefix_tokens)
    y = backend.empty(
        (batch, tokens, d), dtype=result_dtype(a.x, a.pos_embed, a.prefix_tokens), device=a.x.device
    )
    if y.numel() == 0:
        return y
    x = a.x
    if sum((size - 1) * step for size, step in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 2**31:
        x = x.contiguous()  # the kernel reaches the pixels of an image by 32-bit offsets
    arch = backend.architecture(x.device)
    config = tuning.config(
        "patch_embed",
        table_key(batch * tokens, a.weight, x.dtype),
        x.device,
        default=lambda: default_config(batch * tokens, d, x.dtype, arch),
        candidates=lambda: candidate_configs(x.dtype, arch),
    )
    launch_patch_embed_fwd(
        x=x,
        weight=a.weight,
        bias=_check.dense(a.bias),
        pos_embed=unit_rows(a.pos_embed),
        prefix_tokens=unit_rows(a.prefix_tokens),
        y=y,
        config=config,
    )
    return y


def _fake(a: Arguments) -> torch.Tensor:
    return a.x.new_empty(
        _size(a.x, a.weight, a.prefix_tokens), dtype=result_dtype(a.x, a.pos_embed, a.prefix_tokens)
    )


def _unsupported(a: Arguments) -> str | None:
    batch, tokens, _ = _size(a.x, a.weight, a.prefix_tokens)
    if batch * tokens >= 2**31 - 256:
        return f"{batch * tokens} tokens; the kernel counts them in 31 bits"
    return _check.kernel_dtypes(*a)


def _measured(a: Arguments) -> str:
    batch, tokens, _ = _size(a.x, a.weight, a.prefix_tokens)
    # without a measurement the vendor's convolution runs
    return tuning.choice(table_key(batch * tokens, a.weight, a.x.dtype), a.x.device, "reference")


def _cost(a: Arguments) -> Cost:
    batch, tokens, d = _size(a.x, a.weight, a.prefix_tokens)
    prefix = 0 if a.prefix_tokens is None else a.prefix_tokens.shape[0]
    moved = nbytes(a)
    result = batch * tokens * d * result_dtype(a.x, a.pos_embed, a.prefix_tokens).itemsize
    return Cost(2 * batch * (tokens - prefix) * a.weight.numel(), moved + result)


PATCH_EMBED = Op(
    "patch_embed",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix_tokens",
    arguments=Arguments,
    kernel=_kernel,
    reference=reference,
    fake=_fake,
    unsupported=_unsupported,
    measured=_measured,
    cost=_cost,
)
