"""``fastvr verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from fastvr.cli.common import as_options, check_seed, fail, make_console


def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A file or a folder.")],
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    batch: Annotated[int, typer.Option(metavar="N", help="Random images.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the images.")] = 0,
    num_heads: Annotated[int | None, typer.Option(help="Where the checkpoint does not say it.")] = None,
) -> None:
    """Load CHECKPOINT in its own library and here: the error of each against float64.

    Exit status 1 where fastvr's breaks the parity rule.
    """
    from fastvr import verify as module
    from fastvr.compare.settings import DTYPES

    if dtype not in DTYPES:
        fail(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if batch < 1:
        fail(f"--batch must be at least 1; got {batch}")
    check_seed(seed)
    try:
        found = module.verify(checkpoint, dtype=DTYPES[dtype], batch=batch, seed=seed, num_heads=num_heads)
    except (ValueError, TypeError, OSError) as error:
        fail(as_options(str(error)))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in (f"{dtype}, {batch} images", "max error", "RMS error"):
        table.add_column(heading, justify="left" if heading.startswith(dtype) else "right")
    for name, report in ((found.library, found.theirs), ("fastvr", found.ours)):
        table.add_row(name, f"{report.max_error:.3g}", f"{report.rms_error:.3g}")
    table.add_row("allowed", f"{found.ours.max_bound:.3g}", f"{found.ours.rms_bound:.3g}")
    console = make_console()
    # a path is not broken into lines
    title = Text(f"{checkpoint}: {type(found.model).__name__} in the layout of {found.layout}\n")
    console.print(title, soft_wrap=True)
    console.print(table)
    console.print(Text(f"\nAgainst float64: {found.ours.verdict}."))
    raise typer.Exit(0 if found.ours.passed else 1)
