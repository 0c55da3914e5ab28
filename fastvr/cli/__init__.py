"""The command line: arguments in, calls out. A module a command."""

from __future__ import annotations

from typing import Annotated

import typer

from fastvr.cli import compare, convert, doctor, train, tune, verify

app = typer.Typer(
    help="Fused Triton kernels inside drop-in ViT and ResNet models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        import fastvr

        typer.echo(f"fastvr {fastvr.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


# as --help lists them
for _command in (
    compare.compare,
    tune.tune,
    train.train,
    convert.convert,
    verify.verify,
    doctor.doctor,
):
    app.command()(_command)
