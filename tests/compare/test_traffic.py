"""Launches and bytes against what can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastvr
from fastvr import backend
from fastvr.compare.traffic import count, eager_traffic, flops
from fastvr.ops.linear import linear
from fastvr.tuner.calls import meta_copy


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias, act="gelu")


def test_an_op_of_ours_is_its_launches() -> None:
    traffic = count(Fused(), torch.empty(4, 6))
    assert traffic is not None
    moved = 4 * (4 * 6 + 8 * 6 + 8 + 4 * 8)
    assert (traffic.launches, traffic.bytes) == (1, moved)
    assert traffic.by_op == {"linear": (1, moved)}


def test_the_same_in_pytorch_is_one_launch_a_call() -> None:
    traffic = eager_traffic(Fused(), torch.empty(4, 6))
    product, gelu = 4 * (4 * 6 + 8 * 6 + 8 + 4 * 8), 4 * (2 * 4 * 8)
    assert (traffic.launches, traffic.bytes) == (2, product + gelu)


def test_a_copy_that_an_op_has_made_counts() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        # the kernel takes a residual whose rows are contiguous only
        return linear(x, torch.empty(8, 6, device="meta"), residual=torch.empty(8, 4, device="meta").t())

    traffic = count(call, torch.empty(4, 6))
    assert traffic is not None
    copied, launched = 4 * 2 * 4 * 8, 4 * (4 * 6 + 8 * 6 + 4 * 8 + 4 * 8)
    assert traffic.by_op == {"aten.clone.default in linear": (1, copied), "linear": (1, launched)}


@pytest.mark.parametrize(
    ("call", "launches", "moved"),
    [
        (lambda x: x.t().view(6, 4)[1:].unsqueeze(0), 0, 0),
        (lambda x: x + 1, 1, 2 * 24),
        (lambda x: x + x, 1, 2 * 24),
        (lambda x: x.add_(1), 1, 2 * 24),
        (lambda x: x.contiguous(), 0, 0),
        (lambda x: x.t().contiguous(), 1, 2 * 24),
        (lambda x: x * x[:1].expand(4, 6), 1, 24 + 6 + 24),
        (lambda x: torch.empty_like(x).zero_(), 1, 24 + 24),
        (lambda x: x.to(torch.float16).float(), 2, 2 * (24 + 12)),
        (lambda x: torch._foreach_add_([x, x.clone()], 1), 2, 2 * 24 + 2 * 48),
    ],
)
def test_pytorch_calls(call: object, launches: int, moved: int) -> None:
    traffic = eager_traffic(call, torch.empty(4, 6))  # type: ignore[arg-type]
    assert (traffic.launches, traffic.bytes) == (launches, 4 * moved)


def test_attention_is_one_flash_launch() -> None:
    traffic = eager_traffic(
        lambda q: nn.functional.scaled_dot_product_attention(q, q, q), torch.empty(2, 3, 5, 32)
    )
    assert traffic.launches == 1
    assert list(traffic.by_op) == ["aten._scaled_dot_product_flash_attention.default"]


def test_the_model_stays_as_it_is() -> None:
    model = Fused()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count(model, torch.empty(4, 6))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert backend.current_backend() == "auto"


def test_a_meta_copy_keeps_strides_and_names() -> None:
    conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    copied = meta_copy(conv)
    assert copied.weight.device.type == "meta"
    assert copied.weight.stride() == conv.weight.stride()
    assert conv.weight.device.type == "cpu"


def test_no_kernel_for_float64() -> None:
    with pytest.raises(backend.BackendError, match="float64"):
        count(Fused().double(), torch.empty(4, 6, dtype=torch.float64))


def test_without_triton_there_is_nothing_to_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "triton_missing", lambda: "Triton is not installed")
    assert count(Fused(), torch.empty(4, 6)) is None


def test_flops_are_two_a_multiply_add() -> None:
    assert flops(Fused(), torch.empty(4, 6)) == 2 * 4 * 6 * 8
    assert flops(nn.Conv2d(3, 8, 3), torch.empty(2, 3, 6, 6)) == 2 * 2 * 8 * 16 * 27


@pytest.mark.parametrize(
    # the libraries' own, and one more for the class token's query
    ("build", "eager_launches", "most"),
    [(fastvr.ViT, 125 + 1, 90), (fastvr.ResNet50, 174, 47)],
)
def test_the_models_fit_their_budget(build: type[nn.Module], eager_launches: int, most: int) -> None:
    with torch.device("meta"):
        model = build().bfloat16().eval()
    x = torch.empty(64, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    x = x.contiguous(memory_format=torch.channels_last)
    eager, fused = eager_traffic(model, x), count(model, x)
    assert fused is not None
    # the reference may fold a call or two, never more than the libraries make
    assert fused.launches <= most < eager.launches <= eager_launches
    assert fused.bytes < 0.7 * eager.bytes


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).square()


def test_a_training_step_by_hand() -> None:
    traffic = eager_traffic(Squared(), torch.empty(4, 6), train=True)
    forward = (24 + 6 + 24) + (24 + 24)
    # of the square: a power, times two, times the upstream gradient; of the weight: a product, summed
    backward = (24 + 24) + (24 + 24) + (24 + 24 + 24) + (24 + 24 + 24) + (24 + 6)
    assert traffic.bytes == 4 * (forward + backward), traffic.by_op
    assert (traffic.launches, traffic.flops) == (2 + 5, 0)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "weight frozen"])
def test_a_convolutions_training_step(frozen: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 1))
    model[0].weight.requires_grad_(not frozen)
    traffic = eager_traffic(model, torch.empty(2, 3, 6, 6), train=True)
    first, second = 2 * 2 * 8 * 16 * 27, 2 * 2 * 8 * 16 * 8
    # the image asks for no gradient; nor does what the second reads, where the first weight is frozen
    assert traffic.flops == first + 2 * second + (0 if frozen else first + second)
    assert model[2].weight.grad is None
    assert model.training


def test_a_training_step_of_ours_counts_the_arithmetic_of_its_gradient() -> None:
    traffic = count(Fused(), torch.empty(4, 6), train=True)
    assert traffic is not None
    product = 2 * 4 * 6 * 8
    # x asks for no gradient, so beside the product there is one for the weight's, and what is computed again
    assert 2 * product <= traffic.flops <= 3 * product
    # forward, and what its activation was given again
    assert traffic.by_op["linear"] == (2, 2 * 4 * (4 * 6 + 8 * 6 + 8 + 4 * 8))
    assert traffic.launches > 2


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="model: nothing of its result would be differentiated"):
        eager_traffic(nn.ReLU(), torch.empty(4, 6), train=True)
