"""patch_embed: image to tokens, with bias, prefix tokens and position embedding, one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Gradient, Op, nbytes, reference_gradients
from fastvr.ops.linear import input_gradient, result_dtype, unit_rows
from fastvr.ops.linear_backward import bias_gradient, parameter_gradients
from fastvr.reference.image import normalize
from fastvr.reference.patch_embed import patch_embed as reference


def patch_embed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pos_embed: torch.Tensor | None = None,
    prefix_tokens: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tokens of an image in one launch: patches, class and register tokens, positions.

    Computes what ``cat([prefix_tokens, conv2d(x, weight, bias, stride=patch).flatten(2).transpose(1, 2)], 1)
    + pos_embed`` does for every sample; products are accumulated in float32 and the result is rounded once.
    Pixels at the right and bottom that fill no patch are ignored, as the convolution ignores them.

    Args:
        x: [B, C, H, W] of any strides, float32, float16 or bfloat16 (float64 runs in PyTorch); or uint8,
            which is taken as ``(x / 255 - mean) / std`` rounded to weight's dtype. Patches are read fastest
            where x and weight are both contiguous or both channels_last.
        weight: [D, C, p_h, p_w] of any strides, x's dtype where that is floating.
        bias: [D], weight's dtype; for patches only.
        pos_embed: [P + (H // p_h) * (W // p_w), D], or with a leading 1, any floating dtype; its first P rows
            belong to the prefix tokens.
        prefix_tokens: [P, D], any floating dtype: class and register tokens, the same for every sample.
        mean, std: [C], any floating dtype, for uint8 images only.

    Returns:
        [B, P + (H // p_h) * (W // p_w), D], contiguous, in the dtype that PyTorch's promotion of weight,
        prefix_tokens and pos_embed gives.

    Under autocast a floating x, weight and bias are cast to its dtype; the others stay as they are.

    Raises:
        ValueError: an argument's shape, dtype or device; the message names it.
    """
    return PATCH_EMBED(*checked("patch_embed", x, weight, bias, pos_embed, prefix_tokens, mean, std))


class Arguments(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    pos_embed: torch.Tensor | None
    prefix_tokens: torch.Tensor | None
    mean: torch.Tensor | None
    std: torch.Tensor | None


SCHEMA = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix_tokens, "
    "Tensor? mean, Tensor? std"
)


def checked(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pos_embed: torch.Tensor | None,
    prefix_tokens: torch.Tensor | None,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
) -> Arguments:
    """The arguments as the operator ``op`` takes them, or one ValueError that names what is wrong."""
    _check.operand(op, "weight", weight)
    if weight.dim() != 4 or weight.numel() == 0:
        raise ValueError(f"{op}: weight must be [D, C, p_h, p_w]; got {list(weight.shape)}")
    d, channels, patch_h, patch_w = weight.shape
    _check.image(op, x, mean, std, channels)
    if (dtype := _check.autocast_dtype(x.device)) is not None:
        x = _check.cast(x, dtype) if x.is_floating_point() else x
        weight, bias = _check.cast(weight, dtype), _check.cast_or_none(bias, dtype)
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(
            f"{op}: x must be [B, {channels}, H, W] for {channels} channels; got {list(x.shape)}"
        )
    if x.shape[2] < patch_h or x.shape[3] < patch_w:
        raise ValueError(
            f"{op}: x must be at least one patch of {patch_h} x {patch_w} in size; got {list(x.shape)}"
        )
    shape = (d, channels, patch_h, patch_w)
    _check.companion(op, "weight", weight, shape, x, dtype=x.dtype if x.is_floating_point() else None)
    _check.companion(op, "bias", bias, (d,), x, dtype=weight.dtype)
    prefix = 0
    if prefix_tokens is not None:
        _check.operand(op, "prefix_tokens", prefix_tokens)
        if prefix_tokens.dim() != 2:
            raise ValueError(f"{op}: prefix_tokens must have shape [P, {d}]; got {list(prefix_tokens.shape)}")
        prefix = prefix_tokens.shape[0]
        _check.companion(op, "prefix_tokens", prefix_tokens, (prefix, d), x)
        prefix_tokens = prefix_tokens if prefix else None
    if pos_embed is not None:
        _check.operand(op, "pos_embed", pos_embed)
        if pos_embed.dim() == 3 and pos_embed.shape[0] == 1:
            pos_embed = pos_embed.squeeze(0)
        tokens = prefix + (x.shape[2] // patch_h) * (x.shape[3] // patch_w)
        meaning = f" ({prefix} prefix tokens and {tokens - prefix} patches), or with a leading 1"
        _check.companion(op, "pos_embed", pos_embed, (tokens, d), x, meaning=meaning)
    return Arguments(x, weight, bias, pos_embed, prefix_tokens, mean, std)


def size(a: Arguments) -> tuple[int, int, int]:
    """[B, T, D] of the result."""
    patches = (a.x.shape[2] // a.weight.shape[2]) * (a.x.shape[3] // a.weight.shape[3])
    prefix = 0 if a.prefix_tokens is None else a.prefix_tokens.shape[0]
    return a.x.shape[0], patches + prefix, a.weight.shape[0]


def dtype_of(a: Arguments) -> torch.dtype:
    return result_dtype(a.weight, a.pos_embed, a.prefix_tokens)


def table_key(op: str, a: Arguments) -> str:
    batch, tokens, d = size(a)
    _, channels, patch_h, patch_w = a.weight.shape
    sizes = {"m": tuning.bucket(batch * tokens), "d": d, "c": channels, "h": patch_h, "w": patch_w}
    return tuning.key(op, a.weight.dtype, **sizes, uint8=int(a.x.dtype == torch.uint8))


def launch(op: str, a: Arguments, y: torch.Tensor, stats: torch.Tensor | None = None) -> None:
    """Fill y [B, T, D], and with it the statistics of its rows."""
    from fastvr.kernels.patch_embed import candidate_configs, default_config, launch_patch_embed_fwd

    if y.numel() == 0:
        return
    batch, tokens, d = y.shape
    x, dtype = a.x, a.weight.dtype
    if sum((n - 1) * step for n, step in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 2**31:
        x = x.contiguous()  # the kernel reaches the pixels of an image by 32-bit offsets
    arch = backend.architecture(x.device)
    config = tuning.config(
        op,
        table_key(op, a),
        x.device,
        default=lambda: default_config(batch * tokens, d, dtype, arch),
        candidates=lambda: candidate_configs(dtype, arch),
    )
    launch_patch_embed_fwd(
        x=x,
        weight=a.weight,
        bias=_check.dense(a.bias),
        pos_embed=unit_rows(a.pos_embed),
        prefix_tokens=unit_rows(a.prefix_tokens),
        mean=_check.dense(a.mean),
        std=_check.dense(a.std),
        y=y,
        stats=stats,
        config=config,
    )


def _kernel(a: Arguments) -> torch.Tensor:
    y = backend.empty(size(a), dtype=dtype_of(a), device=a.x.device)
    launch("patch_embed", a, y)
    return y


def _fake(a: Arguments) -> torch.Tensor:
    return a.x.new_empty(size(a), dtype=dtype_of(a))


def unsupported(a: Arguments) -> str | None:
    batch, tokens, _ = size(a)
    if batch * tokens >= 2**31 - 256:
        return f"{batch * tokens} tokens; the kernel counts them in 31 bits"
    return _check.kernel_dtypes(*(a[1:] if a.x.dtype == torch.uint8 else a))


def _measured(a: Arguments) -> str:
    # without a measurement the vendor's convolution runs
    return tuning.choice(table_key("patch_embed", a), a.x.device, "reference")


def cost(a: Arguments) -> Cost:
    batch, tokens, d = size(a)
    prefix = 0 if a.prefix_tokens is None else a.prefix_tokens.shape[0]
    result = batch * tokens * d * dtype_of(a).itemsize
    return Cost(2 * batch * (tokens - prefix) * a.weight.numel(), nbytes(a) + result)


def _saves(a: Arguments, needs: frozenset[str]) -> set[str]:
    if needs & {"mean", "std"}:
        return set(Arguments._fields)
    saves = {"x", "mean", "std"} if "weight" in needs else set()
    return saves | {"weight"} if "x" in needs else saves


def _backward(
    a: Arguments, results: tuple[None], grad: torch.Tensor, needs: frozenset[str]
) -> dict[str, torch.Tensor]:
    """A convolution whose stride is its kernel is a linear layer of patches, and so are its gradients."""
    if needs & {"mean", "std"}:
        names = [name for name in Arguments._fields if name in needs]
        places = [Arguments._fields.index(name) for name in names]
        return dict(zip(names, reference_gradients(reference, a, grad, places), strict=True))
    found = {}
    d, channels, height, width = a.weight.shape
    prefix = 0 if a.prefix_tokens is None else a.prefix_tokens.shape[0]
    if needs & {"pos_embed", "prefix_tokens"}:
        tokens = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
        if a.pos_embed is not None:
            found["pos_embed"] = tokens.to(a.pos_embed.dtype)
        if a.prefix_tokens is not None:
            # in memory of its own: whoever scales both in place would scale this twice
            found["prefix_tokens"] = tokens[:prefix].to(a.prefix_tokens.dtype, copy=True)
    if not needs & {"x", "weight", "bias"}:
        return found
    rows = grad[:, prefix:].reshape(-1, d).to(a.weight.dtype)
    down, across = a.x.shape[2] // height, a.x.shape[3] // width
    sizes = {"b": a.x.shape[0], "h": down, "w": across, "p": height, "q": width, "c": channels}
    if "weight" in needs:
        inside = a.x[:, :, : down * height, : across * width]
        pixels = normalize(inside, a.mean, a.std, a.weight.dtype)
        patches = rearrange(pixels, "b c (h p) (w q) -> (b h w) (c p q)", **sizes)
        of_weight = parameter_gradients(rows, patches, a.weight, None, None, "bias" in needs)
        found |= {"weight": of_weight.weight.view(a.weight.shape), "bias": of_weight.bias}
    elif "bias" in needs:
        found["bias"] = bias_gradient(rows, None)
    if "x" in needs:
        patches = input_gradient(rows, a.weight.reshape(d, -1), None)
        image = rearrange(patches, "(b h w) (c p q) -> b c (h p) (w q)", **sizes)
        # what no patch reaches at the right and at the bottom has no gradient
        found["x"] = F.pad(image, (0, a.x.shape[3] - image.shape[3], 0, a.x.shape[2] - image.shape[2]))
    return found


PATCH_EMBED = Op(
    "patch_embed",
    SCHEMA,
    arguments=Arguments,
    kernel=_kernel,
    reference=reference,
    fake=_fake,
    unsupported=unsupported,
    measured=_measured,
    cost=cost,
    gradient=Gradient(saves=_saves, backward=_backward),
)
