"""Configurations of other weights than those beside them, and weights that claim what is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY_VIT

import fastvr


def configure(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("vit", {"num_hidden_layers": 3}, "num_hidden_layers is 3, the weights are those of 2"),
        ("vit", {"hidden_size": 64}, "hidden_size is 64, the weights are those of 32"),
        ("vit", {"intermediate_size": 128}, "intermediate_size is 128, the weights are those of 64"),
        ("vit", {"patch_size": 4}, r"patch_size is 4, the weights are those of \(8, 8\)"),
        ("vit", {"num_channels": 1}, "num_channels is 1, the weights are those of 3"),
        ("vit", {"num_attention_heads": 5}, "5 heads cannot share the weights' width of 32"),
        ("vit", {"layer_norm_eps": -1}, "safetensors: .*norm_eps must be a positive number"),
        ("vit", {"num_attention_heads": True}, "num_heads=True, which is no such argument"),
        ("clip", {"num_hidden_layers": 12}, "num_hidden_layers is 12, the weights are those of 2"),
        ("dinov2-registers", {"num_register_tokens": 2}, "num_register_tokens is 2, .* those of 4"),
        ("resnet", {"depths": [1, 2, 1, 1]}, r"depths is \[1, 2, 1, 1\], .* those of \(1, 1, 1, 1\)"),
        ("resnet", {"embedding_size": 64}, "embedding_size is 64, the weights are those of 8"),
    ],
    ids=str,
)
def test_another_models_configuration_is_named(kind, change, message, make_peer, tmp_path) -> None:
    make_peer(f"transformers-{kind}").save_pretrained(tmp_path)
    fastvr.load_model(tmp_path)
    with pytest.raises(fastvr.CheckpointError, match=message):
        fastvr.load_model(configure(tmp_path, **change))


def test_what_agrees_in_another_form_is_taken(make_peer, tmp_path) -> None:
    make_peer("transformers-vit").save_pretrained(tmp_path)
    fastvr.load_model(configure(tmp_path, patch_size=[8, 8], image_size=[32, 32], num_channels=None))


@pytest.mark.parametrize("layout", ["timm", "transformers"])
def test_a_last_block_that_is_missing_is_missed(layout, tmp_path) -> None:
    """Nothing but the configuration tells."""
    norm_eps = 1e-6 if layout == "timm" else 1e-12
    folder = fastvr.save_model(fastvr.ViT(**TINY_VIT, norm_eps=norm_eps), tmp_path / "out", layout)
    state = load_file(folder / "model.safetensors")
    last = "blocks.1." if layout == "timm" else ".layer.1."
    save_file({name: t for name, t in state.items() if last not in name}, folder / "model.safetensors")
    with pytest.raises(fastvr.CheckpointError, match=r"another model, or it lacks blocks:\n  .* 2, .* of 1"):
        fastvr.load_model(folder)


def test_a_resnets_missing_block_is_missed(tmp_path) -> None:
    folder = fastvr.save_model(fastvr.ResNet18(), tmp_path / "out")
    state = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in state.items() if "layer3.1." not in name}, folder / "model.safetensors")
    with pytest.raises(fastvr.CheckpointError, match=r"layers is \[2, 2, 2, 2\], .* \(2, 2, 1, 2\)"):
        fastvr.load_model(folder)


@pytest.mark.parametrize("name", ["head.weight", "blocks.0.mlp.fc1.weight", "pos_embed", "cls_token"])
def test_memory_that_a_small_file_claims_is_not_taken(name, tmp_path) -> None:
    """Of a tensor without elements the other dimensions cost nothing to write."""
    state = fastvr.ViT(**TINY_VIT).state_dict()
    many = 10**12
    claimed = (many, 0) if state[name].dim() == 2 else (1, many, 0)
    save_file({**state, name: torch.zeros(claimed)}, tmp_path / "w.safetensors")
    with pytest.raises(fastvr.CheckpointError):
        fastvr.load_model(tmp_path / "w.safetensors", num_heads=2)


def test_more_than_a_tensor_can_have(make_peer) -> None:
    state = make_peer("timm-resnet").state_dict()
    with pytest.raises(fastvr.CheckpointError, match="overflow"):
        fastvr.load_model({**state, "bn1.weight": torch.zeros(10**11, 0)})


@pytest.mark.parametrize("kind", ["dinov2-registers", "siglip", "clip-projection", "vit"])
def test_tensors_of_any_form_are_named(kind, make_peer) -> None:
    """Also where a layout joins, splits or adds them."""
    state = make_peer(f"transformers-{kind}").state_dict()
    forms = {
        "scalar": lambda t: t.new_zeros(()),
        "none": lambda t: t.new_zeros(0),
        "more dimensions": lambda t: t.new_zeros(1, 2, 1, 2, 1),
        "integer": lambda t: t.int(),
        "sparse": lambda t: t.to_sparse(),
        "meta": lambda t: t.to("meta"),
        "packed": lambda t: torch.zeros(t.shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    }
    unused = ("mask_token", "position_ids")
    for name in state:
        if not name.endswith(unused):
            for form, change in forms.items():
                try:
                    fastvr.load_model({**state, name: change(state[name])}, num_heads=2)
                except fastvr.CheckpointError:
                    continue
                pytest.fail(f"{name} was taken as {form}")
