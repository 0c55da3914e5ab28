"""Training runs of a small model in processes of their own, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastvr.train import checkpoint, distributed, models, record, run
from fastvr.train.settings import Settings

_PRELOADED = ["fastvr.train.run", "torchvision.transforms.v2", "torchvision.datasets", "torch._dynamo"]
GIVEN: dict[str, Any] = {
    "model": "vit_mini",
    "image_size": 16,
    "epochs": 2,
    "batch_size": 8,
    "val_share": 0.2,
}


def make_folder(root: Path, *, classes: int, images: int) -> Path:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for label in range(classes):
        own = root / f"class{label}"
        own.mkdir(parents=True)
        for number in range(images):
            pixels = torch.randint(0, 128, (16, 16, 3), generator=generator) + 40 * label // (classes - 1)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(own / f"{number}.png")
    return root


def log(out: Path) -> str:
    """What the processes of the run in ``out`` printed."""
    return out.with_suffix(".log").read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    out: Path,
    *,
    given: dict[str, Any],
    kill: tuple[str, int] | None = None,
    rank: tuple[int, int, int] | None = None,
    dropout: float = 0.0,
    **settings: Any,
) -> BaseProcess:
    """A run of ``Settings(out, GIVEN | given, device="cpu", **settings)``.

    ``kill``: (moment, n): the process kills itself at the nth "step", or nth checkpoint: in the middle of
    its "write", before or after it "replace"s the last one, or in the middle of the nth "row"s of the CSV.
    ``rank``: (rank, processes, port).
    """
    context = multiprocessing.get_context("forkserver")
    # once, not in every job; the optimizers import the compiler
    context.set_forkserver_preload(_PRELOADED)
    asked = Settings(out, GIVEN | given, device="cpu", **settings)
    job = context.Process(target=_run, args=(asked, kill, rank, dropout))
    job.start()
    return job


def _run(
    settings: Settings,
    kill: tuple[str, int] | None,
    rank: tuple[int, int, int] | None,
    dropout: float,
) -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = settings.out.with_suffix(".log").open("a", buffering=1)
    if rank is not None:
        names = ("RANK", "WORLD_SIZE", "MASTER_PORT")
        os.environ |= dict(zip(names, map(str, rank), strict=True), MASTER_ADDR="127.0.0.1")
    create = models.create

    def dropping(*args: Any, **named: Any) -> Any:
        model = create(*args, **named)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        return model

    models.create = dropping
    run.draw = lambda *args: None  # importing matplotlib takes longer than all else
    if kill is not None:
        _arm(*kill)
    try:
        run.train(settings)
    except distributed.LostProcess as error:
        print(error, file=sys.stderr)
        raise SystemExit(3) from None


def _die(*_: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def _arm(moment: str, n: int) -> None:
    """Have this process killed at the nth ``moment``."""
    left = n

    def due() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    if moment == "step":
        step = run._Run._one_step
        run._Run._one_step = lambda *args: _die() if due() else step(*args)  # type: ignore[method-assign]
    elif moment == "write":
        save = torch.save

        def half(content: Any, file: Any) -> None:
            if due():
                file.write(pickle.dumps(sorted(content)))
                file.flush()
                _die()
            save(content, file)

        torch.save = half
    elif moment in ("replace", "replaced"):
        replace = os.replace

        def replacing(source: Any, target: Any) -> None:
            now = Path(target).name == checkpoint._FILE and due()
            if now and moment == "replace":
                _die()
            replace(source, target)
            if now:
                _die()

        os.replace = replacing
    elif moment == "row":
        add = record.Losses.add

        def torn(self: record.Losses, rows: Any) -> None:
            add(self, rows)
            if due():
                with self._path.open("r+b") as file:
                    file.truncate(self._path.stat().st_size - 9)
                _die()

        record.Losses.add = torn  # type: ignore[method-assign]
    else:
        raise ValueError(moment)
