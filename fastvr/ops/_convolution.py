"""The vendor's gradient of a convolution, of which only what is asked for is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastvr.ops._op import Kind


def convolution_gradients(
    grad: torch.Tensor,
    x: torch.Tensor | Kind,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int = 1,
    *,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of ``conv2d(x, weight)`` with respect to x and weight, None where not needed.

    Args:
        grad: [N, O, OH, OW], weight's dtype.
        x: [N, C, H, W]; its shape is enough where the weight's gradient is not needed.
        weight: [O, C / groups, kh, kw].
    """
    if not (needs_x or needs_weight):
        return None, None
    # as torch.nn.grad has it: of what is not read only the shape counts
    given = x if isinstance(x, torch.Tensor) else grad.new_empty(1).expand(x.shape)
    if grad.numel() == 0:
        dx, dweight = given.new_zeros(given.shape), torch.zeros_like(weight)
    else:
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            grad, given, weight, None, stride, padding, [1, 1], False, [0, 0], groups,
            [needs_x, needs_weight, False],
        )  # fmt: skip
    return dx if needs_x else None, dweight if needs_weight else None
