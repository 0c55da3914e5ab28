"""PyTorch's own tools on accelerated models: compilers, exporters, meta devices, hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from observed import assert_same, observe
from randomise import randomise
from torch import nn

import fastvr
from fastvr import backend
from fastvr.testing import assert_parity, truth_model

pytest.importorskip("timm")
pytest.importorskip("torchvision")


def _timm_vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2}
    return VisionTransformer(**sizes, num_classes=10, init_values=0.1)


def _timm_resnet() -> nn.Module:
    from timm.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, (1, 1, 1, 1), num_classes=10)


def _torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 1, 2, 64, 128, num_classes=10)


def _torchvision_resnet() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)


def _transformers_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    return transformers.ViTForImageClassification(config)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 2, 96, dropout=0.0, batch_first=True)
    embed = nn.Sequential(nn.Conv2d(3, 64, 8, stride=8), nn.Flatten(2))
    return nn.Sequential(
        embed, nn.Linear(16, 64), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    )


MAKERS = {
    "timm vit": _timm_vit,
    "timm resnet": _timm_resnet,
    "torchvision vit": _torchvision_vit,
    "torchvision resnet": _torchvision_resnet,
    "transformers vit": _transformers_vit,
    "encoder": _encoder,
}


def _make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(MAKERS[kind]()).eval()


def _accelerated(kind: str) -> nn.Module:
    model = _make(kind)
    assert fastvr.accelerate(model).swapped
    return model


def _images(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def _logits(y: Any) -> torch.Tensor:
    return y if isinstance(y, torch.Tensor) else y.logits


def test_three_batch_sizes_are_one_compilation() -> None:
    model, eager = _accelerated("timm vit"), _make("timm vit")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad(), fastvr.use_backend("reference"):
        with torch._dynamo.config.patch(error_on_recompile=True):
            results = [compiled(_images(n)) for n in (2, 3, 5)]
        for n, y in zip((2, 3, 5), results, strict=True):
            assert_parity(y, eager(_images(n)), truth_model(eager)(_images(n).double()))


def _export(model: nn.Module, mode: str) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=64)
    with fastvr.use_backend(mode):
        return torch.export.export(model, (_images(),), dynamic_shapes=({0: batch},))


def _ours(program: torch.export.ExportedProgram) -> list[str]:
    calls = (str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return [target for target in calls if target.startswith("fastvr.")]


@pytest.mark.parametrize("kind", ["timm vit", "transformers vit", "torchvision resnet", "encoder"])
def test_exports_without_fastvrs_operators(kind) -> None:
    model, eager = _accelerated(kind), _make(kind)
    program = _export(model, "reference")
    assert not _ours(program)
    with torch.no_grad():
        for n in (1, 3):
            y, x = _logits(program.module()(_images(n))), _images(n)
            assert_parity(y, _logits(eager(x)), _logits(truth_model(eager)(x.double())))


def test_exports_with_fastvrs_operators_and_takes_them_out() -> None:
    model, eager, x = _accelerated("timm vit"), _make("timm vit"), _images(3)
    program = _export(model, "triton")
    assert len(_ours(program)) > 2
    plain = program.run_decompositions(fastvr.decompositions())
    assert not _ours(plain)
    with torch.no_grad():
        assert_parity(plain.module()(x), eager(x), truth_model(eager)(x.double()))


@pytest.mark.parametrize("kind", MAKERS)
def test_made_on_meta_accelerated_and_filled(kind) -> None:
    eager, x = _make(kind), _images()
    with torch.device("meta"):
        filled, assigned = _accelerated(kind), _accelerated(kind)
    filled = filled.to_empty(device="cpu")
    filled.load_state_dict(eager.state_dict())
    assigned.load_state_dict(eager.state_dict(), assign=True)
    with torch.no_grad(), fastvr.use_backend("reference"), backend.observe() as ran:
        for model in (filled, assigned):
            assert_parity(_logits(model(x)), _logits(eager(x)), _logits(truth_model(eager)(x.double())))
    assert ran


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", MAKERS)
def test_hooks_see_what_the_librarys_own_model_shows(kind, training) -> None:
    """Every hook as often and with the same values; without them everything is fused as before."""
    model, eager = _accelerated(kind).train(training), _make(kind).train(training)
    truth, x = truth_model(eager).train(training), _images(8 if "resnet" in kind else 2)
    with fastvr.use_backend("reference"):
        with backend.observe() as before:
            model(x)  # hooks may come after a call
        # torchvision's and timm's residual blocks add in place, which PyTorch forbids beside backward hooks
        backward = "resnet" not in kind
        seen, expected, exact = (
            observe(each, lambda m, x=given: _logits(m(x)), backward=backward)
            for each, given in ((model, x), (eager, x), (truth, x.double()))
        )
        assert len(seen[0]) > 20
        assert_same(seen, expected, exact)
        with backend.observe() as after:
            model(x)
    assert after == before
