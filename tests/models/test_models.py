"""What holds for every model: inputs, hooks, replaced modules, compilers, copies, launches."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastvr
from fastvr import backend
from fastvr.testing import assert_parity, truth_model

KINDS = ["vit", "basic", "bottleneck"]


@pytest.mark.parametrize("kind", ["vit", "bottleneck"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x[0], r"x must be \[N, 3, .*\]; got \[3, 32, 32\]"),
        (lambda x: x[:, :2], r"x must be \[N, 3, .*\]; got \[2, 2, 32, 32\]"),
        (lambda x: x[:, :, :0], r"x must be \[N, 3, .*\]; got \[2, 3, 0, 32\]"),
        (lambda x: x.to(torch.uint8), r"x must be floating, .*; got torch.uint8"),
        (lambda x: x.to(torch.complex64), r"x must be floating, .*; got torch.complex64"),
        (lambda x: x.double(), r"x must be torch.float32, .*; got torch.float64"),
        (lambda x: x.bfloat16(), r"x must be torch.float32, .*; got torch.bfloat16"),
        (lambda x: x.to("meta"), r"x must be on cpu, .*; got meta"),
        (lambda x: x.numpy(), r"x must be a torch.Tensor; got ndarray"),
    ],
    ids=["rank", "channels", "empty", "uint8", "complex", "float64", "bfloat16", "device", "numpy"],
)
def test_wrong_images_are_named_before_any_launch(kind, spoil, message, tiny, images) -> None:
    model = tiny(kind)
    with backend.observe() as ran, pytest.raises(ValueError, match=message):
        model(spoil(images()))
    assert not ran


def test_vit_names_a_wrong_size(tiny_vit, images) -> None:
    with pytest.raises(ValueError, match=r"ViT: x must be \[N, 3, 32, 32\]; got \[2, 3, 32, 40\]"):
        tiny_vit()(torch.zeros(2, 3, 32, 40))


@pytest.mark.parametrize("mode", ["reference", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch_and_one_sample(kind, mode, tiny, images, device) -> None:
    model, x = tiny(kind).to(device), images(3).to(device)
    with torch.no_grad(), fastvr.use_backend(mode):
        assert model(x[:0]).shape == (0, 10)
        one = model(x[:1])
    with torch.no_grad(), fastvr.use_backend("reference"):
        assert_parity(one, model(x[:1]), truth_model(model)(x[:1].double()))


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_one_sample_stays_there(kind, tiny, images, device) -> None:
    model, x = tiny(kind).to(device), images(3).to(device)
    poisoned = x.clone()
    poisoned[1, 0, 5, 5] = torch.nan
    with torch.no_grad(), fastvr.use_backend("triton"):
        clean, spoilt = model(x), model(poisoned)
    assert spoilt[1].isnan().all()
    assert torch.equal(clean[[0, 2]], spoilt[[0, 2]])


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_and_strided_images(kind, tiny, images, device) -> None:
    model, x = tiny(kind).to(device), images().to(device)
    wide = torch.randn(2, 3, 40, 64, device=device)
    wide[:, :, 4:36, ::2] = x
    with torch.no_grad():
        eager, exact = model(x), truth_model(model)(x.double())
        for same in (x.contiguous(memory_format=torch.channels_last), wide[:, :, 4:36, ::2]):
            for mode in ("reference", "triton"):
                with fastvr.use_backend(mode):
                    assert_parity(model(same), eager, exact, name=mode)


@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind, tiny, images) -> None:
    model = tiny(kind).double()
    with torch.no_grad():
        assert model(images().double()).dtype == torch.float64


@pytest.mark.parametrize("mode", ["reference", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_see_every_module_and_change_no_number(kind, mode, tiny, images, device) -> None:
    model, hooked, x = tiny(kind).to(device), tiny(kind).to(device), images().to(device)
    seen: set[str] = set()
    for name, module in hooked.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    with torch.no_grad():
        with fastvr.use_backend("reference"):
            eager, exact = model(x), truth_model(model)(x.double())
        with fastvr.use_backend(mode):
            assert_parity(hooked(x), eager, exact)
    assert seen == {name for name, _ in hooked.named_modules()}


def _hook(module: nn.Module, how: str, seen: list[str]) -> None:
    if how == "forward":
        module.register_forward_hook(lambda *_: seen.append(how))
    elif how == "pre":
        module.register_forward_pre_hook(lambda *_: seen.append(how))
    elif how == "backward":
        module.register_full_backward_hook(lambda *_: seen.append(how))
    elif how == "backward-pre":
        module.register_full_backward_pre_hook(lambda *_: seen.append(how))
    elif how == "patched":
        plain = module.forward
        module.forward = lambda x: seen.append(how) or plain(x)


@pytest.mark.parametrize("how", ["forward", "pre", "backward", "backward-pre", "patched"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("vit", "patch_embed"),
        ("vit", "patch_embed.proj"),
        ("vit", "blocks.0"),
        ("vit", "blocks.0.norm1"),
        ("vit", "blocks.0.attn"),
        ("vit", "blocks.0.attn.qkv"),
        ("vit", "blocks.0.attn.proj"),
        ("vit", "blocks.0.attn.attn_drop"),
        ("vit", "blocks.1.ls1"),
        ("vit", "blocks.1.norm2"),
        ("vit", "blocks.1.mlp"),
        ("vit", "blocks.1.mlp.act"),
        ("vit", "blocks.1.mlp.fc2"),
        ("vit", "blocks.1.drop_path2"),
        ("vit", "norm"),
        ("vit", "head"),
        ("bottleneck", "bn1"),
        ("bottleneck", "maxpool"),
        ("bottleneck", "layer2.0.conv3"),
        ("bottleneck", "layer2.0.relu"),
        ("bottleneck", "layer2.0.downsample"),
        ("bottleneck", "layer2.0.downsample.1"),
        ("bottleneck", "avgpool"),
        ("bottleneck", "fc"),
    ],
)
def test_one_hook_of_each_kind_is_called(kind, name, how, tiny, images) -> None:
    model, hooked, seen = tiny(kind), tiny(kind), []
    if kind == "bottleneck" and how.startswith("backward") and name.endswith("relu"):
        hooked.get_submodule(name).inplace = False  # PyTorch's own condition for such a hook
    _hook(hooked.get_submodule(name), how, seen)
    x = images()
    hooked(x).square().mean().backward()
    assert seen
    model(x).square().mean().backward()
    with torch.no_grad():
        assert_parity(hooked(x), model(x), truth_model(model)(x.double()))


def test_a_hook_on_attn_drop_sees_the_attention_weights(tiny_vit, images) -> None:
    model, seen = tiny_vit(), []
    model.blocks[0].attn.attn_drop.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.no_grad():
        model(images())
    (weights,) = seen
    assert weights.shape == (2, 2, 17, 17)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 17))


def test_a_global_hook_sees_every_module(tiny_vit, images) -> None:
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        with torch.no_grad():
            tiny_vit()(images())
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 2 * 4 + 1
    assert seen.count(nn.LayerNorm) == 2 * 2 + 1


class _LowRank(nn.Linear):
    """A LoRA-like layer: a subclass whose forward does more than its weight says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp.fc1", "head"])
def test_a_subclass_in_the_place_of_a_linear_is_called(name, tiny_vit, images) -> None:
    shifted, model = tiny_vit(), tiny_vit()
    linear = shifted.get_submodule(name)
    linear.__class__ = _LowRank
    with torch.no_grad():
        model.get_submodule(name).bias += 1
        exact = truth_model(model)(images().double())
        assert_parity(shifted(images()), model(images()), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_are_the_model(kind, tiny, images) -> None:
    model, x = tiny(kind), images()
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    loaded = tiny(kind, num_classes=10)
    loaded.load_state_dict(torch.load(stream, weights_only=True))
    with torch.no_grad():
        expected = model(x)
        for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            assert torch.equal(same(x), expected)
            assert [t.stride() for t in same.state_dict().values()] == [
                t.stride() for t in model.state_dict().values()
            ]


@pytest.mark.parametrize("mode", ["auto", "triton"])
@pytest.mark.parametrize("kind", ["vit", "bottleneck"])
def test_compiles_in_one_graph(kind, mode, tiny, images, device) -> None:
    model, x = tiny(kind, **({"depth": 1} if kind == "vit" else {})).to(device), images().to(device)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with fastvr.use_backend("reference"):
        eager = model(x)
        eager.backward(torch.ones_like(eager))
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        truth = truth_model(model)
        exact = truth(x.double())
        exact.backward(torch.ones_like(exact))
    model.zero_grad()
    with fastvr.use_backend(mode):
        y = compiled(x)
        y.backward(torch.ones_like(y))
    assert_parity(y, eager, exact)
    actual = {name: p.grad for name, p in model.named_parameters()}
    true = {name: p.grad for name, p in truth.named_parameters()}
    assert_parity(actual, expected, true, kind="gradient", sample_dim=None)


@pytest.mark.parametrize(
    ("name", "most"), [("vit_base", 76), ("vit_large", 24 * 6 + 4), ("resnet18", 21), ("resnet50", 38)]
)
def test_launches(name, most, device) -> None:
    from fastvr.kernels.common import record_launches

    with torch.device("meta"):
        model = fastvr.create_model(name).to(torch.bfloat16).eval()
    model = model.to_empty(device=device)
    launches: list[object] = []
    # recorded, none is carried out
    with (
        torch.no_grad(),
        fastvr.use_backend("triton"),
        backend.observe() as ran,
        record_launches(lambda *launch: launches.append(launch)),
    ):
        model(torch.empty(2, 3, 224, 224, dtype=torch.bfloat16, device=device))
    assert len(launches) == most
    assert {implementation for _, implementation in ran} == {"triton"}


def test_import_is_cheap() -> None:
    code = (
        # PyTorch's own FLOP counter, to which every op tells its formula, imports Triton where it is
        "import sys, torch.utils.flop_counter; before = set(sys.modules); import fastvr;"
        "assert fastvr.ops.linear.linear and fastvr.__version__;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(*sorted(new & {'triton', 'safetensors', 'timm', 'torchvision', 'numpy'}));"
        "print(torch.cuda.is_initialized())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False"]


def test_public_names() -> None:
    assert all(hasattr(fastvr, name) for name in fastvr.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fastvr.no_such_name
