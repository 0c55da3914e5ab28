"""Models built from checkpoints alone, and written again in other layouts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from outputs import Output
from safetensors.torch import load_file, save_file
from tiny import TINY_VIT
from torch import nn

import fastvr
from fastvr.models.preprocessing import Preprocessing
from fastvr.models.vit_distilled import DistilledViT
from fastvr.testing import assert_parity, truth_model
from fastvr.verify import verify

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "encoder": {"num_heads": 2},
    "timm-vit": {"num_heads": 2, "no_embed_class": False},
    "timm-resnet": {},
    "torchvision-vit": {"num_heads": 2},
    "torchvision-resnet": {},
    "transformers-vit": {},
    "transformers-vit-backbone": {},
    "transformers-deit": {},
    "transformers-deit-teacher": {},
    "transformers-dinov2": {},
    "transformers-dinov2-registers": {},
    "timm-qk-norm": {"num_heads": 2, "no_embed_class": False},
    "timm-giant": {"num_heads": 2, "no_embed_class": False},
    "transformers-dinov2-giant": {},
    "transformers-siglip": {},
    "transformers-siglip-classifier": {},
    "transformers-clip": {},
    "transformers-clip-projection": {},
    "transformers-clip-classifier": {},
    "transformers-resnet": {},
    "transformers-resnet-basic": {},
}


def write(peer: nn.Module, kind: str, folder: Path) -> Path:
    if kind.startswith("transformers-"):
        peer.save_pretrained(folder)
        return folder
    path = folder / f"{kind}.safetensors"
    save_file({name: t.contiguous() for name, t in peer.state_dict().items()}, path)
    return path


def same_function(model: nn.Module, peer: nn.Module) -> None:
    peer = Output(peer)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), fastvr.use_backend("reference"):
        assert_parity(model(x), peer(x), truth_model(peer)(x.double()))


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_says_what_it_is_of(kind, make_peer, tmp_path) -> None:
    peer = make_peer(kind)
    model = fastvr.load_model(write(peer, kind, tmp_path), **CHECKPOINTS[kind])
    assert not model.training
    assert isinstance(model, DistilledViT) == (kind == "transformers-deit-teacher")
    same_function(model, peer)


# which layouts can hold which kinds; the others are refused
EXPORTS: dict[str, dict[str, dict[str, Any]]] = {
    "timm": {
        "timm-vit": {},
        "timm-qk-norm": {},
        "timm-resnet": {},
        "transformers-dinov2-giant": {},
        "torchvision-vit": {},
        "transformers-vit": {"norm_eps": 1e-6},
        "transformers-deit-teacher": {"norm_eps": 1e-6},
        "transformers-dinov2-registers": {},
        "transformers-clip-projection": {},
        "transformers-clip-classifier": {},
        "transformers-siglip": {},
    },
    "torchvision": {"torchvision-vit": {}, "timm-resnet": {}, "transformers-vit": {"norm_eps": 1e-6}},
    "transformers": {
        "torchvision-vit": {},
        "torchvision-resnet": {},
        "transformers-vit": {},
        "transformers-vit-backbone": {},
        "transformers-deit": {},
        "transformers-deit-teacher": {},
        "transformers-dinov2": {},
        "transformers-dinov2-registers": {},
        "transformers-dinov2-giant": {},
        "transformers-siglip": {},
        "transformers-clip": {},
        "transformers-clip-projection": {},
        "transformers-resnet-basic": {},
    },
}


@pytest.mark.parametrize(("layout", "kind"), [(to, kind) for to, kinds in EXPORTS.items() for kind in kinds])
def test_round_trips_are_exact(layout, kind, make_peer, tmp_path) -> None:
    pytest.importorskip(layout)
    peer = make_peer(kind)
    overrides = {**CHECKPOINTS[kind], **EXPORTS[layout][kind]}
    model = fastvr.load_model(write(peer, kind, tmp_path), **overrides)
    model.preprocessing = Preprocessing(32, 36, (0.5, 0.4, 0.3), (0.2, 0.2, 0.3), "bicubic")
    written = fastvr.save_model(model, tmp_path / "out", layout)
    # of a ViT without a head transformers has a pooler as well, which no weights of ours are for
    same = kind.startswith("transformers-") and kind != "transformers-vit-backbone"
    again = fastvr.load_model(written)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in again.state_dict().items())
    assert again.preprocessing == model.preprocessing
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    # and the library itself reads what was written, with no name missing or too many
    if layout == "transformers":
        _, loading = type(peer).from_pretrained(written, output_loading_info=True) if same else (None, {})
        assert not any(loading.values()), loading
    report = verify(written, batch=1)
    # names of a ResNet are the same in torchvision and timm, and called timm's
    assert report.library == ("timm" if layout == "torchvision" and "resnet" in kind else layout)
    assert report.ours.passed, report.ours.failure


def test_what_a_layout_cannot_hold_is_refused(make_peer, tmp_path) -> None:
    out = tmp_path / "out"
    encoder = fastvr.load_model(write(make_peer("encoder"), "encoder", tmp_path), num_heads=2)
    registers = fastvr.ViT(**TINY_VIT, reg_tokens=2, init_values=0.1)
    normed = fastvr.ViT(**TINY_VIT, qk_norm=True)
    narrow = fastvr.create_model("resnet18", width=16)
    deep = fastvr.create_model("resnet18d")
    scaled_eps = fastvr.ViT(**TINY_VIT, norm_eps=1e-12)
    for model, layout, message in (
        (encoder, "timm", "post-norm"),
        (encoder, "torchvision", "eps 1e-06"),
        (encoder, "transformers", "norm_first=False"),
        (registers, "torchvision", "other tokens than the class token, LayerScale"),
        (registers, "transformers", "LayerScale and a head"),
        (normed, "torchvision", "norms of queries and keys, or no last norm"),
        (normed, "transformers", "norms of queries and keys, or no last norm"),
        (narrow, "timm", "width=64; got 16"),
        (deep, "torchvision", "stem_width=32"),
        (deep, "transformers", "stem_width=32, avg_down=True"),
        (scaled_eps, "timm", "eps 1e-06, the model's have 1e-12: load it with norm_eps=1e-06"),
        (registers, "onnx", "layout must be one of timm, torchvision, transformers; got 'onnx'"),
        (nn.Linear(2, 2), "timm", "model must be a ViT or ResNet; got Linear"),
    ):
        with pytest.raises(ValueError, match=message):
            fastvr.save_model(model, out, layout)
        assert not out.exists()
    with pytest.raises(ValueError, match="path must be a folder"):
        fastvr.save_model(fastvr.ViT(**TINY_VIT), tmp_path / "w.safetensors", "transformers")


def test_a_single_file_holds_its_configuration(tmp_path) -> None:
    model = fastvr.ViT(**{**TINY_VIT, "num_heads": 4}, act="gelu_tanh", no_embed_class=True).eval()
    model.preprocessing = Preprocessing(32, 36, (0.5,) * 3, (0.5,) * 3, "bicubic")
    path = fastvr.save_model(model, tmp_path / "w.safetensors")
    again = fastvr.load_model(path)
    assert again.blocks[0].attn.num_heads == 4
    assert again.preprocessing == model.preprocessing
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        torch.testing.assert_close(again(images), model((images / 255 - 0.5) / 0.5))
    # the weights alone, for everybody else
    fastvr.save_model(model, tmp_path / "w.pt")
    assert torch.load(tmp_path / "w.pt", weights_only=True).keys() == model.state_dict().keys()
    timm.models.vision_transformer.VisionTransformer(
        **{**TINY_VIT, "num_heads": 4}, no_embed_class=True
    ).load_state_dict(load_file(path))


@pytest.mark.parametrize(
    "name",
    ["resnext50_32x4d", "resnet50d", "deit_tiny_distilled_patch16_224", "vit_base_patch32_clip_224"],
)
def test_timm_reads_a_written_folder(name, tmp_path) -> None:
    few = {"layers": (1, 1, 1, 1)} if "res" in name else {"depth": 1, "img_size": 32}
    model = fastvr.create_model(name, num_classes=5, **few).eval()
    fastvr.save_model(model, tmp_path)
    peer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    if "res" not in name:
        assert peer.num_classes == 5
        same_function(model, peer)
    else:
        assert {k: t.shape for k, t in peer.state_dict().items()} == {
            k: t.shape for k, t in model.state_dict().items()
        }
    same_function(fastvr.load_model(tmp_path), peer)


def test_clips_weights_alone(tmp_path, caplog) -> None:
    """They say of what kind they are, but not with which activation."""
    model = fastvr.create_model("vit_base_patch32_clip_224", num_classes=5, depth=1, img_size=64).eval()
    nn.init.normal_(model.norm_pre.weight)
    save_file(dict(model.state_dict()), tmp_path / "clip.safetensors")
    with caplog.at_level(logging.WARNING, "fastvr"):
        again = fastvr.load_model(tmp_path / "clip.safetensors")
    assert "does not say which activation it has; exact GELU is taken" in caplog.text
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert verify(tmp_path / "clip.safetensors", batch=1).ours.passed
    with pytest.raises(ValueError, match="save_model: "):
        fastvr.save_model(model, tmp_path / "out", "torchvision")
    nn.init.ones_(model.head.bias)
    with pytest.raises(ValueError, match="transformers has no CLIP tower with a bias in its head"):
        fastvr.save_model(model, tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()


def test_a_missing_last_norm_is_no_guess(tmp_path) -> None:
    model = fastvr.ViT(**TINY_VIT, final_norm=False).eval()
    x = torch.randn(2, 3, 32, 32)
    again = fastvr.load_model(fastvr.save_model(model, tmp_path / "radio"))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert verify(tmp_path / "radio", batch=1).ours.passed
    save_file(dict(model.state_dict()), tmp_path / "alone.safetensors")
    with pytest.raises(fastvr.CheckpointError, match=r"missing: norm\.weight, norm\.bias"):
        fastvr.load_model(tmp_path / "alone.safetensors", num_heads=2)
    fastvr.load_model(tmp_path / "alone.safetensors", num_heads=2, final_norm=False)
    for layout in ("torchvision", "transformers"):
        with pytest.raises(ValueError, match="no last norm"):
            fastvr.save_model(model, tmp_path / "out", layout)


def test_siglips_weights_alone(tmp_path, caplog) -> None:
    model = fastvr.ViT(**TINY_VIT, class_token=False, global_pool="map", act="gelu_tanh").eval()
    save_file(dict(model.state_dict()), tmp_path / "siglip.safetensors")
    with caplog.at_level(logging.WARNING, "fastvr"):
        fastvr.load_model(tmp_path / "siglip.safetensors", num_heads=2)
    assert "does not say which activation it has; exact GELU is taken" in caplog.text
    caplog.clear()
    again = fastvr.load_model(tmp_path / "siglip.safetensors", num_heads=2, act="gelu_tanh")
    assert not caplog.text
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_timms_configuration_decides(tmp_path) -> None:
    model = fastvr.ViT(
        **{**TINY_VIT, "patch_size": 16}, act="gelu_tanh", class_token=False, global_pool="avg", fc_norm=False
    )
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    config: dict[str, Any] = {
        "architecture": "vit_so400m_patch16_siglip_gap_256",
        "num_classes": 5,
        "global_pool": "avg",
        "model_args": {
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "img_size": 32,
            "proj_drop_rate": 0.1,
            "pos_embed": "learn",
        },
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "crop_pct": 0.9,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = fastvr.load_model(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), model.eval()(x))
    assert again.preprocessing == Preprocessing(32, 35, (0.5,) * 3, (0.5,) * 3, "bicubic")
    for change, message in (
        ({"architecture": "eva02_base"}, "architecture 'eva02_base' is none of list_models"),
        ({"model_args": {"scale_attn_norm": True}}, "does not have: scale_attn_norm"),
        ({"model_args": {"act_layer": "silu"}}, "act_layer must be one of gelu, "),
        ({"pretrained_cfg": {**config["pretrained_cfg"], "std": [0, 1, 1]}}, "std must be positive"),
        ({"fastvr": {"num_heads": "two"}}, "num_heads='two'"),
        ({"fastvr": {"img_size": [32]}}, r"img_size=\[32\]"),
        ({"architecture": ["vit"]}, "unhashable"),
        ({"model_args": {"num_heads": 0}}, "num_heads=0"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(fastvr.CheckpointError, match=message):
            fastvr.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(fastvr.CheckpointError, match=r"config\.json: is no JSON"):
        fastvr.load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_args": {"act_layer": "silu"}}, "fastvr's ResNet does not have: act_layer"),
        ({"model_args": {"output_stride": 16}}, "fastvr's ResNet does not have: output_stride"),
        ({"global_pool": "avgmax"}, "global_pool must be 'avg' or ''; got 'avgmax'"),
        ({"model_args": {"global_pool": "max"}}, "global_pool must be 'avg' or ''; got 'max'"),
    ],
    ids=str,
)
def test_a_resnets_configuration_is_not_ignored(change, message, make_peer, tmp_path) -> None:
    save_file(make_peer("timm-resnet").state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "resnet18", "global_pool": "avg", "model_args": {"layers": [1, 1, 1, 1]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    same_function(fastvr.load_model(tmp_path), make_peer("timm-resnet"))
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(fastvr.CheckpointError, match=message):
        fastvr.load_model(tmp_path)


def test_another_number_of_classes(make_peer, tmp_path, caplog) -> None:
    for kind in ("timm-vit", "torchvision-resnet", "transformers-deit-teacher"):
        peer = make_peer(kind)
        path = write(peer, kind, tmp_path)
        with caplog.at_level(logging.WARNING, "fastvr"):
            model = fastvr.load_model(path, num_classes=9, **CHECKPOINTS[kind])
        assert "a new head for 9 classes, untrained (it has 5)" in caplog.text
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 9)
        body = fastvr.load_model(path, **CHECKPOINTS[kind])
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(model.forward_features(x), body.forward_features(x))
        assert fastvr.load_model(path, num_classes=0, **CHECKPOINTS[kind]).num_classes == 0
        caplog.clear()


@pytest.mark.parametrize(
    "variant", [{}, {"no_embed_class": True, "reg_tokens": 4}], ids=["plain", "registers"]
)
def test_another_image_size(variant, tmp_path) -> None:
    theirs = timm.models.vision_transformer.VisionTransformer(**TINY_VIT, **variant).eval()
    nn.init.normal_(theirs.pos_embed)
    save_file(dict(theirs.state_dict()), tmp_path / "w.safetensors")
    overrides = {"num_heads": 2, "no_embed_class": variant.get("no_embed_class", False)}
    model = fastvr.load_model(tmp_path / "w.safetensors", img_size=(48, 24), **overrides)
    theirs.set_input_size(img_size=(48, 24))
    x = torch.randn(2, 3, 48, 24)
    with torch.no_grad(), fastvr.use_backend("reference"):
        assert_parity(model(x), theirs(x), truth_model(theirs)(x.double()))
    assert model.img_size == (48, 24)


def test_what_a_checkpoint_does_not_say(make_peer, tmp_path, caplog) -> None:
    state = make_peer("timm-vit").state_dict()
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(fastvr.CheckpointError, match="how many heads share its width of 32: give num_heads="):
        fastvr.load_model(tmp_path / "w.safetensors")
    with pytest.raises(TypeError, match="'image_size'; it is called img_size here"):
        fastvr.load_model(tmp_path / "w.safetensors", num_heads=2, image_size=64)
    resnet = write(make_peer("timm-resnet"), "timm-resnet", tmp_path)
    with pytest.raises(ValueError, match="img_size is for a ViT"):
        fastvr.load_model(resnet, img_size=64)
    for lacking in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        save_file({k: t for k, t in state.items() if k != lacking}, tmp_path / "w.safetensors")
        with pytest.raises(fastvr.CheckpointError, match=f"lacks weights that tell its shape: '{lacking}'"):
            fastvr.load_model(tmp_path / "w.safetensors", num_heads=2)
    save_file({**state, "pos_embed": torch.ones(1, 13, 32)}, tmp_path / "w.safetensors")
    with pytest.raises(fastvr.CheckpointError, match="has 13 positions, which are not those of images of"):
        fastvr.load_model(tmp_path / "w.safetensors", num_heads=2)
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(fastvr.CheckpointError, match="no layout of a ViT or ResNet that is known"):
        fastvr.load_model(tmp_path / "w.safetensors")
    far = {key.replace("blocks.1.", "blocks.1000000."): t for key, t in state.items()}
    with pytest.raises(fastvr.CheckpointError, match="has 2 blocks, with numbers up to 1000000"):
        fastvr.load_model(far, num_heads=2)
    with pytest.raises(fastvr.CheckpointError, match=r"unknown: layer1\.7\."):
        fastvr.load_model(
            {
                key.replace("layer1.0.", "layer1.7."): t
                for key, t in make_peer("timm-resnet").state_dict().items()
            }
            | {"layer1.0.conv1.weight": torch.ones(64, 64, 3, 3)}
        )
    wide = fastvr.ViT(**{**TINY_VIT, "embed_dim": 128})
    save_file(dict(wide.state_dict()), tmp_path / "w.safetensors")
    with caplog.at_level(logging.WARNING, "fastvr"):
        fastvr.load_model(tmp_path / "w.safetensors")
    assert "does not say how many heads it has; 2 of width 64 are taken" in caplog.text


def test_the_hub_is_asked_only_where_somebody_asks(monkeypatch, make_peer, tmp_path) -> None:
    import huggingface_hub

    peer = make_peer("transformers-vit")
    folder = write(peer, "transformers-vit", tmp_path)
    asked: list[str] = []

    def fetch(repository: str, allow_patterns: list[str], revision: str | None) -> str:
        asked.append(f"{repository} {revision}" if revision else repository)
        if "nowhere" in repository:
            raise ConnectionError("no route to the hub")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    fastvr.create_model("vit_tiny_patch16_224.augreg_in21k", depth=1)
    assert not asked
    same_function(fastvr.create_model("hf-hub:somebody/vit"), peer)
    fastvr.create_model("resnet50", pretrained=True, num_classes=3)
    fastvr.create_model("resnet50.tv_in1k", pretrained=True)
    fastvr.create_model("hf-hub:somebody/vit@v1.0")
    assert asked == ["somebody/vit", "timm/resnet50.a1_in1k", "timm/resnet50.tv_in1k", "somebody/vit v1.0"]
    for wrong in ("hf-hub:", "hf-hub:a/b/c", "hf-hub:a/b@"):
        with pytest.raises(ValueError, match="name must be hf-hub:OWNER/NAME"):
            fastvr.create_model(wrong)
    with pytest.raises(ValueError, match="name must be a string; got NoneType"):
        fastvr.create_model(None)
    with pytest.raises(fastvr.CheckpointError, match="hf download no/nowhere --local-dir DIR") as raised:
        fastvr.create_model("hf-hub:no/nowhere")
    raised.match("no route to the hub")
    with pytest.raises(ValueError, match="no weights of it are published"):
        fastvr.create_model("resnet200", pretrained=True)
    (folder / "model.safetensors").unlink()
    with pytest.raises(fastvr.CheckpointError, match=r"neither model.safetensors nor pytorch_model.bin"):
        fastvr.create_model("hf-hub:somebody/vit")
