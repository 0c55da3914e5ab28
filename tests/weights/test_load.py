"""Checkpoints of timm and torchvision go in whole, or not at all."""

from __future__ import annotations

import copy
import io
import json
import pickle
import struct
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import fastvr
from fastvr.models import resnet
from fastvr.nn import residual
from fastvr.testing import assert_parity, truth_model

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def vit(**overrides: Any) -> fastvr.ViT:
    torch.manual_seed(0)
    return fastvr.ViT(**{**SIZES, "num_classes": 5, **overrides}).eval()


def small_resnet(**overrides: Any) -> resnet.ResNet:
    torch.manual_seed(0)
    arguments = {"num_classes": 5, "width": 8, **overrides}
    return resnet.ResNet(residual.BasicBlock, (1, 1, 1, 1), **arguments).eval()


def peers(kind: str) -> tuple[nn.Module, nn.Module]:
    """A peer with other weights, and our model of its shape."""
    torch.manual_seed(7)
    if kind == "timm-vit":
        return VisionTransformer(**SIZES, num_classes=5, init_values=0.1, reg_tokens=2), vit(
            init_values=0.5, reg_tokens=2
        )
    if kind == "torchvision-vit":
        peer = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 128, num_classes=5)
        nn.init.normal_(peer.heads.head.weight)
        return peer, vit()
    if kind == "timm-resnet":
        return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5), small_resnet(width=64)
    block = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=5), small_resnet(width=64)


def plain(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone().contiguous() for name, t in model.state_dict().items()}


def write(path: Path, state: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture
def unchanged() -> Callable[[nn.Module], Callable[[], None]]:
    """Remembers a model, and afterwards holds it to every bit of that."""

    def remember(model: nn.Module) -> Callable[[], None]:
        before = copy.deepcopy(model.state_dict())
        generation = model.generation

        def check() -> None:
            after = model.state_dict()
            assert list(after) == list(before)
            assert all(torch.equal(after[name], t) for name, t in before.items())
            assert model.generation == generation

        return check

    return remember


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("kind", ["timm-vit", "torchvision-vit", "timm-resnet", "torchvision-resnet"])
def test_loaded_weights_give_the_peers_logits(kind, suffix, tmp_path) -> None:
    peer, model = peers(kind)
    peer.eval()
    report = fastvr.load_checkpoint(model, write(tmp_path / f"weights{suffix}", plain(peer)))
    assert report == ("timm" if "resnet" in kind else kind.split("-")[0], (), (), ())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_parity(model(x), peer(x), truth_model(peer)(x.double()))


WRAPPINGS = {
    "model": lambda s: {"model": s, "epoch": 3},
    "state_dict": lambda s: {"state_dict": s, "optimizer": {"lr": 1}},
    "average first": lambda s: {"model": {k: t + 1 for k, t in s.items()}, "model_ema": s},
    "tutorial": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"lr": 1}},
    "lightning": lambda s: {"state_dict": {f"model.{k}": t for k, t in s.items()}},
    "detector": lambda s: {f"module.backbone.{k}": t for k, t in s.items()},
    "averaged": lambda s: {"n_averaged": torch.tensor(3), **{f"module.{k}": t for k, t in s.items()}},
    "nested": lambda s: {"state_dict": {"model": s}},
    "data parallel": lambda s: {f"module.{k}": t for k, t in s.items()},
    "compiled data parallel": lambda s: {"model": {f"module._orig_mod.{k}": t for k, t in s.items()}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("on_disk", [True, False], ids=["file", "mapping"])
def test_wrappers_and_prefixes_are_taken_off(wrapping, on_disk, tmp_path) -> None:
    source, model = vit(), vit(norm_eps=1e-5)
    nn.init.normal_(source.head.weight)
    wrapped = WRAPPINGS[wrapping](plain(source))
    fastvr.load_checkpoint(model, write(tmp_path / "w.pt", wrapped) if on_disk else wrapped)
    assert torch.equal(model.head.weight, source.head.weight)


@pytest.mark.parametrize("wrapping", ["dino", "dinov2", "one network"])
def test_of_self_distillation_the_teachers_backbone(wrapping) -> None:
    source, model = vit(num_classes=0), vit(num_classes=0)
    nn.init.normal_(source.norm.weight)
    teacher = {f"backbone.{k}": t for k, t in plain(source).items()}
    student = {f"module.backbone.{k}": t + 1 for k, t in plain(source).items()}
    if wrapping == "dinov2":
        teacher |= {"dino_head.mlp.0.weight": torch.ones(2), "ibot_head.last_layer.weight_g": torch.ones(2)}
    else:
        teacher |= {"head.mlp.0.weight": torch.ones(2), "head.last_layer.weight_g": torch.ones(2)}
    wrapped = {"student": student, "teacher": teacher, "epoch": 3, "optimizer": {"lr": 1}}
    fastvr.load_checkpoint(model, teacher if wrapping == "one network" else wrapped)
    assert torch.equal(model.norm.weight, source.norm.weight)


def test_a_head_beside_a_backbone_is_not_thrown_away() -> None:
    state = {f"backbone.{k}": t for k, t in plain(vit(num_classes=0)).items()}
    with pytest.raises(fastvr.CheckpointError, match="no layout"):
        fastvr.load_checkpoint(vit(num_classes=0), {**state, "linear_head.weight": torch.ones(5, 32)})


def test_wrapped_models_are_filled() -> None:
    source = vit()
    nn.init.normal_(source.norm.weight)
    for wrap in (torch.compile, nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m))):
        model = vit()
        fastvr.load_checkpoint(wrap(model), plain(source))
        assert torch.equal(model.norm.weight, source.norm.weight)


def test_dtype_device_and_layout_stay() -> None:
    model = small_resnet().bfloat16()
    strides = [t.stride() for t in model.state_dict().values()]
    pointers = [t.data_ptr() for t in model.state_dict().values()]
    source = small_resnet()
    nn.init.normal_(source.conv1.weight)
    fastvr.load_checkpoint(model, plain(source))
    assert [t.stride() for t in model.state_dict().values()] == strides
    assert [t.data_ptr() for t in model.state_dict().values()] == pointers
    assert torch.equal(model.conv1.weight, source.conv1.weight.bfloat16())
    assert model.bn1.num_batches_tracked.dtype == torch.int64


def test_files_that_do_not_count_batches() -> None:
    state = {name: t for name, t in plain(small_resnet()).items() if "num_batches" not in name}
    assert fastvr.load_checkpoint(small_resnet(), state).missing == ()


def test_not_strict_reports_names_and_loads_the_rest(unchanged) -> None:
    source, model = vit(), vit()
    nn.init.normal_(source.norm.weight)
    state = plain(source)
    del state["head.bias"]
    state["extra"] = torch.zeros(1)
    report = fastvr.load_checkpoint(model, state, strict=False)
    assert report == ("timm", ("head.bias",), ("extra",), ())
    assert torch.equal(model.norm.weight, source.norm.weight)
    check = unchanged(model)
    with pytest.raises(fastvr.CheckpointError, match=r"shape of head\.weight"):
        fastvr.load_checkpoint(model, plain(vit(num_classes=6)), strict=False)
    check()


def _with(name: str, tensor: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {**state, name: tensor}


def _without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {key: t for key, t in state.items() if key not in names}


NAN = torch.full((32,), torch.nan)
BAD_STATES = {
    "missing": (
        _without("norm.weight", "blocks.1.mlp.fc1.bias"),
        ["missing: blocks.1.mlp.fc1.bias, norm"],
    ),
    "missing first": (_without("patch_embed.proj.weight"), ["missing: patch_embed.proj.weight"]),
    "unknown": (_with("norm_pre.weight", torch.ones(32)), ["unknown: norm_pre.weight"]),
    "shape": (_with("norm.weight", torch.ones(31)), [r"shape of norm.weight: \[31\], the model's is \[32\]"]),
    "positions": (_with("pos_embed", torch.ones(1, 9, 32)), ["shape of pos_embed", "img_size"]),
    "nan": (_with("norm.bias", NAN), ["NaN or Inf in the model's dtype: norm.bias"]),
    "inf": (_with("norm.bias", NAN.clone().fill_(torch.inf)), ["norm.bias"]),
    "integer": (_with("norm.bias", torch.ones(32, dtype=torch.int8)), [r"norm.bias \(torch.int8\)"]),
    "complex": (
        _with("norm.bias", torch.ones(32, dtype=torch.complex64)),
        [r"norm.bias \(.*complex64\)"],
    ),
    "sparse": (_with("norm.bias", torch.ones(32).to_sparse()), [r"norm.bias \(no plain tensor\)"]),
    "meta": (_with("norm.bias", torch.ones(32, device="meta")), [r"norm.bias \(no plain tensor\)"]),
    "no tensor": (_with("norm.bias", [0.0] * 32), [r"'norm.bias' \(list\)"]),
    "number as key": (_with(3, torch.ones(1)), [r"3 \(Tensor\)"]),  # type: ignore[arg-type]
    "all at once": (
        lambda s: {
            **_without("norm.weight")(s),
            "extra": torch.ones(1),
            "norm.bias": torch.ones(2),
            "head.bias": torch.full((5,), torch.nan),
        },
        [
            r"\(timm's layout of a ViT\) does not fit ViT:",
            *("missing: norm.weight\n", "unknown: extra\n", "shape of norm.bias: ", "NaN .*: head.bias"),
        ],
    ),
    "in every block": (
        lambda s: {
            **{name: t for name, t in s.items() if ".norm1." not in name},
            **{f"blocks.{i}.attn.proj.bias": torch.ones(9) for i in range(2)},
            **{f"blocks.{i}.extra": torch.ones(1) for i in (0, 2, 3, 4)},
        },
        [
            r"missing: blocks\.{0-1}\.norm1\.weight, blocks\.{0-1}\.norm1\.bias\n",
            r"unknown: blocks\.{0,2-4}\.extra\n",
            r"shape of blocks\.{0-1}\.attn\.proj\.bias: \[9\], the model's is \[32\]",
        ],
    ),
    "several values": (
        lambda s: {**s, "norm.bias": NAN, "norm.weight": NAN, "cls_token": torch.ones(1, 1, 32).int()},
        ["norm.weight, norm.bias", "cls_token"],
    ),
    "empty": (lambda s: {}, ["is empty"]),
    "foreign": (
        lambda s: {"a": torch.ones(1), "b": torch.ones(1)},
        ["no layout of a ViT .* keys: a, b"],
    ),
    "other family": (
        lambda s: plain(small_resnet()),
        ["a ResNet in timm's layout, the model is a ViT"],
    ),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_states_are_named_and_change_nothing(case, unchanged, tmp_path) -> None:
    spoil, messages = BAD_STATES[case]
    model = vit()
    check = unchanged(model)
    state = spoil(plain(vit()))
    with pytest.raises(fastvr.CheckpointError) as mapping:
        fastvr.load_checkpoint(model, state)
    check()
    if case == "meta":
        return
    path = write(tmp_path / "some.pt", state)
    with pytest.raises(fastvr.CheckpointError) as file:
        fastvr.load_checkpoint(model, path)
    check()
    for message in messages:
        mapping.match(message)
        file.match(message)
    file.match("some.pt")


def test_another_number_of_classes_says_what_to_do(unchanged) -> None:
    for model, other in ((vit(), vit(num_classes=9)), (small_resnet(), small_resnet(num_classes=9))):
        check = unchanged(model)
        with pytest.raises(fastvr.CheckpointError, match="9 classes: construct the model with num_classes=9"):
            fastvr.load_checkpoint(model, plain(other))
        check()


def test_another_width_is_not_taken_for_other_classes_or_positions() -> None:
    with pytest.raises(fastvr.CheckpointError, match="shape of pos_embed") as raised:
        fastvr.load_checkpoint(vit(), plain(vit(embed_dim=64)))
    assert "construct the model" not in str(raised.value)


def test_what_overflows_in_the_models_dtype_is_named(unchanged) -> None:
    model = vit().half()
    check = unchanged(model)
    with pytest.raises(fastvr.CheckpointError, match=r"norm\.bias"):
        fastvr.load_checkpoint(model, {**plain(vit()), "norm.bias": torch.full((32,), 1e6)})
    check()


def test_torchvision_names_appear_in_the_message() -> None:
    peer, model = peers("torchvision-vit")
    state = plain(peer)
    state["encoder.ln.weight"] = torch.ones(3)
    state["encoder.layers.encoder_layer_1.other.weight"] = torch.ones(3)
    with pytest.raises(fastvr.CheckpointError) as error:
        fastvr.load_checkpoint(model, state)
    error.match("shape of encoder.ln.weight")
    error.match("unknown: encoder.layers.encoder_layer_1.other.weight")


def _header(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def _twice() -> bytes:
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    return _header(f'{{"norm.weight": {entry}, "norm.weight": {entry}}}'.encode(), bytes(4))


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def _saved(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def _scripted(module: nn.Module) -> bytes:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, torch.ones(1, 2)), stream)
    return stream.getvalue()


HOSTILE = {
    "empty.safetensors": (lambda s: b"", "too few"),
    "truncated.safetensors": (lambda s: s[: len(s) // 2], "truncated"),
    "one-byte-short.safetensors": (lambda s: s[:-1], "truncated"),
    "trailing.safetensors": (lambda s: s + b"\0", "cannot read"),
    "oversized-header.safetensors": (lambda s: _header(b"{}", length=2**63), "claims a header"),
    "longer-header.safetensors": (lambda s: _header(b"{}", length=100), "claims a header"),
    "no-json.safetensors": (lambda s: _header(b"{not json"), "cannot read"),
    "deep-json.safetensors": (lambda s: _header(b'{"a":' + b"[" * 100_000), "cannot read|nested"),
    "twice.safetensors": (lambda s: _twice(), "keys twice: norm.weight"),
    "out-of-bounds.safetensors": (
        lambda s: _header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', bytes(4)),
        "cannot read",
    ),
    "wrong-dtype.safetensors": (
        lambda s: _header(b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "cannot read",
    ),
    "claims-memory.pt": (
        lambda s: _saved({**plain(vit()), "head.weight": torch.zeros(1).expand(10**10, 32)}),
        r"bytes cannot hold head\.weight \[10000000000, 32\]",
    ),
    "text.pt": (lambda s: b"hello", "cannot read"),
    "empty.pt": (lambda s: b"", "cannot read"),
    "zip.pt": (lambda s: b"PK\x03\x04" + bytes(100), "cannot read"),
    "evil.pt": (lambda s: pickle.dumps({"a": _Evil()}), "cannot read"),
    "evil-zip.pt": (
        lambda s: _saved({"a": _Evil()}),
        r"refused, .* would run code: it holds .*pathlib\.Path",
    ),
    "arguments.pt": (
        lambda s: _saved({"model": plain(vit()), "args": Namespace(lr=1)}),
        r"argparse\.Namespace",
    ),
    "model.pt": (
        lambda s: _saved(nn.Linear(2, 2)),
        r"torch\.nn\.modules\.linear\.Linear .* weights_only=False",
    ),
    "script.pt": (lambda s: _scripted(nn.Linear(2, 2)), "cannot read it.*TorchScript"),
    "safetensors.pt": (lambda s: s, "cannot read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_named_and_change_nothing(name, unchanged, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = write(tmp_path / "good.safetensors", plain(vit())).read_bytes()
    make, message = HOSTILE[name]
    path = tmp_path / name
    path.write_bytes(make(good))
    model = vit()
    check = unchanged(model)
    with pytest.raises(fastvr.CheckpointError, match=message) as error:
        fastvr.load_checkpoint(model, path)
    error.match(name)
    check()
    assert not (tmp_path / "executed").exists()


def test_truncated_torch_file(unchanged, tmp_path) -> None:
    path = write(tmp_path / "half.pt", plain(vit()))
    path.write_bytes(path.read_bytes()[:2000])
    model = vit()
    check = unchanged(model)
    with pytest.raises(fastvr.CheckpointError, match=r"half\.pt"):
        fastvr.load_checkpoint(model, path)
    check()


def test_no_such_file(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        fastvr.load_checkpoint(vit(), tmp_path / "nothing.pt")
    with pytest.raises(fastvr.CheckpointError, match="directory"):
        fastvr.load_checkpoint(vit(), tmp_path)
    with pytest.raises(ValueError, match="path_or_state_dict must be a path or a state dict; got int"):
        fastvr.load_checkpoint(vit(), 3)


def test_models_it_cannot_fill() -> None:
    state = plain(vit())
    with pytest.raises(ValueError, match="model must be a ViT or ResNet"):
        fastvr.load_checkpoint(nn.Linear(2, 2), state)
    with pytest.raises(ValueError, match="model must be a ViT or ResNet; got str"):
        fastvr.load_checkpoint("vit_base_patch16_224", state)
    with pytest.raises(ValueError, match=r"got a Backbone with others .*before it goes into a Backbone"):
        fastvr.load_checkpoint(fastvr.Backbone(vit(), 1), state)
    with torch.device("meta"):
        model = vit()
    with pytest.raises(ValueError, match="meta"):
        fastvr.load_checkpoint(model, state)
