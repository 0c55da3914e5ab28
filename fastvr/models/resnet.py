"""ResNets (He et al., 2016), v1.5, with torchvision's names."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import nn

from fastvr.models._arguments import check_integers
from fastvr.models._model import Model, check_image
from fastvr.models._other_names import RESNET_ABSENT, RESNET_NAMES
from fastvr.models.features import check_output_fmt, take_indices
from fastvr.nn.head import classify_map, pool_map
from fastvr.nn.plain import plain
from fastvr.nn.residual import BasicBlock, Bottleneck, conv1x1, conv3x3, run_stage
from fastvr.nn.running_statistics import Moves
from fastvr.nn.stem import stem, stem_map
from fastvr.ops.cpu.magnitude import carry_on
from fastvr.ops.cpu.prepared_pass import current


class ResNet(Model):
    """A residual network; the state-dict keys are those of torchvision's ``ResNet``.

    The convolutions' weights lie in channels_last from the start. Images may be in either layout.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        layers: blocks in each of the four stages.
        num_classes: logits; 0 for none (``fc`` is an identity).
        in_chans: channels of the images.
        width: channels of the stem and of the first stage's 3x3 convolutions.
        groups: of the bottlenecks' 3x3 convolutions (ResNeXt).
        width_per_group: channels of each of those groups in the first stage, at a ``width`` of 64 (ResNeXt,
            Wide ResNet).
        stem_width: channels of a stem of three 3x3 convolutions (ResNet-C, -D); None for one of 7x7.
        avg_down: shortcuts pool before a 1x1 convolution instead of leaving pixels out (ResNet-D).
        zero_init_residual: start each branch's last BatchNorm at 0, so that a block begins as an identity.
        global_pool: "avg", or "" for the feature map, which takes ``num_classes=0``.
    """

    other_names, absent = RESNET_NAMES, RESNET_ABSENT

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        width: int = 64,
        groups: int = 1,
        width_per_group: int = 64,
        stem_width: int | None = None,
        avg_down: bool = False,
        zero_init_residual: bool = False,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        if not (isinstance(block, type) and issubclass(block, (BasicBlock, Bottleneck))):
            raise ValueError(f"ResNet: block must be the class BasicBlock or Bottleneck; got {block!r}")
        depths = list(layers) if isinstance(layers, Sequence) else []
        if len(depths) != 4 or not all(isinstance(n, Integral) and int(n) > 0 for n in depths):
            raise ValueError(f"ResNet: layers must be four positive integers; got {layers!r}")
        check_integers("ResNet", in_chans=(in_chans, 1), num_classes=(num_classes, 0), width=(width, 1))
        check_integers("ResNet", groups=(groups, 1), width_per_group=(width_per_group, 1))
        if stem_width is not None:
            check_integers("ResNet", stem_width=(stem_width, 1))
        if block is BasicBlock and (groups, width_per_group) != (1, 64):
            raise ValueError("ResNet: groups and width_per_group must be 1 and 64 with BasicBlock")
        _check_pool(global_pool, num_classes)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = 8 * width * block.expansion
        # as timm's FeatureInfo takes them
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": width, "reduction": 2, "module": "relu"},
            *(
                {"num_chs": 2**i * width * block.expansion, "reduction": 4 * 2**i, "module": f"layer{i + 1}"}
                for i in range(4)
            ),
        ]
        self.default_out_indices: int | tuple[int, ...] = (0, 1, 2, 3, 4)
        self._first_conv = "conv1" if stem_width is None else "conv1.0"
        self._classifier, self._stride = "fc", 32

        self.conv1: nn.Module
        if stem_width is None:
            self.conv1 = nn.Conv2d(in_chans, width, kernel_size=7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = _deep_stem(in_chans, stem_width, width)
        self.bn1: nn.Module = nn.BatchNorm2d(width)
        self.relu: nn.Module = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        options = {} if block is BasicBlock else {"groups": groups, "width_per_group": width_per_group}

        def stage(inplanes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
            return _stage(block, inplanes, planes, blocks, stride, avg_down, options)

        self.layer1: nn.Module = stage(width, width, layers[0], 1)
        self.layer2: nn.Module = stage(width * block.expansion, 2 * width, layers[1], 2)
        self.layer3: nn.Module = stage(2 * width * block.expansion, 4 * width, layers[2], 2)
        self.layer4: nn.Module = stage(4 * width * block.expansion, 8 * width, layers[3], 2)
        self.avgpool: nn.Module = nn.AdaptiveAvgPool2d((1, 1))
        self.fc: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                # not .to(), which takes no fake tensors, nor .contiguous(), for which 1x1 weights are both
                weight = torch.empty_like(module.weight, memory_format=torch.channels_last)
                module.weight = nn.Parameter(weight.copy_(module.weight.detach()))
            elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
                last = module.last_norm
                assert isinstance(last, nn.BatchNorm2d)
                nn.init.zeros_(last.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images.

        Args:
            x: [N, in_chans, H, W] of any size, in the weights' dtype and on their device, or uint8 after
                :meth:`normalize_images`.

        Returns:
            [N, num_classes]; with ``num_classes=0`` the pooled features, with ``global_pool=""`` the map.

        Raises:
            ValueError: x's rank, channels, dtype or device.
        """
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The last stage's map, [N, num_features, H / 32, W / 32]; ``x`` as for :meth:`forward`."""
        return self._run(x)[0]

    def _run(
        self, x: torch.Tensor, taken: Sequence[int] = (), last: int = 4
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The map of stage ``last``, and on the way there those of the stages ``taken`` (0: the stem)."""
        first = self.conv1[0] if isinstance(self.conv1, nn.Sequential) else self.conv1
        dtype = check_image(self, x, None, first)
        moments = self.image_moments(x, dtype)
        moves = Moves()
        maps: list[torch.Tensor] = []
        stages = self.layer1, self.layer2, self.layer3, self.layer4
        done, run = 0, current()
        parts = None if run is None or taken or last < 4 else run.parts
        if 0 in taken:
            x = stem_map(self.conv1, self.bn1, self.relu, x, *moments, dtype)
            maps.append(x)
            x = pool_map(self.maxpool, x)
        elif parts is not None and parts.images(x) < len(x):
            done, made = parts.stages, []
            for part in x.split(parts.images(x)):
                y = stem(self.conv1, self.bn1, self.relu, self.maxpool, part, *moments, dtype)
                for stage in stages[:done]:
                    y = run_stage(stage, y)
                made.append(y)
            x = carry_on(made, torch.cat(made))
        else:
            x = stem(self.conv1, self.bn1, self.relu, self.maxpool, x, *moments, dtype, moves)
        for i, stage in enumerate(stages[done:last], done + 1):
            if self.grad_checkpointing and torch.is_grad_enabled() and plain(stage, nn.Sequential):
                moves.apply()
                for block in stage:
                    x = self.run_block(block, x, block)
            else:
                x = run_stage(stage, x, moves)
            if i in taken:
                maps.append(x)
        moves.apply()
        return x, maps

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """What :meth:`forward_features` gives, and the maps of chosen stages; timm's method.

        Args:
            x: as for :meth:`forward`.
            indices: 0 for the stem's map before it is pooled, 1 to 4 for the stages'; the last n, or these,
                or (None) all.
            norm: changes nothing: there is no last norm.
            stop_early: run no stage behind the last of ``indices``; the features are then of that one.
            output_fmt: "NCHW".
            intermediates_only: without the features.

        Returns:
            (features, maps from the front), or the maps alone.

        Raises:
            ValueError: an argument that does not fit; the message names it.
        """
        taken = take_indices("ResNet", "indices", indices, len(self.feature_info))
        check_output_fmt("ResNet", output_fmt, ("NCHW",))
        # nobody reads what comes later, but in training it moves its running statistics
        stop_early = stop_early or (intermediates_only and not self.training)
        y, maps = self._run(x, taken, max(taken) if stop_early else 4)
        return maps if intermediates_only else (y, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Take off what :meth:`forward_intermediates` does not need for ``indices``; timm's method.

        Args:
            indices: as there.
            prune_norm: changes nothing: there is no last norm.
            prune_head: pooling and classifier too; they always go with the last stage.

        Returns:
            The indices, counted from the stem.

        Raises:
            ValueError: there are no such maps; the model stays as it was.
        """
        taken = take_indices("ResNet", "indices", indices, len(self.feature_info))
        last = max(taken)
        for name in ("layer1", "layer2", "layer3", "layer4")[last:]:
            setattr(self, name, nn.Sequential().train(self.training))
        if last == 0:
            self.maxpool = nn.Identity().train(self.training)
        if last < 4:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or last < 4:
            self.reset_classifier(0, "")
        self.changed()
        return taken

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits of what :meth:`forward_features` gave; with ``pre_logits`` the pooled features."""
        if not self.global_pool:
            return x
        if pre_logits:
            return torch.flatten(self.avgpool(x), 1)
        return classify_map(self.avgpool, self.fc, x)

    def get_classifier(self, name_only: bool = False) -> Any:
        """The last linear layer, or an identity; or its name."""
        return "fc" if name_only else self.fc

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Which layer a parameter belongs to, for layer-wise learning rates, as timm's optimisers read it:
        the stem, each block (``coarse``: each stage), the classifier."""
        return {
            "stem": r"^(?:conv1|bn1|maxpool)",
            "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)",
        }

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for ``num_classes`` (0: an identity); ``global_pool`` None leaves the pooling."""
        pool = self.global_pool if global_pool is None else global_pool
        _check_pool(pool, num_classes)
        like = next(self.parameters())
        if num_classes:
            self.fc = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
        else:
            self.fc = nn.Identity()
        self.fc.train(self.training)
        self.num_classes, self.global_pool = num_classes, pool
        self.changed()


def _check_pool(global_pool: str, num_classes: int) -> None:
    if num_classes < 0:
        raise ValueError(f"ResNet: num_classes must be at least 0; got {num_classes}")
    if global_pool not in ("avg", ""):
        raise ValueError(f"ResNet: global_pool must be 'avg' or ''; got {global_pool!r}")
    if not global_pool and num_classes:
        raise ValueError(f"ResNet: global_pool must be 'avg' for a classifier of {num_classes}; got ''")


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    inplanes: int,
    planes: int,
    blocks: int,
    stride: int,
    avg_down: bool,
    options: dict[str, Any],
) -> nn.Sequential:
    outplanes = planes * block.expansion
    downsample = None
    if stride != 1 or inplanes != outplanes:
        downsample = nn.Sequential(conv1x1(inplanes, outplanes, stride), nn.BatchNorm2d(outplanes))
        if avg_down:
            pool = (
                nn.Identity()
                if stride == 1
                else nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
            )
            downsample = nn.Sequential(pool, conv1x1(inplanes, outplanes), nn.BatchNorm2d(outplanes))
    rest = (block(outplanes, planes, **options) for _ in range(1, blocks))
    return nn.Sequential(block(inplanes, planes, stride, downsample, **options), *rest)


def _deep_stem(in_chans: int, stem_width: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        conv3x3(in_chans, stem_width, 2),
        nn.BatchNorm2d(stem_width),
        nn.ReLU(inplace=True),
        conv3x3(stem_width, stem_width),
        nn.BatchNorm2d(stem_width),
        nn.ReLU(inplace=True),
        conv3x3(stem_width, width),
    )


PRESETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


class _Preset(ResNet):
    preset: ClassVar[str]

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        zero_init_residual: bool = False,
        global_pool: str = "avg",
    ) -> None:
        block, layers = PRESETS[self.preset]
        super().__init__(
            block,
            layers,
            num_classes,
            in_chans,
            zero_init_residual=zero_init_residual,
            global_pool=global_pool,
        )


class ResNet18(_Preset):
    """18 layers in basic blocks; arguments as :class:`ResNet`'s."""

    preset = "resnet18"


class ResNet34(_Preset):
    """34 layers in basic blocks; arguments as :class:`ResNet`'s."""

    preset = "resnet34"


class ResNet50(_Preset):
    """50 layers in bottlenecks; arguments as :class:`ResNet`'s."""

    preset = "resnet50"


class ResNet101(_Preset):
    """101 layers in bottlenecks; arguments as :class:`ResNet`'s."""

    preset = "resnet101"


class ResNet152(_Preset):
    """152 layers in bottlenecks; arguments as :class:`ResNet`'s."""

    preset = "resnet152"
