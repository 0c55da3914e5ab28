"""An image's patches as tokens (Dosovitskiy et al., 2021)."""

from __future__ import annotations

import torch
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


def add_tokens(
    x: torch.Tensor, pos_embed: torch.Tensor | None, prefix_tokens: torch.Tensor | None
) -> torch.Tensor:
    """Prefix tokens and positions for patches that were embedded by themselves."""
    if prefix_tokens is not None:
        x = torch.cat([prefix_tokens.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
    return x if pos_embed is None else x + pos_embed
