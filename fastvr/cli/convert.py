"""``fastvr convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastvr.cli.common import as_options, fail


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A checkpoint: a file or a folder.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A .safetensors or .pt file, or a folder.")],
    to: Annotated[str, typer.Option(help="timm, torchvision or transformers.")],
    num_classes: Annotated[
        int | None, typer.Option(help="With a new head, untrained; 0 takes the head off.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="With the positions resampled.")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Where the checkpoint does not say it.")] = None,
    norm_eps: Annotated[
        float | None, typer.Option(help="Another eps of the LayerNorms: another function, by that much.")
    ] = None,
) -> None:
    """Write a checkpoint in another library's layout, with its configuration and preprocessing.

    IN may be of timm, torchvision, transformers, or a ViT around a plain nn.TransformerEncoder.
    """
    from fastvr.weights.build import build
    from fastvr.weights.read import read_checkpoint
    from fastvr.weights.save import LAYOUTS, check_path, save_model

    if to not in LAYOUTS:
        fail(f"--to must be one of {', '.join(LAYOUTS)}; got {to!r}")
    overrides = {"num_heads": num_heads, "norm_eps": norm_eps}
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        check_path(target, to)
        checkpoint = read_checkpoint(source)
        model = build(checkpoint, num_classes=num_classes, img_size=image_size, **given)
        written = save_model(model, target, to)
    except (ValueError, TypeError, OSError) as error:
        fail(as_options(str(error)))
    narrow = {str(t.dtype).removeprefix("torch.") for t in checkpoint.state.values() if t.is_floating_point()}
    wider = f" in float32 (of {', '.join(sorted(narrow))})" if narrow != {"float32"} else ""
    typer.echo(f"Written to {written}{wider}", err=True)
