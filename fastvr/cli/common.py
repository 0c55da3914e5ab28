"""What the commands share."""

from __future__ import annotations

import os
import re
import sys
from typing import NoReturn

import typer
from rich.console import Console

PIPED_WIDTH = 100
_OPTIONS = {
    "give num_heads=": "give --num-heads",
    "load it with norm_eps=1e-06 where": "--norm-eps 1e-6 makes them so where",
    "path must ": "OUT must ",
}


def make_console() -> Console:
    # where stdout is no terminal, Rich would take 80 columns and wrap tables that nobody needs wrapped
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=PIPED_WIDTH if piped else None, highlight=False)


def fail(message: str) -> NoReturn:
    typer.echo(f"fastvr: {message}", err=True)
    raise typer.Exit(2)


def as_options(message: str) -> str:
    """A message for Python's callers, for the command line's: arguments under their options' names."""
    message = re.sub(r"^(save_model|load_model): ", "", message)
    for argument, option in _OPTIONS.items():
        message = message.replace(argument, option)
    return message


def check_seed(seed: int) -> None:
    # what PyTorch's generators and NumPy's take
    if not 0 <= seed < 2**64:
        fail(f"--seed must be from 0 to below 2**64; got {seed}")


def parse_batches(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        sizes = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        sizes = (0,)
    if sizes[0] < 1:
        fail(f"--batch must be batch sizes such as 1,8,64; got {text!r}")
    return sizes
