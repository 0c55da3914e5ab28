"""The gradients of conv_bn_relu, and what is kept for them."""

from __future__ import annotations

import pytest
import torch
from contract import DTYPES, triton_forced
from convolutions import VECTORS, check, inputs

from fastvr.compare import traffic
from fastvr.ops.conv_bn_relu import conv_bn_relu

pytest.importorskip("triton")


@pytest.mark.parametrize("shape", [(2, 16, 7, 7, 24, 3, 2, 1, 1), (2, 16, 5, 5, 24, 1, 1, 0, 2)], ids=str)
@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(shape, statistics, dtype, device):
    given = inputs(*shape, dtype, device, running_mean=statistics, running_var=statistics)
    for name in ("x", "weight", "bn_weight", "bn_bias", "residual"):
        given[name].requires_grad_()
    check(given, backward=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [VECTORS, VECTORS[:2], ()], ids=["frozen", "scale and shift", "plain"])
@pytest.mark.parametrize("asked", [("x",), ("weight",), ("x", "weight", "bn_bias", "residual")], ids=str)
def test_gradients_by_the_vendors_convolution(asked, parts, dtype, device):
    shape = (2, 16, 7, 7, 24, 3, 2, 1, 1)
    left = {name: False for name in (*VECTORS, "residual") if name not in (*parts, *asked)}
    given = inputs(*shape, dtype, device, act="relu" if parts else "none", **left)
    for name in asked:
        given[name].requires_grad_()
    check(given, backward=True)


@pytest.mark.parametrize("act", ["none", "relu"])
def test_the_product_is_not_made_again_for_its_gradient(act, device):
    given = inputs(2, 16, 7, 7, 24, 3, 2, 1, 1, torch.float32, device, act=act)
    for name in ("weight", "residual"):
        given[name].requires_grad_()
    kept = []
    with triton_forced(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda i: i):
        y = conv_bn_relu(**given)
    # and of the maps only what is read is kept
    maps = [t.shape for t in kept if t.dim() == 4]
    assert maps == [given["x"].shape, given["weight"].shape, *([y.shape] if act == "relu" else [])]
    x, weight = given["x"].detach(), given["weight"]

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(weight.detach())

        def forward(self, x):
            return conv_bn_relu(x, self.weight, stride=2, padding=1, act=act)

    step = traffic.count(Layer(), x, train=True)
    assert step.flops == 2 * 2 * y.numel() * weight[0].numel()


def test_gradients_beside_strided_vectors(device):
    """PyTorch's own batch_norm reads past strided vectors in its backward pass for channels_last."""
    given = inputs(1, 8, 7, 4, 7, 3, 2, 1, 1, torch.float32, device)
    for name in VECTORS:
        given[name] = given[name].repeat_interleave(2)[::2]
    given["x"].requires_grad_()
    check(given, backward=True)
