"""Models by timm's names: the same parameters, the same numbers."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import fastvr
from fastvr.models.positions import resample
from fastvr.models.registry import MODELS, repository
from fastvr.testing import assert_parity, truth_model
from fastvr.weights.describe import activation

SHORT = {"vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"}
ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "swiglu"}
SMALL_VIT: dict[str, Any] = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 7}
# of every kind one; "patch14" needs another image size
KINDS: dict[str, dict[str, Any]] = {
    "vit_base_patch16_224": SMALL_VIT,
    "vit_huge_patch16_gap_448": SMALL_VIT,
    "vit_so400m_patch16_siglip_gap_256": SMALL_VIT,
    "vit_so400m_patch16_siglip_256": SMALL_VIT,
    "vit_base_patch16_clip_224": SMALL_VIT,
    "vit_base_patch16_clip_quickgelu_224": SMALL_VIT,
    "deit_base_distilled_patch16_224": SMALL_VIT,
    "deit3_base_patch16_224": SMALL_VIT,
    "vit_base_patch14_dinov2": {**SMALL_VIT, "img_size": 42},
    "vit_base_patch14_reg4_dinov2": {**SMALL_VIT, "img_size": 42},
    "vit_giant_patch14_dinov2": {**SMALL_VIT, "img_size": 42, "mlp_ratio": 5.5},
    "resnet18d": {"layers": (1, 1, 1, 1)},
    "resnet50": {"layers": (1, 1, 1, 1)},
    "resnet50c": {"layers": (1, 1, 1, 1)},
    "resnet50d": {"layers": (1, 1, 1, 1)},
    "resnext50_32x4d": {"layers": (1, 2, 1, 1)},
    "wide_resnet50_2": {"layers": (1, 1, 1, 1)},
}


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", ["vit_*", "[ef]*", "deit*", "*resne[tx]*"])
def test_every_name_has_timms_parameters(family) -> None:
    names = [name for name in fastvr.list_models(family) if name not in SHORT]
    assert len(names) > 4
    for name in names:
        # what repeats is left out, so that this stays quick
        few = {"layers": (1, 2, 1, 1)} if "res" in name else {"depth": 1}
        with torch.device("meta"):
            ours, theirs = fastvr.create_model(name, **few), timm.create_model(name, **few)
        assert shapes(ours) == shapes(theirs), name
        assert ours.num_classes == theirs.num_classes, name
        entry, peer = MODELS[name], timm.get_pretrained_cfg(name)
        # what lies elsewhere than on the hub has none
        published = None if entry.tag is None else repository(name, entry.tag)
        assert published == peer.hf_hub_id, name
        if "res" not in name:
            # of the whole depth blocks that cost nothing
            with torch.device("meta"):
                whole = timm.create_model(name, block_fn=lambda **_: nn.Identity())
            assert entry.arguments["depth"] == len(whole.blocks), name
            assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads, name
            assert (ours.global_pool, ours.no_embed_class) == (theirs.global_pool, theirs.no_embed_class), (
                name
            )
            assert ours.img_size == tuple(peer.input_size[1:]), name
            assert ours.blocks[0].norm1.eps == theirs.blocks[0].norm1.eps, name
            theirs_act = ACTIVATIONS[type(theirs.blocks[0].mlp.act).__name__]
            assert activation(ours.blocks[0].mlp) == theirs_act, name


def test_depths_are_timms() -> None:
    for name in ("vit_gigantic_patch14_224", "vit_so400m_patch14_siglip_gap_224", "resnet200d"):
        with torch.device("meta"):
            assert shapes(fastvr.create_model(name)) == shapes(timm.create_model(name)), name
    for name in ("resnext101_32x8d", "resnext101_64x4d", "wide_resnet101_2"):
        with torch.device("meta"):
            assert shapes(fastvr.create_model(name)) == shapes(getattr(torchvision.models, name)()), name


@pytest.mark.parametrize(
    ("name", "training"),
    [(name, False) for name in KINDS] + [("deit3_base_patch16_224", True), ("resnet50d", True)],
)
def test_every_kind_gives_timms_numbers(name, training, randomise) -> None:
    torch.manual_seed(0)
    theirs = randomise(timm.create_model(name, **KINDS[name]))
    ours = fastvr.create_model(name, **KINDS[name])
    ours.load_state_dict(theirs.state_dict())
    size = KINDS[name].get("img_size", 64)
    # of two samples the last stage's batch statistics would be of a handful of numbers
    x = torch.randn(6 if training else 2, 3, size, size)
    if "res" in name:
        # ours lies so; PyTorch's batch statistics on a CPU are less exact in this layout
        theirs = theirs.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    truth = truth_model(theirs).train(training)
    with torch.no_grad(), fastvr.use_backend("reference"):
        assert_parity(ours.train(training)(x), theirs.train(training)(x), truth(x.double()))
        if not training:
            features = theirs.forward_features(x)
            exact = truth.forward_features(x.double())
            assert_parity(ours.forward_features(x), features, exact, name="features")
            assert_parity(
                ours.forward_head(features, pre_logits=True),
                theirs.forward_head(features, pre_logits=True),
                truth.forward_head(features.double(), pre_logits=True),
                name="pre_logits",
            )


@pytest.mark.parametrize("name", ["resnet50d", "resnext50_32x4d", "deit_base_distilled_patch16_224"])
def test_kernels_give_the_same_numbers(name, randomise, device) -> None:
    small = {"width": 16} if "res" in name else {}
    if "next" in name:
        small |= {"layers": (1, 1, 1, 1), "groups": 4, "width_per_group": 16}
    model = randomise(fastvr.create_model(name, **{**KINDS[name], **small})).eval().to(device)
    x = torch.randn(2, 3, 32, 32, device=device)
    with torch.no_grad():
        with fastvr.use_backend("reference"):
            eager, exact = model(x), truth_model(model)(x.double())
        with fastvr.use_backend("triton"):
            assert_parity(model(x), eager, exact)
        prepared = fastvr.prepare(model, x)
        assert_parity(prepared(x), eager, exact)


def test_a_distilled_model_gives_both_logits_in_training() -> None:
    name = "deit_tiny_distilled_patch16_224"
    arguments = KINDS["deit_base_distilled_patch16_224"]
    torch.manual_seed(0)
    theirs = timm.create_model(name, **arguments)
    ours = fastvr.create_model(name, **arguments)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, fastvr.DistilledViT)
    x, truth = torch.randn(2, 3, 32, 32), truth_model(theirs)
    for model in (ours, theirs, truth):
        model.train().set_distilled_training()
    with torch.no_grad():
        assert_parity(ours(x), theirs(x), truth(x.double()))
    ours.reset_classifier(3)
    first, second = ours(x)
    assert first.shape == second.shape == (2, 3)
    assert ours.get_classifier() == (ours.head, ours.head_dist)
    assert ours.no_weight_decay() >= {"pos_embed", "cls_token", "dist_token"}
    with pytest.raises(ValueError, match="global_pool must be 'token'; got 'avg'"):
        fastvr.create_model(name, **{**arguments, "global_pool": "avg"})


@pytest.mark.parametrize("kind", ["vit_base_patch16_224", "vit_base_patch14_reg4_dinov2"])
def test_images_of_any_size(kind, randomise) -> None:
    arguments = {**KINDS[kind], "dynamic_img_size": True}
    theirs = randomise(timm.create_model(kind, **arguments)).eval()
    ours = fastvr.create_model(kind, **arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    truth, patch = truth_model(theirs), ours.patch_size[0]
    for rows, columns in ((2, 2), (3, 5), (1, 2), (3, 3)):
        x = torch.randn(2, 3, rows * patch, columns * patch)
        with torch.no_grad():
            assert_parity(ours(x), theirs(x), truth(x.double()))
            (map_,) = ours.get_intermediate_layers(x, reshape=True)
            assert map_.shape == (2, 64, rows, columns)
    with pytest.raises(ValueError, match=rf"x must be a multiple of patch_size \({patch}, {patch}\)"):
        ours(torch.randn(2, 3, patch, patch + 1))
    prepared = fastvr.prepare(ours, torch.randn(1, 3, 2 * patch, 2 * patch))
    x = torch.randn(1, 3, patch, 3 * patch)
    with torch.no_grad():
        torch.testing.assert_close(prepared(x), ours(x))


def test_positions_are_resampled_as_timm_does() -> None:
    from timm.layers import resample_abs_pos_embed

    for prefix, new in ((0, (3, 3)), (1, (6, 2)), (5, (4, 7))):
        given = torch.randn(1, prefix + 16, 8)
        theirs = resample_abs_pos_embed(given, list(new), [4, 4], num_prefix_tokens=prefix)
        assert torch.equal(resample(given, (4, 4), new, prefix), theirs)
        assert resample(given.bfloat16(), (4, 4), new, prefix).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "vit_tiny",
            {"image_size": 32},
            "ViT: there is no argument 'image_size'; it is called img_size here",
        ),
        ("vit_tiny", {"hidden_dim": 32}, "called embed_dim here"),
        ("vit_tiny", {"num_hidden_layers": 2}, "called depth here"),
        ("vit_tiny", {"mlp_dim": 64}, r"called mlp_ratio \(over embed_dim\) here"),
        ("vit_tiny", {"representation_size": 64}, "'representation_size': nothing lies between"),
        ("resnet50", {"base_width": 32}, "ResNet: .* called width_per_group here"),
        ("resnet50", {"output_stride": 8}, "'output_stride': the stride is always 32"),
        ("resnet50", {"weights": "DEFAULT"}, r"'weights': weights come with load_model\(path\)"),
    ],
)
def test_other_libraries_arguments_are_named(name, arguments, message) -> None:
    with pytest.raises(TypeError, match=message):
        fastvr.create_model(name, **arguments)


@pytest.mark.parametrize(
    ("name", "argument", "values"),
    [
        ("vit_tiny", "img_size", ["224", 224.0, None, 0, (1, 2, 3), (224, "224")]),
        ("vit_tiny", "patch_size", [None, 16.0, -1]),
        ("vit_tiny", "num_heads", ["3", None, 0, 3.0]),
        ("vit_tiny", "embed_dim", [192.0, "192", 191]),
        ("vit_tiny", "mlp_ratio", ["4", 0, -1, float("nan"), 1e-9]),
        ("vit_tiny", "drop_path_rate", ["0.1", 2, -0.1, float("nan")]),
        ("vit_tiny", "drop_rate", [1.5, None]),
        ("vit_tiny", "init_values", ["1e-5", [1e-5]]),
        ("vit_tiny", "norm_eps", ["1e-6", 0]),
        ("vit_tiny", "num_classes", ["10", 10.0, -1]),
        ("resnet18", "num_classes", ["10", 10.0, -1]),
        ("resnet18", "width", ["64", 0]),
        ("resnet18", "layers", [3, (2, 2, 2), "aaaa", (2, 2, 2, 0)]),
        ("resnet18", "block", ["BasicBlock", None, torch.nn.ReLU]),
        ("resnet18", "stem_width", ["32", 0]),
    ],
)
def test_values_of_no_use_are_named(name, argument, values) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f": {argument} must "):
            fastvr.create_model(name, **{argument: value})


def test_loading_and_presets_name_other_libraries_arguments_too() -> None:
    state = fastvr.ViT(**SMALL_VIT).state_dict()
    with pytest.raises(TypeError, match=r"ViT: .* 'image_size'; it is called img_size here"):
        fastvr.load_model(state, num_heads=2, image_size=32)
    with pytest.raises(TypeError, match=r"ResNet50: .* 'num_labels'; it is called num_classes here"):
        fastvr.ResNet50(num_labels=2)


@pytest.mark.parametrize("kind", [fastvr.ViT, fastvr.ResNet], ids=["vit", "resnet"])
def test_no_argument_of_ours_is_refused_as_another_librarys(kind) -> None:
    ours = set(inspect.signature(kind).parameters)
    assert not ours & {*kind.other_names, *kind.absent}
    # what a name is translated to is there, but for what stands behind it in brackets
    assert {name.partition(" ")[0] for name in kind.other_names.values()} <= ours


def test_list_and_find() -> None:
    assert fastvr.list_models("deit3_small*") == ["deit3_small_patch16_224", "deit3_small_patch16_384"]
    assert set(fastvr.list_models()) > SHORT
    assert fastvr.list_models("nothing*") == []
    with pytest.raises(ValueError, match=r"got 'resnet49' \(did you mean 'resnet.*'\?\)"):
        fastvr.create_model("resnet49")
    with pytest.raises(ValueError, match="groups and width_per_group must be 1 and 64 with BasicBlock"):
        fastvr.create_model("resnet18", groups=2)
