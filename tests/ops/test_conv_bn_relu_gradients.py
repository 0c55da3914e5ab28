"""The gradients of conv_bn_relu, and what is kept for them."""

from __future__ import annotations

import pytest
import torch
from contract import DTYPES, assert_order_does_not_matter, randn, triton_forced
from convolutions import VECTORS, both, check, inputs

from fastvr import tuning
from fastvr.backend import observe, use_backend
from fastvr.compare import traffic
from fastvr.ops.conv_bn_relu import conv_bn_relu
from fastvr.ops.conv_bn_relu_backward import CONV_BN_RELU_BACKWARD, WANTED
from fastvr.reference.conv_bn_relu import conv_bn_relu as reference
from fastvr.testing import assert_parity

pytest.importorskip("triton")
from fastvr.kernels import batch_norm_stats as layout

OP = "conv_bn_relu_backward"


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


def trained(*shape, dtype=torch.float32, device, **parts):
    """Arguments of which all that the gradient's operator gives asks for a gradient."""
    given = inputs(*shape, dtype, device, **parts)
    for name in WANTED:
        given[name].requires_grad_()
    return given


@pytest.mark.parametrize("arch", ["interpreter", "sm_90"])
def test_every_configuration_and_several_parts(arch, device, monkeypatch):
    monkeypatch.setattr(layout, "_PROGRAMS", 8)
    given = trained(2, 16, 9, 9, 72, 1, 1, 0, 1, device=device)
    for config in layout.candidate_configs(72, torch.float32, arch):
        with tuning.force_config(OP, config), observe() as ran:
            check(given, backward=True)
        assert ran[OP, "triton"] == 1


@pytest.mark.parametrize("name", ["x", "weight"])
def test_other_layouts(name, device):
    """A gradient comes back as its argument lies."""
    given = trained(2, 16, 5, 5, 24, 3, 1, 1, 1, device=device)
    given[name] = given[name].detach().contiguous().requires_grad_()
    check(given, backward=True)
    with triton_forced():
        (gradient,) = torch.autograd.grad(conv_bn_relu(**given).sum(), given["weight"])
    assert gradient.stride() == given["weight"].stride()


def test_a_float32_residual_beside_bfloat16(device):
    given = trained(2, 16, 5, 5, 24, 3, 1, 1, 1, dtype=torch.bfloat16, device=device)
    given["residual"] = given["residual"].detach().float().requires_grad_()
    check(given, backward=True)


def test_an_empty_batch(device):
    given = trained(0, 16, 6, 5, 24, 3, 2, 1, 1, device=device)
    wanted = [given[name] for name in WANTED]
    with triton_forced():
        gradients = torch.autograd.grad(conv_bn_relu(**given).sum(), wanted)
    assert [g.shape for g in gradients] == [t.shape for t in wanted]
    assert not any(g.any() for g in gradients)


def test_nan_lets_the_gradient_through(device):
    given = trained(1, 8, 3, 3, 8, 1, 1, 0, 1, device=device)
    with torch.no_grad():
        given["bn_bias"][3] = float("nan")
    upstream = randn(1, 8, 3, 3, device=device)
    with triton_forced():
        (gradient,) = torch.autograd.grad(conv_bn_relu(**given), given["residual"], upstream)
    assert torch.equal(gradient[:, 3], upstream[:, 3])


def test_the_order_of_programs_does_not_matter(device, monkeypatch):
    monkeypatch.setattr(layout, "_PROGRAMS", 8)
    given = trained(2, 16, 9, 9, 72, 1, 1, 0, 1, device=device)
    upstream = randn(2, 72, 9, 9, device=device)

    def gradients():
        found = torch.autograd.grad(conv_bn_relu(**given), [given[name] for name in WANTED], upstream)
        return torch.cat([gradient.flatten() for gradient in found])

    with tuning.force_config(OP, layout.candidate_configs(72, torch.float32, "interpreter")[-1]):
        assert_order_does_not_matter(gradients)


@pytest.mark.parametrize("mode", ["triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_op_alone(dtype, mode, device):
    """As where the forward pass ran on one implementation and the backward pass runs on the other."""
    given = trained(2, 16, 7, 7, 24, 3, 2, 1, 2, dtype=dtype, device=device)
    grad = randn(2, 24, 4, 4, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    exact = {n: v.detach().double() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    for name in WANTED:
        exact[name].requires_grad_()

    def gradients(given, grad):
        steps = {"stride": both(given["stride"]), "padding": both(given["padding"])}
        y = reference(**given | steps)
        return y.detach(), torch.autograd.grad(y, [given[name] for name in WANTED], grad)

    y, eager = gradients(given, grad)
    _, truth = gradients(exact, grad.double())
    x, weight, scale, shift, *_ = (v.detach() for v in given.values() if isinstance(v, torch.Tensor))
    arguments = (grad, y, x, x.shape, weight, scale, shift, given["running_var"], 1e-5, [2, 2], [1, 1], 2)
    with use_backend(mode):
        found = CONV_BN_RELU_BACKWARD(*arguments, None, None, [True] * 4)
    assert_parity(tuple(found), eager, truth, kind="gradient", sample_dim=None)


def test_operator(device):
    given = inputs(2, 8, 5, 5, 12, 3, 2, 1, 1, torch.float32, device)
    x, weight, scale, shift = (given[name] for name in ("x", "weight", "bn_weight", "bn_bias"))
    y, grad = (randn(2, 12, 3, 3, device=device).to(memory_format=torch.channels_last) for _ in range(2))
    rest = ([2, 2], [1, 1], 1, None, None)
    with triton_forced():
        for arguments in (
            (grad, y, x, [2, 8, 5, 5], weight, scale, shift, given["running_var"], 1e-5, *rest, [True] * 4),
            (
                grad,
                None,
                None,
                [2, 8, 5, 5],
                weight,
                None,
                shift,
                None,
                1e-5,
                *rest,
                [True, False, True, False],
            ),
        ):
            torch.library.opcheck(CONV_BN_RELU_BACKWARD.overload, arguments)
