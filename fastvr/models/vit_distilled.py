"""DeiT's distilled Vision Transformer (Touvron et al., 2021): a second token learns from a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvr.models.vit import ViT, init_linear
from fastvr.nn.head import classify_tokens


class DistilledViT(ViT):
    """A ViT with a distillation token behind the class token and a head for each; the state-dict keys are
    those of timm's ``VisionTransformerDistilled``. Its logits are the mean of both heads'.

    ``set_distilled_training()`` lets a model in training give both: (class logits, distillation logits).

    Args:
        arguments: as :class:`ViT`'s, but for ``reg_tokens`` and ``class_token``; ``global_pool`` is "token".
    """

    _classifier = ("head", "head_dist")

    def __init__(self, *args: Any, **arguments: Any) -> None:
        if arguments.get("global_pool", "token") != "token":
            raise ValueError(f"DistilledViT: global_pool must be 'token'; got {arguments['global_pool']!r}")
        # the prefix of a ViT with one register, which then gets another name
        super().__init__(*args, **arguments, reg_tokens=1)
        self.dist_token = self.reg_token
        self.reg_token = None
        self.num_reg_tokens = 0
        assert self.dist_token is not None
        nn.init.trunc_normal_(self.dist_token, std=0.02)
        self.head_dist: nn.Module = self._new_head(self.num_classes)
        self.distilled_training = False

    def forward(self, x: torch.Tensor) -> Any:
        """[B, num_classes] logits of images, as :meth:`ViT.forward`; after ``set_distilled_training``, in
        training, a pair of them."""
        return self.forward_head(self.forward_features(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> Any:
        """Logits of what :meth:`forward_features` gave; with ``pre_logits`` the mean of the two tokens."""
        first, second = self.head_drop(x[:, 0]), self.head_drop(x[:, 1])
        if pre_logits:
            return (first + second) / 2
        first, second = classify_tokens(self.head, first), classify_tokens(self.head_dist, second)
        if self.distilled_training and self.training:
            return first, second
        return (first + second) / 2

    def set_distilled_training(self, enable: bool = True) -> None:
        """Let the model in training give the logits of both heads."""
        self.distilled_training = enable

    def get_classifier(self) -> Any:
        """Both last linear layers, or identities."""
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for ``num_classes`` (0: identities); ``global_pool`` "" is taken, as timm does."""
        if global_pool not in (None, "", "token"):
            raise ValueError(f"DistilledViT: global_pool must be 'token'; got {global_pool!r}")
        super().reset_classifier(num_classes)
        self.head_dist = self._new_head(num_classes)

    def prefix_parameters(self) -> list[nn.Parameter]:
        return [token for token in (self.cls_token, self.dist_token) if token is not None]

    def _new_head(self, num_classes: int) -> nn.Module:
        if not num_classes:
            return nn.Identity().train(self.training)
        like = self.pos_embed
        head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
        init_linear(head)
        return head.train(self.training)
