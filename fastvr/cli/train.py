"""``fastvr train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fastvr.cli.common import fail


def train(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="For the weights, the losses, the curve, the checkpoint.")
    ] = Path("fastvr-run"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in DIR; its arguments need not be repeated.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="vit_mini (default), resnet_mini, vit_base, resnet50, ...")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|digits",
            help="One subfolder of images a class, or train/ and val/ with such. Digits: scikit-learn's.",
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Height and width: 224; for the mini models 32, for vit_mini on the digits 8."),
    ] = None,
    val_share: Annotated[
        float | None,
        typer.Option(help="Held out to validate on: 0.1 of a folder without val/, 0.25 of the digits."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Weights to begin with, or their folder: timm's, torchvision's, a run's."
        ),
    ] = None,
    new_head: Annotated[
        bool | None, typer.Option("--new-head", help="Take all of these but the classifier.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images: 30.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images a step, of all processes together: 64.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw (default) or sgd.")] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate at its peak: 5e-4 * batch / 512; sgd 0.1 * batch / 256; mini models 2e-3."
        ),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Of matrices, not of biases, norms and positions: 0.05; sgd 1e-4.")
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option(metavar="EPOCHS", help="In which the learning rate rises: a twentieth of all."),
    ] = None,
    clip_grad: Annotated[
        float | None, typer.Option(help="Largest norm of the gradients: 1; 0 clips nothing.")
    ] = None,
    mixup: Annotated[
        float | None,
        typer.Option(
            metavar="ALPHA", help="Mixes pairs of images, weights from Beta(ALPHA, ALPHA): 0, none."
        ),
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="Share of the target that all classes divide: 0.1.")
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(metavar="DECAY", help="Keep a moving average of the weights, and leave that: 0, none."),
    ] = None,
    amp: Annotated[
        str | None, typer.Option(help="Autocast: bf16, fp16 or off. On a GPU bf16, else off.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, split, order, crops, dropout: 0.")] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic", help="Bit for bit repeatable on a GPU too; slower.")
    ] = None,
    fsdp: Annotated[
        bool | None, typer.Option("--fsdp", help="Under torchrun: shard the weights (FSDP2); else DDP.")
    ] = None,
    grad_checkpointing: Annotated[
        bool,
        typer.Option(
            "--grad-checkpointing",
            help="Keep what goes into a block alone: less memory, a third more arithmetic, the same losses.",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Processes that read images, for each that trains: up to 8.")
    ] = None,
    save_every: Annotated[
        int, typer.Option(metavar="STEPS", help="Checkpoints besides those at the end of each epoch.")
    ] = 0,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="That a process waits for another.")
    ] = 300.0,
) -> None:
    """Train a model: by itself a small ViT on handwritten digits, in a minute or two on a CPU.

    A run that was killed goes on with --resume, to the same losses. In several processes:
    torchrun --nproc-per-node N -m fastvr train. Exit status 1 where the loss is
    NaN, the disk full or another process gone, 2 after a mistake, 130 after Ctrl-C.
    """
    arguments = {
        "model": model,
        "data": data,
        "image_size": image_size,
        "val_share": val_share,
        "checkpoint": checkpoint,
        "new_head": new_head,
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "lr": lr,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "clip_grad": clip_grad,
        "mixup": mixup,
        "label_smoothing": label_smoothing,
        "ema": ema,
        "amp": amp,
        "seed": seed,
        "deterministic": deterministic,
        "fsdp": fsdp,
    }
    from fastvr.backend import BackendError
    from fastvr.compare import UsageError
    from fastvr.train import run
    from fastvr.train.checkpoint import LEAVES
    from fastvr.train.distributed import LostProcess
    from fastvr.train.settings import Settings

    given = {name: value for name, value in arguments.items() if value is not None}
    settings = Settings(out, given, resume, device, workers, save_every, timeout, grad_checkpointing)
    try:
        ended = run.train(settings)
    except (UsageError, BackendError) as error:
        fail(str(error))
    except (FloatingPointError, LostProcess) as error:
        typer.echo(f"fastvr: {error}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        # a full disk, most often: the last checkpoint stands
        typer.echo(f"fastvr: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"Interrupted. Go on with: fastvr train --out {out} --resume", err=True)
        raise typer.Exit(130) from None
    if os.environ.get("RANK", "0") == "0":
        typer.echo(
            f"{ended.accuracy:.2%} of the validation images right after {ended.steps:,} steps "
            f"({ended.epochs} epochs), {ended.seconds:.0f} s\n"
            f"{out}: {', '.join(LEAVES)}"
        )
