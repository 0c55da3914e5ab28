"""What timm's users call on a model: the names and results of timm's own, its tools, its suite's checks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from randomise import randomise
from timm.data import resolve_model_data_config
from timm.models import FeatureInfo, FeatureListNet
from timm.models._features import FeatureGetterNet, FeatureHookNet
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3, freeze, unfreeze
from torch import nn

import fastvr
from fastvr import backend
from fastvr.models.preprocessing import Preprocessing
from fastvr.testing import assert_parity, truth_model

SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 1, "num_classes": 7}
ONE_BLOCK: dict[str, Any] = {"layers": (1, 1, 1, 1), "num_classes": 7}
VITS: dict[str, dict[str, Any]] = {
    "vit_base_patch16_224": SMALL,
    "vit_base_patch16_siglip_gap_224": SMALL,
    "vit_base_patch14_reg4_dinov2": {**SMALL, "img_size": 42},
    "deit_base_distilled_patch16_224": SMALL,
}
RESNETS: dict[str, dict[str, Any]] = {
    "resnet18d": ONE_BLOCK,
    "resnet50": {**ONE_BLOCK, "layers": (1, 2, 1, 1)},
}
MODELS = VITS | RESNETS


@pytest.fixture
def pair() -> Callable[..., tuple[nn.Module, Any, torch.Tensor]]:
    """timm's model and ours of the same weights, and images for them."""

    def make(name: str, **overrides: Any) -> tuple[nn.Module, Any, torch.Tensor]:
        theirs, ours = copy.deepcopy(build(name, **overrides))
        return theirs, ours, torch.randn(2, 3, *images_of(ours))

    return make


@functools.cache
def build(name: str, **overrides: Any) -> tuple[nn.Module, Any]:
    arguments = {**MODELS[name], **overrides}
    torch.manual_seed(0)
    theirs = randomise(timm.create_model(name, **arguments)).eval()
    ours = fastvr.create_model(name, **arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    if name in RESNETS:
        # ours lies so; PyTorch's convolutions round otherwise in another layout
        theirs = theirs.to(memory_format=torch.channels_last)
    return theirs, ours


def images_of(model: Any) -> tuple[int, int]:
    return getattr(model, "img_size", None) or (64, 64)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


INTERMEDIATES: dict[str, dict[str, Any]] = {
    "all": {},
    "last": {"indices": 2, "norm": True, "output_fmt": "NLC"},
    "first and last": {"indices": [-1, 0], "return_prefix_tokens": True, "intermediates_only": True},
    "early": {"indices": (1,), "stop_early": True, "norm": True},
    "dictionary": {"indices": [0], "output_dict": True, "return_prefix_tokens": True},
    "dictionary of intermediates": {"indices": [2], "output_dict": True, "intermediates_only": True},
}
OF_RESNETS = {"output_dict", "return_prefix_tokens"}


@pytest.mark.parametrize("name", MODELS)
def test_intermediates_are_timms(name, pair) -> None:
    theirs, ours, x = pair(name)
    truth = truth_model(theirs)
    for case, options in INTERMEDIATES.items():
        if name in RESNETS:
            options = {key: value for key, value in options.items() if key not in OF_RESNETS}
            options |= {"output_fmt": "NCHW"}
        with torch.no_grad():
            actual = ours.forward_intermediates(x, **options)
            expected = theirs.forward_intermediates(x, **options)
            exact = truth.forward_intermediates(x.double(), **options)
        assert type(actual) is type(expected), case
        assert_parity(actual, expected, exact, name=case)
    if name in VITS:
        with torch.no_grad():
            options = {"n": 2, "reshape": True, "return_prefix_tokens": True}
            actual = ours.get_intermediate_layers(x, **options)
            expected = theirs.get_intermediate_layers(x, **options)
            assert_parity(actual, expected, truth.get_intermediate_layers(x.double(), **options))


@pytest.mark.parametrize("name", MODELS)
def test_a_backbone_is_timms(name, pair) -> None:
    theirs, ours, x = pair(name)
    for out_indices in (None, (0, 2), [1, -1], 1):
        if out_indices is None:
            # with the features that both give by themselves
            given = {**MODELS[name], "features_only": True}
            peer = timm.create_model(name, **given, feature_cls="getter").eval()
            backbone = fastvr.create_model(name, **given).eval()
            weights = {f"model.{key}": tensor for key, tensor in theirs.state_dict().items()}
            for model in (backbone, peer):
                model.load_state_dict({key: weights[key] for key in model.state_dict()})
            assert set(peer.default_cfg) >= {"input_size", "first_conv"} <= set(backbone.default_cfg)
        else:
            peer = FeatureGetterNet(copy.deepcopy(theirs), out_indices)
            backbone = fastvr.Backbone(copy.deepcopy(ours), out_indices)
        assert shapes(backbone) == shapes(peer)
        if isinstance(ours, fastvr.ResNet):
            # as ours lies: on a CPU PyTorch's error is another in each layout
            peer = peer.to(memory_format=torch.channels_last)
        with torch.no_grad():
            maps = backbone(x)
            assert_parity(maps, peer(x), truth_model(peer)(x.double()), name=str(out_indices))
        info, expected = backbone.feature_info, peer.feature_info
        assert info.channels() == expected.channels() == [one.shape[1] for one in maps]
        assert info.reduction() == expected.reduction()
        assert [x.shape[2] // one.shape[2] for one in maps] == info.reduction()
        # ours has torchvision's name for the ReLU
        names = [one.replace("act1", "relu") for one in expected.module_name()]
        assert info.module_name() == names
        assert all(name in dict(backbone.model.named_modules()) for name in info.module_name())
        assert len(info) == len(expected)
        assert info.get_dicts(["num_chs"]) == expected.get_dicts(["num_chs"])
        assert info[0]["index"] == info.get("index", 0) == 0
        assert all(one.is_contiguous() for one in maps) or name in RESNETS
        assert not {"num_classes", "classifier"} & set(backbone.default_cfg)
    # a model that is there already, of which the weights stay
    with torch.no_grad():
        expected = ours.forward_intermediates(x, indices=[1, 2], norm=name in VITS, intermediates_only=True)
        backbone = fastvr.Backbone(ours, (1, 2), norm=name in VITS)
        torch.testing.assert_close(backbone(x), expected, rtol=0, atol=0)
    assert not backbone.training
    assert ours.num_classes == 0


@pytest.mark.parametrize("name", MODELS)
def test_timms_wrappers_take_our_models(name, pair) -> None:
    _, ours, x = pair(name)
    with torch.no_grad():
        expected = ours.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
        getter = FeatureGetterNet(copy.deepcopy(ours), out_indices=(0, 2))
        torch.testing.assert_close(getter(x), expected, rtol=0, atol=0)
        assert getter.feature_info.channels() == [one.shape[1] for one in expected]
        if name in RESNETS:
            _, plain, _ = pair(name)
            truth, maps = truth_model(plain), FeatureListNet(plain, out_indices=(0, 2))(x)
            exact = truth.forward_intermediates(x.double(), indices=[0, 2], intermediates_only=True)
            assert_parity(expected, maps, exact)
        hooked = FeatureHookNet(copy.deepcopy(ours), out_indices=(0, 2), no_rewrite=True)
        seen = hooked(x)
        if name in VITS:
            layers = ours.forward_intermediates(x, [0, 2], output_fmt="NLC", intermediates_only=True)
            seen = [tokens[:, ours.num_prefix_tokens :] for tokens in seen]
            truth = truth_model(ours)
            exact = truth.forward_intermediates(x.double(), [0, 2], output_fmt="NLC", intermediates_only=True)
            assert_parity(seen, layers, exact)
        else:
            exact = truth_model(ours).forward_intermediates(x.double(), [0, 2], intermediates_only=True)
            assert_parity(seen, expected, exact)


@pytest.mark.parametrize("name", MODELS)
def test_pruning_leaves_what_timms_does(name, pair) -> None:
    for options in ({}, {"indices": [0]}, {"indices": (-2, 1), "prune_norm": True}, {"prune_head": False}):
        theirs, ours, x = pair(name)
        expected = theirs.prune_intermediate_layers(**options)
        generation = ours.generation
        assert ours.prune_intermediate_layers(**options) == expected, options
        assert ours.generation > generation
        assert shapes(ours) == shapes(theirs), options
        with torch.no_grad():
            assert_parity(ours(x), theirs(x), truth_model(theirs)(x.double()), name=str(options))
        for attribute in ("num_features", "head_hidden_size", "num_classes"):
            assert getattr(ours, attribute) == getattr(theirs, attribute)
        for model in (ours, theirs):
            model.reset_classifier(3, "avg" if name in RESNETS else None)
        assert shapes(ours) == shapes(theirs), options


@pytest.mark.parametrize("name", MODELS)
def test_optimisers_group_parameters_as_on_timms(name, pair) -> None:
    theirs, ours, _ = pair(name)

    def named(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in groups]

    for coarse in (False, True):
        groups = [timm.models.group_parameters(m, m.group_matcher(coarse=coarse)) for m in (ours, theirs)]
        assert groups[0] == groups[1]
    for make in (param_groups_layer_decay, param_groups_weight_decay):
        found, expected = (
            named(m, make(m, 0.05, no_weight_decay_list=m.no_weight_decay() if name in VITS else ()))
            for m in (ours, theirs)
        )
        assert found == expected
    for options in ({"layer_decay": 0.7}, {}):
        found, expected = (
            create_optimizer_v2(m, opt="adamw", lr=1e-3, weight_decay=0.05, **options) for m in (ours, theirs)
        )
        assert named(ours, found.param_groups) == named(theirs, expected.param_groups)


SIZES: list[dict[str, Any]] = [
    {"img_size": (48, 32)},
    {"patch_size": 8},
    {"img_size": 30, "patch_size": (10, 15)},
    {"img_size": (64, 16)},
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("vit_base_patch16_224", options) for options in SIZES),
        ("vit_base_patch16_siglip_gap_224", SIZES[2]),
        ("deit_base_distilled_patch16_224", SIZES[2]),
    ],
)
def test_another_input_size_is_timms(name, options, pair, monkeypatch) -> None:
    theirs, ours, _ = pair(name)
    exact = truth_model(theirs)
    ours.pos_embed.requires_grad_(False)
    generation = ours.generation
    for model in (ours, theirs):
        model.set_input_size(**options)
    monkeypatch.setattr("timm.layers.patch_embed.DTYPE_INTERMEDIATE", torch.float64)
    exact.set_input_size(**options)
    assert ours.generation > generation
    assert not ours.pos_embed.requires_grad
    assert ours.patch_embed.proj.weight.requires_grad
    assert torch.equal(ours.pos_embed, theirs.pos_embed)
    weights = [model.patch_embed.proj.weight for model in (ours, theirs, exact)]
    assert_parity(*weights, sample_dim=None)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, *ours.img_size)
    with torch.no_grad():
        assert_parity(ours(x), theirs(x), truth_model(theirs)(x.double()))
        (map_,) = ours.get_intermediate_layers(x, reshape=True)
    assert map_.shape[2:] == theirs.patch_embed.grid_size == ours.grid_size
    assert ours.default_cfg["input_size"] == (3, *ours.img_size)
    assert ours.feature_info[0]["reduction"] == max(ours.patch_size)


def test_an_input_size_that_does_not_fit_changes_nothing(pair) -> None:
    _, ours, x = pair("vit_base_patch16_224")
    with torch.no_grad():
        before = ours(x)
        for options, named in (
            ({"img_size": 7}, "img_size must be at least patch_size"),
            ({"patch_size": 64}, "img_size must be at least patch_size"),
            ({"img_size": 0}, "img_size must be one or two positive"),
            ({"patch_size": (8, 8, 8)}, "patch_size must be one or two positive"),
        ):
            with pytest.raises(ValueError, match=named):
                ours.set_input_size(**options)
        assert torch.equal(ours(x), before)
    ours.patch_embed.proj = nn.Conv2d(3, 32, 18, 16, padding=1)
    with pytest.raises(ValueError, match="patch_size must stay where proj is not"):
        ours.set_input_size(patch_size=8)
    assert (ours.patch_size, ours.grid_size) == ((16, 16), (2, 2))
    ours.patch_embed = nn.Identity()
    with pytest.raises(ValueError, match="patch_embed must be a PatchEmbed to take another size; got Ident"):
        ours.set_input_size(64)


@pytest.mark.parametrize("name", MODELS)
def test_what_timms_suite_asks_of_its_own_models(name, pair) -> None:
    _, model, x = pair(name)
    with torch.no_grad():
        logits = model(x)
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        final, maps = model.forward_intermediates(x, output_fmt="NCHW")
    assert logits.shape == (2, 7)
    assert pooled.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(final, features, rtol=0, atol=0)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    assert len(maps) == len(info) >= 3
    for one, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
        assert one.shape == (2, channels, x.shape[2] // reduction, x.shape[3] // reduction)

    config, names = model.default_cfg, model.state_dict().keys()
    classifier = config["classifier"]
    for layer in (classifier, config["first_conv"]):
        assert all(f"{one}.weight" in names for one in ([layer] if isinstance(layer, str) else layer))
    expected = timm.get_pretrained_cfg(name)
    assert classifier == expected.classifier
    assert config["first_conv"] == expected.first_conv
    assert config["fixed_input_size"] == expected.fixed_input_size
    if name in RESNETS:
        assert config["pool_size"] == expected.pool_size == (7, 7)
        assert features.shape[1:] == (model.num_features, 2, 2)

    model.train().reset_classifier(42)
    y = model(torch.cat([x, x]))
    y.mean().backward()
    assert y.shape == (4, 42)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())

    model.eval().reset_classifier(0)
    assert model.num_classes == 0
    with torch.no_grad():
        torch.testing.assert_close(model(x).shape, pooled.shape)
        model.reset_classifier(0, "")
        whole = model(x)
        built = fastvr.create_model(name, **{**MODELS[name], "num_classes": 0})
        assert built.eval()(x).shape == pooled.shape
    # a distilled model keeps its pooling, as timm's does
    assert whole.shape == (pooled if "distilled" in name else features).shape


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "resnet18d"])
def test_checkpointed_intermediates_and_their_gradients_are_the_same(name, pair) -> None:
    _, model, x = pair(name)
    found = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        maps = model.forward_intermediates(x, indices=3, intermediates_only=True)
        sum(one.square().mean() for one in maps).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((maps, gradients))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    backbone = fastvr.Backbone(model)
    backbone.set_grad_checkpointing(False)
    assert not model.grad_checkpointing


@pytest.mark.parametrize("kind", ["vit", "basic", "bottleneck"])
def test_kernels_give_whole_features(kind, tiny, images, device) -> None:
    """Also where :meth:`forward` computes the last block for the class token alone."""
    model, x = tiny(kind).to(device), images(2).to(device)
    with torch.no_grad():
        with fastvr.use_backend("reference"):
            expected = model.forward_intermediates(x)
            exact = truth_model(model).forward_intermediates(x.double())
        with fastvr.use_backend("triton"), backend.observe() as ran:
            assert_parity(model.forward_intermediates(x), expected, exact)
    assert {implementation for _, implementation in ran} == {"triton"}


@pytest.mark.parametrize(("kind", "last"), [("vit", "blocks.1"), ("basic", "layer4.0")])
def test_nothing_runs_that_nobody_reads(kind, last, tiny, images) -> None:
    model, x, ran = tiny(kind), images(2), []
    model.get_submodule(last).register_forward_hook(lambda *_: ran.append(1))
    model.forward_intermediates(x, [0], intermediates_only=True)
    model.forward_intermediates(x, [0], stop_early=True)
    assert not ran
    model.forward_intermediates(x, [0])
    # in training what comes later draws random numbers and moves running statistics
    model.train().forward_intermediates(x, [0], intermediates_only=True)
    assert len(ran) == 2


def test_uint8_images(tiny, images) -> None:
    for kind in ("vit", "bottleneck"):
        model = tiny(kind).normalize_images(0.5, 0.25)
        x = (images(2) * 60 + 128).clamp(0, 255).to(torch.uint8)
        floats = (x.float() / 255 - 0.5) / 0.25
        with torch.no_grad():
            exact = truth_model(model).forward_intermediates((x.double() / 255 - 0.5) / 0.25)
            assert_parity(model.forward_intermediates(x), model.forward_intermediates(floats), exact)


def test_how_images_are_prepared_is_what_timm_resolves(pair) -> None:
    theirs, ours, _ = pair("vit_base_patch16_224")
    theirs.pretrained_cfg = {**theirs.pretrained_cfg, "input_size": (3, 32, 32), "crop_mode": "center"}
    # nothing is known of fresh weights but their images' size
    assert set(resolve_model_data_config(ours).items()) >= {("input_size", (3, 32, 32))}
    assert not {"mean", "std", "crop_pct"} & ours.pretrained_cfg.keys()
    ours.normalize_images(0.25, 0.5)
    assert resolve_model_data_config(ours)["mean"] == (0.25,) * 3
    half = (0.5, 0.5, 0.5)
    ours.preprocessing = Preprocessing(36, 40, half, half, "bicubic")
    assert resolve_model_data_config(ours) == resolve_model_data_config(theirs)
    for resize in range(224, 449):
        share = Preprocessing(224, resize, half, half).for_timm()["crop_pct"]
        # what timm's transform resizes to
        assert int(224 / share) == resize
    # as load_model does for another size
    ours.set_input_size(64)
    assert ours.preprocessing.size == 64
    assert resolve_model_data_config(ours)["input_size"] == (3, 64, 64)
    resnet = fastvr.create_model("resnet18", in_chans=1)
    assert resnet.default_cfg["input_size"] == (1, 224, 224)
    assert resnet.get_classifier(name_only=True) == "fc"
    dynamic = fastvr.create_model("vit_base_patch16_224", **SMALL, dynamic_img_size=True)
    assert not dynamic.default_cfg["fixed_input_size"]


def test_features_of_images_of_any_size(pair) -> None:
    theirs, ours, _ = pair("vit_base_patch16_224", dynamic_img_size=True)
    x = torch.randn(2, 3, 48, 16)
    with torch.no_grad():
        exact = truth_model(theirs).forward_intermediates(x.double())
        assert_parity(ours.forward_intermediates(x), theirs.forward_intermediates(x), exact)
        assert [one.shape[2:] for one in fastvr.Backbone(ours)(x)] == [(3, 1)] * 3


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "resnet18d"])
def test_averages_and_freezing(name, pair) -> None:
    _, model, x = pair(name)
    average = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        expected = [(p + 3 * p) / 2 for p in model.parameters()]
        for parameter in model.parameters():
            parameter.mul_(3)
        average.update(model)
        torch.testing.assert_close(list(average.module.parameters()), expected)
        before = model(x)
        frozen = copy.deepcopy(model).train()
        freeze(frozen)
        assert not any(p.requires_grad for p in frozen.parameters())
        # BatchNorms are then of another class, with the same statistics
        assert_parity(frozen(x), before, truth_model(model)(x.double()))
        unfreeze(frozen)
    assert all(p.requires_grad for p in frozen.parameters())
    assert_parity(frozen.eval()(x), before, truth_model(model)(x.double()))
    part = "blocks.0" if name in VITS else "layer1"
    freeze(model, part)
    model.train()(torch.cat([x, x])).mean().backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == {
        n for n, _ in model.named_parameters() if n.startswith(f"{part}.")
    }


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "resnet18d"])
def test_a_backbone_compiles_and_exports(name) -> None:
    # little is left of the model, so that this stays quick
    small = {"depth": 1, "out_indices": 1} if name in VITS else {"out_indices": (0, 1)}
    torch.manual_seed(0)
    backbone = fastvr.create_model(name, **{**MODELS[name], **small}, features_only=True).eval()
    x = torch.randn(2, 3, *images_of(backbone.model))
    with torch.no_grad():
        expected = backbone(x)
        torch.testing.assert_close(torch.compile(backbone, fullgraph=True, backend="eager")(x), expected)
        exported = torch.export.export(backbone, (x,)).module()
        torch.testing.assert_close(exported(x), expected)
        torch.testing.assert_close(copy.deepcopy(backbone)(x), expected, rtol=0, atol=0)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("vit", {"indices": 3}, "ViT: indices must be how many of the last of 2 features.* got 3"),
    ("vit", {"indices": 0}, "indices"),
    ("vit", {"indices": [2]}, "indices"),
    ("vit", {"indices": [-3]}, "indices"),
    ("vit", {"indices": []}, "indices"),
    ("vit", {"indices": [0.5]}, "indices"),
    ("vit", {"indices": "0"}, "indices"),
    ("vit", {"output_fmt": "NHWC"}, "ViT: output_fmt must be 'NCHW' or 'NLC'; got 'NHWC'"),
    ("vit", {"attn_mask": torch.ones(17, 17)}, "attn_mask must be None"),
    ("vit", {"is_causal": True}, "is_causal must be False"),
    ("basic", {"indices": 6}, "ResNet: indices must be how many of the last of 5 features.* got 6"),
    ("basic", {"indices": (5,)}, "indices"),
    ("basic", {"output_fmt": "NLC"}, "ResNet: output_fmt must be 'NCHW'; got 'NLC'"),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_arguments_are_named(kind, arguments, message, tiny, images) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(kind).forward_intermediates(images(), **arguments)


def test_wrong_indices_of_other_methods_are_named(tiny, images) -> None:
    for kind, count in (("vit", 2), ("basic", 5)):
        model = tiny(kind)
        keys = list(model.state_dict())
        for given in (count + 1, [count], ()):
            with pytest.raises(ValueError, match="Backbone: out_indices must be how many of the last"):
                fastvr.Backbone(model, given)
            with pytest.raises(ValueError, match="indices must be how many of the last"):
                model.prune_intermediate_layers(given)
        with pytest.raises(ValueError, match="Backbone: out_indices must be in rising order"):
            fastvr.Backbone(model, (1, 0))
        assert list(model.state_dict()) == keys
    with pytest.raises(ValueError, match="ViT: n must be how many of the last"):
        tiny("vit").get_intermediate_layers(images(), n=3)
    with pytest.raises(ValueError, match="Backbone: model must be a ViT or ResNet of fastvr's; got Linear"):
        fastvr.Backbone(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="out_indices must be None without features_only"):
        fastvr.create_model("resnet18", out_indices=(1,))


def test_a_published_model_as_a_backbone(tiny, images, tmp_path, monkeypatch) -> None:
    model, x = tiny("vit"), images()
    monkeypatch.setattr("fastvr.weights.hub.download", lambda _: fastvr.save_model(model, tmp_path))
    given = {"features_only": True, "out_indices": (1,), "num_heads": 2}
    backbone = fastvr.create_model("vit_tiny_patch16_224", pretrained=True, **given)
    assert not backbone.training
    with torch.no_grad():
        expected = model.forward_intermediates(x, [1], intermediates_only=True)
        torch.testing.assert_close(backbone(x), expected, rtol=0, atol=0)
