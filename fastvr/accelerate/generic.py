"""PyTorch's own modules in any model: LayerNorm, patch embeddings, max pooling, and sequences of modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from fastvr.accelerate.blocks import IDENTITY, FeedForward, fusable, ordinary_linear
from fastvr.accelerate.maps import conv_bn_act, takes_map
from fastvr.accelerate.swap import Accelerated, takes
from fastvr.nn.conv_bn_relu import plain_conv
from fastvr.nn.head import plain_pool
from fastvr.nn.mlp import fused_name
from fastvr.nn.plain import layer_norm as _layer_norm
from fastvr.nn.plain import plain, plain_norm
from fastvr.ops.layer_norm import layer_norm
from fastvr.ops.linear import linear
from fastvr.ops.patch_embed import PATCH_EMBED, patch_embed
from fastvr.ops.pool import MAX_POOL, pool_window

# a patch is at least so many pixels high and wide: smaller windows are a network's downsampling
_LEAST_PATCH = 4


class FastLayerNorm(Accelerated):
    """``nn.LayerNorm`` over the last dimension."""

    runs = "layer_norm"
    _fastvr_accelerates = nn.LayerNorm

    normalized_shape: tuple[int, ...]
    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        if getattr(module, "weight", None) is None:
            return "has no weight"
        if len(getattr(module, "normalized_shape", ())) != 1:
            return "normalises more than the last dimension"
        if getattr(module, "_fast_norm", False):
            return "timm's fast norm is on, which rounds in another way under autocast"
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if takes(x, weight, norm=True) and x.dim() and x.shape[-1] == weight.shape[0]:
            return layer_norm(x, weight, self.bias, self.eps)
        y: torch.Tensor = self.own_forward(x)
        return y


class PatchConv(Accelerated):
    """A convolution whose stride is its kernel. Its result is a channels_last map: tokens, without a copy."""

    runs = "patch_embed, which gives a channels_last map"
    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Conv2d)
        patches = (
            module.kernel_size == module.stride
            and min(module.kernel_size) >= _LEAST_PATCH
            and module.padding in ((0, 0), "valid")
            and module.dilation == (1, 1)
            and module.groups == 1
        )
        return None if patches else "neither patches nor followed by BatchNorm: one launch already"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        # asked again, since some change the stride of a model that is built, for denser patches
        patches = type(self).refusal(self) is None
        if patches and takes(x, weight) and x.dim() == 4 and x.shape[1] == weight.shape[1]:
            rows, columns = x.shape[2] // weight.shape[2], x.shape[3] // weight.shape[3]
            if rows and columns and PATCH_EMBED.chosen(x, weight, bias, None, None, None, None):
                tokens: torch.Tensor = patch_embed(x, weight, bias).unflatten(1, (rows, columns))
                return tokens.permute(0, 3, 1, 2)
        y: torch.Tensor = self.own_forward(x)
        return y


class FastMaxPool(Accelerated):
    """``nn.MaxPool2d`` of a channels_last map; of another one PyTorch's result lies as the map does."""

    runs = "max_pool, where the map is channels_last"
    optional = True

    kernel_size: int | tuple[int, int]
    stride: int | tuple[int, int]
    padding: int | tuple[int, int]

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        return None if plain_pool(module) else "dilated, with indices, or rounding up"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if takes(x, x) and x.dim() == 4 and channels_last(x) and plain_pool(self):
            names = ("kernel_size", "stride", "padding")
            window = pool_window("max_pool", names, self.kernel_size, self.stride, self.padding)
            if MAX_POOL.chosen(x, *window):
                return MAX_POOL(x, *window)
        y: torch.Tensor = self.own_forward(x)
        return y


class FastSequential(Accelerated):
    """Modules one after the other, of which Conv2d + BatchNorm2d (+ ReLU), and (LayerNorm +) Linear +
    activation (+ Linear) are computed together."""

    runs = "groups of its modules"
    optional = True

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        return None if _groups(module) else "nothing in it to compute together"

    @classmethod
    def describe(cls, module: nn.Module) -> str:
        ops: dict[str, None] = {}
        for first, *others in _groups(module):
            if plain_conv(first):
                ops["conv_bn_relu"] = None
            elif plain_norm(first) and len(others) > 2:
                ops["layernorm_mlp"] = None
            else:
                ops["linear with its activation"] = None
        return ", ".join(ops)

    def parts(self) -> Iterable[nn.Module]:
        return [module for group in _groups(self) for module in group]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        modules = _in_order(self)
        if not modules or not takes(x, next(self.parameters(), None), norm=plain(modules[0], nn.LayerNorm)):
            y: torch.Tensor = self.own_forward(x)
            return y
        # whether PyTorch's convolutions would have left a contiguous map here, where ours left channels_last:
        # what follows may take views of it
        contiguous = False
        while modules:
            length = _length(modules)
            group, modules = modules[:length], modules[length:]
            conv = group[0]
            if length > 1 and plain_conv(conv) and takes_map(x, conv):
                as_given = channels_last(x) and not contiguous
                contiguous = not (as_given or channels_last(conv.weight))
                x = conv_bn_act(conv, group[1], group[2] if length > 2 else None, x)
            elif length > 1 and not plain_conv(conv) and isinstance(x, torch.Tensor):
                x = _feed_forward(group, x)
            else:
                for module in group:
                    if contiguous and not _agnostic(module):
                        x, contiguous = _contiguous(x), False
                    x = module(x)
        return _contiguous(x) if contiguous else x


def _in_order(sequence: nn.Module) -> list[nn.Module]:
    # not children(), which names a module once that is there twice
    return [module for module in sequence._modules.values() if module is not None]


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    # a module may have made something else of it
    return x.contiguous() if isinstance(x, torch.Tensor) else x


def _groups(sequence: nn.Module) -> list[list[nn.Module]]:
    """The modules that are computed together."""
    modules, groups = _in_order(sequence), []
    while modules:
        length = _length(modules)
        groups += [modules[:length]] if length > 1 else []
        modules = modules[length:]
    return groups


def _length(modules: Sequence[nn.Module]) -> int:
    """How many of the first modules are computed together; 1 if it is none."""
    first, *rest = modules
    if plain_conv(first):
        if not rest or not plain(rest[0], nn.BatchNorm2d):
            return 1
        return 3 if len(rest) > 1 and plain(rest[1], nn.ReLU) else 2
    length = int(plain_norm(first))
    if len(modules) < length + 2 or fused_name(fusable(modules[length + 1])) is None:
        return 1
    if not ordinary_linear(modules[length]):
        return 1
    length += 2
    rest = list(modules[length:])
    dropped = int(bool(rest) and plain(rest[0], nn.Dropout))
    # without a norm before it, a second layer is no worse off by itself
    whole = plain_norm(first) and len(rest) > dropped and ordinary_linear(rest[dropped])
    return length + dropped + 1 if whole else length


def _feed_forward(group: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    norm = group[0] if plain_norm(group[0]) else None
    fc1, act, *rest = group[norm is not None :]
    if not takes(x, fc1.weight) or (norm is not None and not takes(x, norm.weight, norm=True)):
        for module in group:
            x = module(x)
        return x
    assert isinstance(fc1, nn.Linear)
    if not rest:
        x = x if norm is None else _layer_norm(norm, x, for_matmul=True)
        return linear(x, fc1.weight, fc1.bias, act=fused_name(fusable(act)) or "none")
    drop1 = rest[0] if len(rest) > 1 else IDENTITY
    return FeedForward(fc1, fusable(act), drop1, rest[-1], IDENTITY).branch(x, norm)  # type: ignore[misc]


def _agnostic(module: nn.Module) -> bool:
    """Whether ``module`` does not care how a map lies in memory: PyTorch's own ones do not."""
    return type(module).__module__.startswith("torch.nn.") and next(module.children(), None) is None


def channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
