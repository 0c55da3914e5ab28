"""The command line: arguments in, calls out."""

from __future__ import annotations

import json as json_module
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

app = typer.Typer(
    help="Fused Triton kernels inside drop-in ViT and ResNet models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_PIPED_WIDTH = 100


def _console() -> Console:
    # where stdout is no terminal, Rich would take 80 columns and wrap tables that nobody needs wrapped
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=_PIPED_WIDTH if piped else None, highlight=False)


def _fail(message: str) -> NoReturn:
    typer.echo(f"fastvr: {message}", err=True)
    raise typer.Exit(2)


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


def _batches(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        sizes = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        sizes = (0,)
    if sizes[0] < 1:
        _fail(f"--batch must be batch sizes such as 1,8,64; got {text!r}")
    return sizes


@app.command()
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
        _fail(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if not train_seconds >= 0 or train_seconds == float("inf"):
        _fail(f"--train-seconds must be 0 or more; got {train_seconds}")
    if quick and train_seconds == 60.0:
        train_seconds = 12.0
    settings = Settings(
        images=images,
        weights=tuple(weights or ()),
        batches=_batches(batch),
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
        _fail(str(error))
    if comparison is not None:
        table.show(comparison.result, _console())
        if json is not None:
            typer.echo(f"Written to {json}", err=True)
        if status == 0 and not comparison.passed:
            status = 1
    raise typer.Exit(status)


@app.command()
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

    batches = _batches(batch)
    if dtype not in DTYPES:
        _fail(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if budget is not None and not 0 < budget < float("inf"):
        _fail(f"--budget must be more than 0 seconds; got {budget}")
    try:
        check_writable(json)
        find(model)
    except (UsageError, ValueError) as error:
        _fail(str(error).replace("create_model: name", "MODEL"))
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
                dry_run=dry_run,
                progress=step,
            )
    except (backend.BackendError, tuning.TableError) as error:
        _fail(str(error))
    command.show(report, _console(), dry_run=dry_run)
    if json is not None:
        write_json(json, report.as_dict())
        typer.echo(f"Written to {json}", err=True)
    raise typer.Exit(130 if report.stopped == "interrupted" else 1 if report.unsaved or report.failed else 0)


def _check_tunable(dry_run: bool) -> None:
    """End here where nothing can be tuned; a dry run goes on in a process with the interpreter on."""
    import torch

    from fastvr import backend

    if (missing := backend.triton_missing()) is not None:
        _fail(f"there is nothing to tune: {missing}")
    if dry_run:
        if not backend.interpreting():
            # kernels are made for the interpreter when they are decorated
            environment = os.environ | {"TRITON_INTERPRET": "1"}
            os.execve(sys.executable, [sys.executable, "-m", "fastvr", *sys.argv[1:]], environment)
        from fastvr.testing import interpreter

        interpreter.install()
        torch.set_num_threads(1)  # the interpreter is one thread of Python
    elif not torch.cuda.is_available():
        _fail(
            "PyTorch sees no GPU, so there is nothing to tune here (fastvr doctor says more; "
            "--dry-run goes through it all in Triton's interpreter)"
        )
    elif (reason := backend.unavailable(torch.device("cuda"))) is not None:
        _fail(f"there is nothing to tune: {reason}")


@app.command()
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
            metavar="FILE", help="Weights to begin with: timm's, torchvision's, a run's model.safetensors."
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
    NaN or another process is gone, 2 after a mistake, 130 after Ctrl-C.
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
        _fail(str(error))
    except (FloatingPointError, LostProcess) as error:
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


@app.command()
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
        _fail(str(error).replace("save_model: ", "").replace("load_model: ", ""))
    typer.echo(f"Written to {written}", err=True)


@app.command()
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
        _fail(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if batch < 1:
        _fail(f"--batch must be at least 1; got {batch}")
    try:
        found = module.verify(checkpoint, dtype=DTYPES[dtype], batch=batch, seed=seed, num_heads=num_heads)
    except (ValueError, OSError) as error:
        _fail(str(error))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in (f"{dtype}, {batch} images", "max error", "RMS error"):
        table.add_column(heading, justify="left" if heading.startswith(dtype) else "right")
    for name, report in ((found.library, found.theirs), ("fastvr", found.ours)):
        table.add_row(name, f"{report.max_error:.3g}", f"{report.rms_error:.3g}")
    table.add_row("allowed", f"{found.ours.max_bound:.3g}", f"{found.ours.rms_bound:.3g}")
    console = _console()
    # a path is not broken into lines
    title = Text(f"{checkpoint}: {type(found.model).__name__} in the layout of {found.layout}\n")
    console.print(title, soft_wrap=True)
    console.print(table)
    console.print(Text(f"\nAgainst float64: {found.ours.verdict}."))
    raise typer.Exit(0 if found.ours.passed else 1)


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What this machine has, which implementation of each op runs on it and why, and what would help."""
    from fastvr import doctor as module

    found = module.report()
    if json:
        typer.echo(json_module.dumps(found, indent=1))
    else:
        _show_doctor(found, _console())


def _show_doctor(found: dict[str, Any], console: Console) -> None:
    environment, gpu, cache = found["environment"], found["environment"]["gpu"], found["cache"]
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_row("fastvr", found["fastvr"])
    facts.add_row("Python", f"{environment['python']} on {environment['platform']}")
    built = f"CUDA {environment['cuda']}" if environment["cuda"] else None
    built = f"HIP {environment['hip']}" if environment["hip"] else built
    facts.add_row(
        "PyTorch", f"{environment['torch']}, built {f'for {built}' if built else 'without GPU support'}"
    )
    facts.add_row("Triton", environment["triton"] or "not installed")
    facts.add_row(
        "GPU",
        f"{gpu['name']}, {gpu['architecture']}, {gpu['memory'] / 2**30:.0f} GiB"
        if gpu
        else "none that PyTorch sees",
    )
    facts.add_row("CPU", f"{environment['cpu']}, {environment['threads']} threads")
    facts.add_row("interpreter", "on (TRITON_INTERPRET=1)" if found["interpreter"] else "off")
    facts.add_row("C compiler", found["compiler"] or "none found")
    onednn = found["onednn"]
    fused = f"for prepared models on the CPU, {', '.join(onednn['dtypes'])}: {', '.join(onednn['ops'])}"
    facts.add_row("oneDNN", onednn["missing"] or fused)
    facts.add_row("kernel cache", f"{cache['path']}, {'writable' if cache['writable'] else 'NOT WRITABLE'}")
    if gpu:
        for index, table in enumerate(found["tuning"]["tables"]):
            whose = "this GPU" if table["exact"] else f"same architecture: {table['gpu']}"
            told = Text(f"{table['path']}, {table['entries']} entries ({whose})")
            facts.add_row("" if index else "tuning tables", told)
        if not found["tuning"]["tables"]:
            facts.add_row("tuning tables", "none for this GPU or its architecture")
    else:
        facts.add_row("tuning tables", "not used without a GPU")
    installed = [f"{name} {version}" for name, version in found["packages"].items() if version]
    facts.add_row("also installed", ", ".join(installed) or "none of " + ", ".join(found["packages"]))
    variables = [f"{name}={value}" for name, value in found["variables"].items()]
    facts.add_row("variables", ", ".join(variables) or "none set")
    facts.add_row("mode", found["mode"])
    console.print(facts)
    console.print()
    ops = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    names = {"triton": "Triton", "pytorch": "PyTorch", "error": "ERROR"}
    reasons = {entry["why"] for entry in found["ops"]}
    for heading in ("op", "runs", "why")[: 2 if len(reasons) == 1 else 3]:
        ops.add_column(heading)
    for entry in found["ops"]:
        why = [Text(entry["why"])] if len(reasons) > 1 else []
        ops.add_row(entry["op"], names[entry["runs"]], *why)
    console.print(ops)
    if len(reasons) == 1:
        console.print(Text(f"\nEvery op, because {reasons.pop()}."))
    if found["advice"]:
        console.print()
    for line in found["advice"]:
        console.print(Text(f"- {line}"))
