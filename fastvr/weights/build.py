"""Building the model that a checkpoint is for."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fastvr.models._model import Model
from fastvr.models.positions import image_and_patch, resample
from fastvr.models.registry import MODELS
from fastvr.models.resnet import ResNet
from fastvr.models.vit import ViT
from fastvr.models.vit_distilled import DistilledViT
from fastvr.weights import preprocessing
from fastvr.weights.contradictions import contradictions
from fastvr.weights.describe import mlp_ratio, resnet_arguments
from fastvr.weights.errors import CheckpointError
from fastvr.weights.layouts import Recognised, recognise
from fastvr.weights.load import as_checkpoint, check, unknown_layout, write
from fastvr.weights.read import Checkpoint

logger = logging.getLogger("fastvr")

_HEADS = ("head", "head_dist", "fc")


def load_model(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    *,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> Model:
    """The model that a checkpoint is for, with its weights, in eval mode and float32.

    Depth, width, patches, register and distillation tokens, LayerScale and the number of classes are those of
    the weights. Heads, eps and activation are those of config.json where there is one, else what the layout's
    own library takes: eps 1e-6 and exact GELU for timm and torchvision, 1e-12 for transformers, 1e-5, ReLU
    and post-norm for a plain ``nn.TransformerEncoder``, with attention over the tokens. What is a guess,
    and what is not in the checkpoint, is logged as a warning of the logger ``fastvr``. Where mean and
    deviation of the images lie beside the weights, ``model.preprocessing`` has them and the model takes uint8
    images.

    Args:
        path_or_state_dict: as for :func:`load_checkpoint`.
        num_classes: another number than the checkpoint's makes a new head, 0 none.
        img_size: another size than the checkpoint's resamples the position embeddings, bicubic with
            antialiasing in float32 as timm does; for a ViT.
        overrides: arguments of :class:`ViT` or :class:`ResNet` that go before what the checkpoint says, such
            as ``num_heads``, ``act`` or ``drop_path_rate``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read, or is for none of fastvr's models; names what is wrong.
        ValueError, TypeError: arguments that do not fit; the message names them.
    """
    checkpoint = as_checkpoint(path_or_state_dict, "load_model")
    return build(checkpoint, num_classes=num_classes, img_size=img_size, **overrides)


def build(
    checkpoint: Checkpoint,
    *,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> Model:
    """:func:`load_model` of what was read already."""
    source = checkpoint.source
    found = recognise(checkpoint.state, checkpoint.config, source)
    if found is None:
        raise CheckpointError(unknown_layout(checkpoint, "ViT or ResNet"))
    how = preprocessing.read(checkpoint.config, checkpoint.preprocessor, source)
    if img_size is not None and found.family != "ViT":
        raise ValueError("load_model: img_size is for a ViT; a ResNet takes images of every size")
    wanted = None if img_size is None else image_and_patch(img_size, 1)[0]
    try:
        kind, arguments = _arguments(found, wanted, overrides, source)
    except CheckpointError:
        raise
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{source} ({found.title} layout of a {found.family}): lacks weights that tell its shape: {error}"
        ) from error
    _check_configuration(checkpoint, found, arguments, overrides)
    if wanted is not None:
        arguments["img_size"], old = wanted, arguments["img_size"]
    if num_classes is not None:
        arguments["num_classes"], had = num_classes, arguments["num_classes"]
    arguments |= overrides
    try:
        # without memory, of which a file of a few bytes may claim any amount
        with torch.device("meta"), _WithoutValues():
            shell = kind(**arguments)
    except (ValueError, RuntimeError) as error:  # RuntimeError: more than a tensor can have
        given = {"num_classes": num_classes, "img_size": img_size, **overrides}
        if any(value is not None and re.search(rf"\b{name}\b", str(error)) for name, value in given.items()):
            raise
        raise CheckpointError(f"{source}: {error}") from error
    state = dict(found.state)
    if isinstance(shell, ViT) and wanted is not None and shell.img_size != old:
        _resample(state, shell, old)
        logger.info("%s: positions resampled from images of %s to %s", source, old, shell.img_size)
    fresh: set[str] = set()
    if num_classes is not None and num_classes != had:
        fresh = {name for name in shell.state_dict() if name.partition(".")[0] in _HEADS}
        state = {name: t for name, t in state.items() if name.partition(".")[0] not in _HEADS}
        if num_classes:
            logger.warning("%s: a new head for %d classes, untrained (it has %d)", source, num_classes, had)
    ready, _ = check(shell, found._replace(state=state, stated={}), source, fresh=fresh)
    model = kind(**arguments).eval()
    write(model, ready)
    if how is not None and len(how.mean) == model.in_chans:
        if isinstance(model, ViT) and model.img_size[0] == model.img_size[1]:
            how = how.at(model.img_size[0])
        model.preprocessing = how
        model.normalize_images(how.mean, how.std)
    return model


class _WithoutValues(TorchFunctionMode):
    """Leaves out what fills weights with random numbers: on meta there are none, and the first of these calls
    imports half of PyTorch's compiler, for seconds."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _check_configuration(
    checkpoint: Checkpoint, found: Recognised, arguments: Mapping[str, Any], overrides: Mapping[str, Any]
) -> None:
    """Raise a CheckpointError where the configuration is not that of these weights."""
    told = dict(arguments)
    wrong = []
    if found.family == "ViT":
        told["hidden"] = found.state["blocks.0.mlp.fc1.weight"].shape[0]
        width, heads = arguments["embed_dim"], arguments.get("num_heads", 1)
        if "num_heads" not in overrides and width % heads:
            wrong = [f"{heads} heads cannot share the weights' width of {width}"]
    if wrong := contradictions(found.layout, checkpoint.config, told) + wrong:
        raise CheckpointError(
            f"{checkpoint.source} ({found.title} layout of a {found.family}): its configuration is of "
            "another model, or it lacks blocks:\n  " + "\n  ".join(wrong)
        )


def _resample(state: dict[str, torch.Tensor], model: ViT, old: tuple[int, int]) -> None:
    patch = model.patch_size
    grid = old[0] // patch[0], old[1] // patch[1]
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    given = state["pos_embed"]
    if given.dim() != 3 or given.shape[1] != prefix + grid[0] * grid[1] or not given.is_floating_point():
        return  # fill names what is wrong with it
    state["pos_embed"] = resample(given, grid, model.grid_size, prefix)


def _arguments(
    found: Recognised, wanted: tuple[int, int] | None, overrides: Mapping[str, Any], source: str
) -> tuple[type[Model], dict[str, Any]]:
    if found.family == "ResNet":
        arguments = {**resnet_arguments(found.state), **found.stated}
        if not all(arguments["layers"]):
            raise CheckpointError(f"{source}: has stages of {arguments['layers']} blocks; none may be empty")
        return ResNet, arguments
    state, stated = found.state, dict(found.stated)
    projection = state["patch_embed.proj.weight"]
    if projection.dim() != 4:
        raise CheckpointError(
            f"{source}: {found.origin['patch_embed.proj.weight']} must have 4 dimensions; got "
            f"{list(projection.shape)}"
        )
    width, in_chans, *patch = projection.shape
    numbers = {int(n) for key in state for n in re.findall(r"^blocks\.(\d+)\.", key)}
    depth = len(numbers)
    if numbers != set(range(depth)):
        raise CheckpointError(f"{source}: has {depth} blocks, with numbers up to {max(numbers)}")
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    distilled = "dist_token" in state
    prefix = sum(state[name].shape[1] for name in ("cls_token", "reg_token", "dist_token") if name in state)
    head = state.get("head.weight")
    fc_norm = "fc_norm.weight" in state
    positions = state["pos_embed"].shape[1]
    no_embed_class = overrides.get("no_embed_class", stated.pop("no_embed_class", None))
    size = stated.pop("img_size", None)
    if size is None:
        # positions of patches alone where they make a square, else of all tokens; DeiT-III has the former
        counts = [positions - prefix, positions]
        if no_embed_class is not None:
            counts = [counts[no_embed_class]]
        size = _own_size([count for count in counts if count > 0], (patch[0], patch[1]), wanted)
        if no_embed_class is None:
            no_embed_class = bool(prefix) and positions == (size[0] // patch[0]) * (size[1] // patch[1])
    patches = (size[0] // patch[0]) * (size[1] // patch[1])
    if no_embed_class is None:
        no_embed_class = positions == patches
    if positions != patches + (0 if no_embed_class else prefix):
        raise CheckpointError(
            f"{source}: has {positions} positions, which are not those of images of {size[0]}x{size[1]} "
            f"pixels in patches of {patch[0]}x{patch[1]}; if its images are oblong, give their img_size="
        )
    if found.layout == "timm" and not found.stated:
        # of two of timm's kinds of ViT with rotary positions, which no weight holds
        if "norm_pre.weight" in state and "attn_pool.latent" in state:
            raise CheckpointError(
                f"{source}: has the weights of a perception encoder, whose rotary positions fastvr's ViT has "
                "not; fastvr.accelerate takes timm's model as it is"
            )
        if found.origin.get("blocks.0.ls1.gamma", "").endswith("gamma_1"):
            logger.warning(
                "%s: does not say whether it has rotary positions; it is taken for DeiT-III's own, which has "
                "none (timm's vit_*_rope_ape_* have the same names: fastvr.accelerate takes those)",
                source,
            )
    arguments = {
        "img_size": size,
        "patch_size": tuple(patch),
        "in_chans": in_chans,
        "num_classes": 0 if head is None else head.shape[0],
        "embed_dim": width,
        "depth": depth,
        "mlp_ratio": mlp_ratio(hidden, width),
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        **({"act": "swiglu"} if state["blocks.0.mlp.fc2.weight"].shape[1] * 2 == hidden else {}),
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "pre_norm": "norm_pre.weight" in state,
        "no_embed_class": bool(no_embed_class),
        "fc_norm": fc_norm,
        **stated,
    }
    has_class_token = "cls_token" in state
    said = stated.keys() | overrides.keys()
    if arguments["pre_norm"]:
        arguments = {"norm_eps": 1e-5, **arguments}
    if (arguments["pre_norm"] or "attn_pool.latent" in state) and "act" not in said:
        logger.warning("%s: does not say which activation it has; exact GELU is taken (act=)", source)
    if "num_heads" not in overrides and "num_heads" not in arguments:
        gated = arguments.get("act") == "swiglu"
        guessed = found.layout == "encoder"
        arguments["num_heads"] = _heads(width, gated, has_class_token, source, guessed=guessed)
    if distilled:
        return DistilledViT, arguments
    arguments["class_token"] = has_class_token
    arguments["reg_tokens"] = state["reg_token"].shape[1] if "reg_token" in state else 0
    pool = "map" if "attn_pool.latent" in state else "token" if has_class_token and not fc_norm else "avg"
    arguments.setdefault("global_pool", pool)
    return ViT, arguments


def _own_size(counts: list[int], patch: tuple[int, int], wanted: tuple[int, int] | None) -> tuple[int, int]:
    """The size of the images of which one of ``counts`` is the number of patches: a square, ``wanted``, or a
    square of patches."""
    rows, columns = patch
    for count in counts:
        side = math.isqrt(count * rows * columns)
        if side * side == count * rows * columns and not (side % rows or side % columns):
            return side, side
        if wanted is not None and (wanted[0] // rows) * (wanted[1] // columns) == count:
            return wanted
    side = next((math.isqrt(count) for count in counts if math.isqrt(count) ** 2 == count), 1)
    return side * rows, side * columns


def _heads(width: int, gated: bool, class_token: bool, source: str, *, guessed: bool) -> int:
    known = [
        entry.arguments
        for entry in MODELS.values()
        if entry.arguments.get("embed_dim") == width and (entry.arguments.get("act") == "swiglu") == gated
    ]
    # of one width SigLIP's giant has others than RADIO's
    alike = [one for one in known if one.get("class_token", True) == class_token] or known
    heads: set[int] = {one["num_heads"] for one in alike}
    if not known and not width % 64:
        heads = {width // 64}
    if len(heads) != 1:
        raise CheckpointError(
            f"{source}: does not say how many heads share its width of {width}: give num_heads="
        )
    (count,) = heads
    if guessed or not known:
        logger.warning(
            "%s: does not say how many heads it has; %d of width %d are taken (num_heads=)",
            source,
            count,
            width // count,
        )
    return count
