"""An image's patches as tokens (Dosovitskiy et al., 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastvr.nn.plain import plain
from fastvr.ops.patch_embed import patch_embed
from fastvr.reference.image import normalize


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel; with timm's names.

    Args:
        img_size: (height, width) of the images.
        patch_size: (height, width) of a patch.
        in_chans: channels of the images.
        embed_dim: width of the tokens.
        bias: whether the convolution has one.
    """

    def __init__(
        self,
        img_size: tuple[int, int] = (224, 224),
        patch_size: tuple[int, int] = (16, 16),
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = patch_size
        self.grid_size = (img_size[0] // patch_size[0], img_size[1] // patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj: nn.Module = nn.Conv2d(
            in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, bias=bias
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to [B, num_patches, embed_dim]."""
        return self.tokens(x)

    def set_input_size(self, img_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
        """Take images of another size, or other patches, for which the weight is resampled.

        Raises:
            ValueError: another ``patch_size``, but ``proj`` is not the convolution that it was made as.
        """
        proj = self.proj
        if patch_size != self.patch_size:
            if not (isinstance(proj, nn.Conv2d) and proj.kernel_size == proj.stride == self.patch_size):
                raise ValueError(
                    "PatchEmbed: patch_size must stay where proj is not a convolution whose stride is its "
                    f"kernel, {self.patch_size}; got {patch_size}"
                )
            weight = resample_weight(proj.weight.detach(), patch_size)
            proj.weight = nn.Parameter(weight, requires_grad=proj.weight.requires_grad)
            proj.kernel_size = proj.stride = patch_size
        self.img_size, self.patch_size = img_size, patch_size
        self.grid_size = (img_size[0] // patch_size[0], img_size[1] // patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def tokens(
        self,
        x: torch.Tensor,
        pos_embed: torch.Tensor | None = None,
        prefix_tokens: torch.Tensor | None = None,
        mean: torch.Tensor | None = None,
        std: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """The tokens with ``prefix_tokens`` [P, D] in front, ``pos_embed`` [1, P + num_patches, D] added.

        A uint8 ``x`` is ``(x / 255 - mean) / std``, in ``dtype`` where ``proj`` is called.
        """
        proj = self.proj
        if plain(proj, nn.Conv2d) and self.one_launch():
            return patch_embed(
                x,
                proj.weight,
                proj.bias,
                pos_embed=pos_embed,
                prefix_tokens=prefix_tokens,
                mean=mean,
                std=std,
            )
        y: torch.Tensor = proj(normalize(x, mean, std, dtype)).flatten(2).transpose(1, 2)
        return add_tokens(y, pos_embed, prefix_tokens)

    def one_launch(self) -> bool:
        """Whether the op computes what ``proj`` does."""
        proj = self.proj
        # a plain Conv2d that somebody put in place may overlap, dilate or pad
        return (
            plain(proj, nn.Conv2d)
            and proj.kernel_size == proj.stride == self.patch_size
            and proj.padding in ((0, 0), "valid")
            and proj.dilation == (1, 1)
            and proj.groups == 1
        )


def resample_weight(weight: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """A patch embedding's weight for patches of another size, as timm makes it (Beyer et al., 2023).

    Enlarging a patch bicubically and embedding it by the result gives what the patch itself was embedded as:
    the weight is multiplied by the pseudo-inverse of that resize.

    Args:
        weight: [D, C, height, width], floating.
        patch_size: (height, width).

    Returns:
        [D, C, *patch_size], in ``weight``'s dtype.
    """
    old = weight.shape[2:]
    pixels = torch.eye(old.numel(), dtype=torch.float64).unflatten(1, old)
    resize = F.interpolate(pixels[:, None], size=patch_size, mode="bicubic", antialias=True)
    wide = torch.promote_types(weight.dtype, torch.float32)
    inverse = torch.linalg.pinv(resize.flatten(1).T).to(weight.device, wide)
    resampled: torch.Tensor = (weight.to(wide).flatten(2) @ inverse).unflatten(2, patch_size)
    return resampled.to(weight.dtype)


def add_tokens(
    x: torch.Tensor, pos_embed: torch.Tensor | None, prefix_tokens: torch.Tensor | None
) -> torch.Tensor:
    """Prefix tokens and positions for patches that were embedded by themselves."""
    if prefix_tokens is not None:
        x = torch.cat([prefix_tokens.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
    return x if pos_embed is None else x + pos_embed
