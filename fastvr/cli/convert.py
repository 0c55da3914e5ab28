"""``fastvr convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastvr.cli.common import fail


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
    from fastvr.weights.build import load_model
    from fastvr.weights.save import save_model

    overrides = {"num_heads": num_heads, "norm_eps": norm_eps}
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        model = load_model(source, num_classes=num_classes, img_size=image_size, **given)
        written = save_model(model, target, to)
    except (ValueError, TypeError, OSError) as error:
        fail(str(error).replace("save_model: ", "").replace("load_model: ", ""))
    typer.echo(f"Written to {written}", err=True)
