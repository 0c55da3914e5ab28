"""``fastvr compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastvr.cli.common import check_seed, fail, make_console, parse_batches


def compare(
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Your photographs; scikit-learn's two without.")
    ] = None,
    weights: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A timm or torchvision checkpoint; once for each model."),
    ] = None,
    batch: Annotated[str | None, typer.Option(metavar="N,N,...", help="Batch sizes, besides 1.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16. On a GPU bfloat16, else float32.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="A column for torch.compile as well.")] = False,
    train_seconds: Annotated[float, typer.Option(help="For learning the digits, in total.")] = 60.0,
    no_train: Annotated[bool, typer.Option("--no-train", help="Leave out learning the digits.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A shorter run: fewer sizes, shorter timings.")
    ] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every figure to FILE.")] = None,
    seed: Annotated[int, typer.Option(help="Of random weights, crops and training.")] = 0,
) -> None:
    """ViT-B/16 beside ResNet-50 on real photographs: cost, speed, parity, and what each needs to learn.

    Exit status 1 where the numbers of a model are not PyTorch's, 130 after Ctrl-C (with a partial table).
    """
    from fastvr.backend import BackendError
    from fastvr.compare import UsageError, run, table
    from fastvr.compare.settings import DTYPES, Settings

    if dtype is not None and dtype not in DTYPES:
        fail(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if not train_seconds >= 0 or train_seconds == float("inf"):
        fail(f"--train-seconds must be 0 or more; got {train_seconds}")
    check_seed(seed)
    if quick and train_seconds == 60.0:
        train_seconds = 12.0
    settings = Settings(
        images=images,
        weights=tuple(weights or ()),
        batches=parse_batches(batch),
        dtype=dtype,
        device=device,
        compile=compile,
        json=json,
        train_seconds=0.0 if no_train else train_seconds,
        quick=quick,
        seed=seed,
    )
    comparison: run.Comparison | None = None
    status = 0
    try:
        comparison = run.Comparison(settings)
        comparison.run()
    except KeyboardInterrupt:
        status = 130
    except (UsageError, BackendError) as error:
        fail(str(error))
    if comparison is not None:
        table.show(comparison.result, make_console())
        if json is not None:
            typer.echo(f"Written to {json}", err=True)
        if status == 0 and not comparison.passed:
            status = 1
    raise typer.Exit(status)
