"""``fastvr tune``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastvr.cli.common import fail, make_console, parse_batches


def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="vit_base, resnet50, ...")],
    batch: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Batch sizes (1,8,64 answer for all up to 256).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Stop after; 600, or 20 with --quick.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The likeliest candidates of what nobody has measured.")
    ] = False,
    train: Annotated[
        bool, typer.Option("--train", help="A training step's calls, forward and backward, not inference's.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure also what is known.")] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every result to FILE.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="No GPU: a small stand-in of the model, in Triton's interpreter."),
    ] = False,
) -> None:
    """Measure which kernels and configurations run MODEL fastest on this GPU, and remember them.

    Each candidate is held to the parity rule before it may win. Exit status 1 where the GPU failed or the
    table could not be written, 2 where there is nothing to tune, 130 after Ctrl-C (what was measured stays).
    """
    from fastvr import backend, tuning
    from fastvr.compare import UsageError
    from fastvr.compare.progress import Reporter
    from fastvr.compare.settings import DTYPES, check_writable, write_json
    from fastvr.models.registry import find

    batches = parse_batches(batch)
    if dtype not in DTYPES:
        fail(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if budget is not None and not 0 < budget < float("inf"):
        fail(f"--budget must be more than 0 seconds; got {budget}")
    try:
        check_writable(json)
        find(model)
    except (UsageError, ValueError) as error:
        fail(str(error).replace("create_model: name", "MODEL"))
    _check_tunable(dry_run)

    from fastvr.tuner import QUICK_SECONDS, command

    seconds = budget or (QUICK_SECONDS if quick else 600.0)
    try:
        with Reporter().phase(f"Tuning {model}") as step:
            report = command.run(
                model,
                batches=batches,
                dtype=DTYPES[dtype],
                budget=seconds,
                quick=quick,
                again=again,
                train=train,
                dry_run=dry_run,
                progress=step,
            )
    except (backend.BackendError, tuning.TableError) as error:
        fail(str(error))
    command.show(report, make_console(), dry_run=dry_run)
    if json is not None:
        write_json(json, report.as_dict())
        typer.echo(f"Written to {json}", err=True)
    raise typer.Exit(130 if report.stopped == "interrupted" else 1 if report.unsaved or report.failed else 0)


def _check_tunable(dry_run: bool) -> None:
    """End here where nothing can be tuned; a dry run goes on in a process with the interpreter on."""
    import torch

    from fastvr import backend

    if (missing := backend.triton_missing()) is not None:
        fail(f"there is nothing to tune: {missing}")
    if dry_run:
        if not backend.interpreting():
            # kernels are made for the interpreter when they are decorated
            environment = os.environ | {"TRITON_INTERPRET": "1"}
            os.execve(sys.executable, [sys.executable, "-m", "fastvr", *sys.argv[1:]], environment)
        from fastvr.testing import interpreter

        interpreter.install()
        torch.set_num_threads(1)  # the interpreter is one thread of Python
    elif not torch.cuda.is_available():
        fail(
            "PyTorch sees no GPU, so there is nothing to tune here (fastvr doctor says more; "
            "--dry-run goes through it all in Triton's interpreter)"
        )
    elif (reason := backend.unavailable(torch.device("cuda"))) is not None:
        fail(f"there is nothing to tune: {reason}")
