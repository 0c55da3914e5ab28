"""The tensor that fastvr's model gives, of what another library's returns."""

from __future__ import annotations

import torch
from torch import nn


class Output(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.inner(x)
        if isinstance(made, torch.Tensor):
            return made
        for name in ("logits", "image_embeds"):
            if name in made:
                return made[name]
        # what CLIP and SigLIP pool is the result; what a ViT and a DeiT pool is for nobody
        tower = hasattr(self.inner, "post_layernorm")
        return made.pooler_output if tower else made.last_hidden_state[:, 0]
