"""Every layout goes into fastvr's models with its own library's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from outputs import Output
from safetensors.torch import save_file
from torch import nn

import fastvr
from fastvr.models.resnet import ResNet
from fastvr.nn.residual import BasicBlock, Bottleneck
from fastvr.testing import assert_parity, truth_model
from fastvr.verify import verify

VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
    "num_classes": 5,
}
DINOV2 = {**VIT, "mlp_ratio": 4, "num_classes": 0, "init_values": 1.0}
CLIP = {"pre_norm": True, "norm_eps": 1e-5, "act": "quick_gelu"}
SIGLIP = {"class_token": False, "act": "gelu_tanh"}
OURS: dict[str, Any] = {
    "encoder": lambda: fastvr.ViT(**VIT, act="relu", norm_eps=1e-5, norm_first=False),
    "transformers-vit": lambda: fastvr.ViT(**VIT, norm_eps=1e-12),
    "transformers-vit-backbone": lambda: fastvr.ViT(**{**VIT, "num_classes": 0}, norm_eps=1e-12),
    # its classifier reads the class token alone
    "transformers-deit": lambda: fastvr.ViT(**VIT, norm_eps=1e-12, reg_tokens=1),
    "transformers-dinov2": lambda: fastvr.ViT(**DINOV2),
    "transformers-dinov2-registers": lambda: fastvr.ViT(**DINOV2, reg_tokens=4, no_embed_class=True),
    "transformers-clip": lambda: fastvr.ViT(**{**VIT, **CLIP, "num_classes": 0}),
    "transformers-clip-projection": lambda: fastvr.ViT(**VIT, **CLIP),
    # two thirds of mlp_ratio for each half, as a multiple of 8
    "transformers-dinov2-giant": lambda: fastvr.ViT(**{**DINOV2, "act": "swiglu", "mlp_ratio": 5.5}),
    "transformers-siglip": lambda: fastvr.ViT(**{**VIT, **SIGLIP, "num_classes": 0, "global_pool": "map"}),
    "transformers-siglip-classifier": lambda: fastvr.ViT(**VIT, **SIGLIP, global_pool="avg", fc_norm=False),
    "transformers-resnet": lambda: ResNet(Bottleneck, (1, 1, 1, 1), num_classes=5, width=8),
    "transformers-resnet-basic": lambda: ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, width=8),
}
UNUSED = {
    "transformers-vit-backbone": ("pooler.dense.weight", "pooler.dense.bias"),
    "transformers-dinov2": ("embeddings.mask_token",),
    "transformers-dinov2-registers": ("embeddings.mask_token",),
    "transformers-dinov2-giant": ("embeddings.mask_token",),
}


def same_function(model: nn.Module, peer: nn.Module) -> None:
    peer = Output(peer)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), fastvr.use_backend("reference"):
        assert_parity(model(x), peer(x), truth_model(peer)(x.double()))


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("kind", OURS)
def test_every_layout_gives_its_own_librarys_numbers(kind, where, make_peer, tmp_path) -> None:
    peer, model = make_peer(kind), OURS[kind]().eval()
    source: Any = dict(peer.state_dict())
    if where == "disk" and kind == "encoder":
        source = tmp_path / "encoder.pt"
        torch.save(peer.state_dict(), source)
    elif where == "disk":
        # transformers has other names in memory than on disk
        peer.save_pretrained(tmp_path)
        source = tmp_path
    report = fastvr.load_checkpoint(model, source)
    layout = "encoder" if kind == "encoder" else "transformers"
    assert report[:3] == (layout, (), ())
    assert sorted(report.unused) == sorted(UNUSED.get(kind, ()))
    same_function(model, peer)


def test_a_plain_vit_whose_patch_embedding_is_the_convolution_itself(make_peer) -> None:
    peer = make_peer("encoder")
    state = {k.replace("patch_embed.proj.", "patch_embed."): v for k, v in peer.state_dict().items()}
    assert "patch_embed.weight" in state
    same_function(fastvr.load_model(state, num_heads=2), peer)
    with pytest.raises(fastvr.CheckpointError, match="twice"):
        fastvr.load_model({**state, "patch_embed.proj.weight": state["patch_embed.weight"]})


def test_the_tower_of_a_whole_clip(tmp_path) -> None:
    """Its text tower is named as of no use; its configuration lies one level deeper."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    towers = {
        "vision_config": {**sizes, "image_size": 32, "patch_size": 8, "hidden_act": "gelu"},
        "text_config": {**sizes, "vocab_size": 9},
    }
    torch.manual_seed(3)
    peer = transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=5)).eval()
    peer.save_pretrained(tmp_path)
    model = fastvr.load_model(tmp_path)
    assert model.blocks[0].attn.num_heads == 2
    assert type(model.blocks[0].mlp.act) is nn.GELU
    unused = fastvr.load_checkpoint(model, tmp_path).unused
    assert {key.partition(".")[0] for key in unused} == {"text_model", "text_projection", "logit_scale"}
    assert verify(tmp_path, batch=2).ours.passed


def test_a_model_of_another_function_is_refused(make_peer, tmp_path) -> None:
    state = make_peer("encoder").state_dict()
    model = fastvr.ViT(**VIT)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(fastvr.CheckpointError) as raised:
        fastvr.load_checkpoint(model, state)
    raised.match("a plain nn.TransformerEncoder's layout of a ViT")
    for name, theirs, ours in (("act", "'relu'", "'gelu'"), ("norm_eps", "1e-05", "1e-06")):
        raised.match(f"{name}: the checkpoint's is {theirs}, the model's {ours}")
    raised.match("norm_first: the checkpoint's is False")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    fastvr.load_checkpoint(model, state, strict=False)

    peer = make_peer("transformers-vit")
    peer.config.hidden_act = "gelu_pytorch_tanh"
    peer.save_pretrained(tmp_path)
    with pytest.raises(fastvr.CheckpointError, match="act: the checkpoint's is 'gelu_tanh'"):
        fastvr.load_checkpoint(OURS["transformers-vit"](), tmp_path)
    for name, value in (("hidden_act", "silu"), ("model_type", "vit_mae")):
        config = {"model_type": "vit", name: value}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(fastvr.CheckpointError, match=rf"config.json: {name} "):
            fastvr.load_checkpoint(OURS["transformers-vit"](), tmp_path)


def test_query_key_and_value_belong_together(make_peer) -> None:
    state = make_peer("transformers-vit").state_dict()
    inside = "vit.layers.1.attention."
    model = OURS["transformers-vit"]()
    lacking = {key: t for key, t in state.items() if key != f"{inside}k_proj.weight"}
    with pytest.raises(fastvr.CheckpointError, match=rf"{inside}q_proj.weight is there without its key"):
        fastvr.load_checkpoint(model, lacking)
    wrong = {**state, f"{inside}v_proj.bias": torch.ones(31)}
    with pytest.raises(fastvr.CheckpointError, match=rf"cannot be joined: .*{inside}v_proj.bias \[31\]"):
        fastvr.load_checkpoint(model, wrong)
    twice = {**state, "vit.encoder.layer.1.attention.attention.query.weight": torch.ones(32, 32)}
    with pytest.raises(fastvr.CheckpointError, match="holds the same weights twice"):
        fastvr.load_checkpoint(model, twice)
    narrow = {key: t[:16] if "_proj.weight" in key and inside in key else t for key, t in state.items()}
    with pytest.raises(fastvr.CheckpointError) as raised:
        fastvr.load_checkpoint(model, narrow)
    raised.match(rf"shape of {inside}q_proj.weight, {inside}k_proj.weight, {inside}v_proj.weight: \[48, 32\]")


def shard(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    names = list(state)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: state[key].contiguous() for key in keys}, folder / file)
    index = folder / "model.safetensors.index.json"
    weight_map = {key: file for file, keys in halves.items() for key in keys}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("given", ["folder", "index"])
def test_sharded_files(given, make_peer, tmp_path) -> None:
    peer, model = make_peer("transformers-vit"), OURS["transformers-vit"]().eval()
    index = shard(tmp_path, peer.state_dict())
    fastvr.load_checkpoint(model, index if given == "index" else tmp_path)
    same_function(model, peer)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod."])
def test_sharded_files_of_a_wrapped_model(prefix, make_peer, tmp_path) -> None:
    """The index has the prefix as well."""
    peer, model = make_peer("transformers-vit"), OURS["transformers-vit"]().eval()
    fastvr.load_checkpoint(model, shard(tmp_path, {f"{prefix}{k}": t for k, t in peer.state_dict().items()}))
    same_function(model, peer)


BAD_INDICES: dict[str, Any] = {
    "no map": (lambda index: {"metadata": {}}, "weight_map must name a file"),
    "outside": (
        lambda index: {"weight_map": {key: f"../{file}" for key, file in index["weight_map"].items()}},
        "names files in other folders",
    ),
    "no file": (
        lambda index: {"weight_map": {**index["weight_map"], "more": "model-3.safetensors"}},
        "lacks files: model-3.safetensors",
    ),
    "long name": (
        lambda index: {"weight_map": {**index["weight_map"], "more": "m" * 300}},
        "lacks files: mmm",
    ),
    "other file": (
        lambda index: {"weight_map": dict.fromkeys(index["weight_map"], "model-00001-of-00002.safetensors")},
        "the files lack",
    ),
    "unlisted": (
        lambda index: {"weight_map": dict(list(index["weight_map"].items())[2:])},
        "holds what it should not",
    ),
    "list": (lambda index: [], "holds a list, not an object"),
}


@pytest.mark.parametrize("case", BAD_INDICES)
def test_bad_indices_are_named(case, make_peer, tmp_path) -> None:
    change, message = BAD_INDICES[case]
    index = shard(tmp_path, make_peer("transformers-vit").state_dict())
    index.write_text(json.dumps(change(json.loads(index.read_text()))))
    with pytest.raises(fastvr.CheckpointError, match=message):
        fastvr.load_checkpoint(OURS["transformers-vit"](), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_in_half_precision_lose_nothing(dtype, make_peer, tmp_path) -> None:
    """A class token with its position in it has more digits than either."""
    peer = make_peer("transformers-dinov2-registers").to(dtype)
    peer.save_pretrained(tmp_path)
    same_function(fastvr.load_model(tmp_path), peer.float())


def test_deit3s_own_files(tmp_path) -> None:
    arguments = {**VIT, "init_values": 0.1, "no_embed_class": True}
    source, model = fastvr.ViT(**arguments), fastvr.ViT(**arguments)
    state = source.state_dict()
    theirs = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for name, t in state.items()
    }
    save_file(theirs, tmp_path / "deit3.safetensors")
    assert verify(tmp_path / "deit3.safetensors", num_heads=2, batch=1).ours.passed
    assert len(set(theirs) - set(state)) == 4
    fastvr.load_checkpoint(model, theirs)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_dinov2s_own_files(make_peer, tmp_path) -> None:
    """Its own names are timm's, but for register and mask tokens."""
    peer = make_peer("transformers-dinov2-registers")
    model = OURS["transformers-dinov2-registers"]().eval()
    fastvr.load_checkpoint(model, peer.state_dict())
    state = dict(model.state_dict())
    state["register_tokens"] = state.pop("reg_token")
    first = torch.randn(1, 1, 32)
    state["pos_embed"] = torch.cat([first, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - first
    state["mask_token"] = torch.zeros(1, 32)
    again = OURS["transformers-dinov2-registers"]().eval()
    assert fastvr.load_checkpoint(again, state).unused == ("mask_token",)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))
    save_file(state, tmp_path / "dinov2.safetensors")
    assert verify(tmp_path / "dinov2.safetensors", num_heads=2, batch=1).ours.passed
