"""A training run from its arguments to its weights, in one process or in several, interrupted or not."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvr.compare import UsageError
from fastvr.compare.progress import Reporter, Step
from fastvr.reference.image import normalize
from fastvr.train import checkpoint, data, distributed, models, randomness, result
from fastvr.train.build import build
from fastvr.train.checkpoint import CURVE, LOSSES
from fastvr.train.distributed import World
from fastvr.train.loop import evaluate
from fastvr.train.optimize import set_lr, warm_up_cosine
from fastvr.train.record import Losses, Row, draw
from fastvr.train.settings import AMP, DIGITS, Settings, complete, resumed

_READ_EVERY = 10  # steps between readings of the loss: each waits for the GPU
_MIX = 102  # what a draw is for: part of its key


@dataclass(frozen=True)
class Result:
    """How a run ended; ``accuracy`` from 0 to 1 on the validation images."""

    steps: int
    epochs: int
    seconds: float  # of this process; a resumed run counts from the resumption
    loss: float
    accuracy: float
    parameters: int
    notes: tuple[str, ...]


def train(settings: Settings, reporter: Reporter | None = None) -> Result:
    """Train, and leave in ``settings.out`` the weights with their card, the losses, a curve and a checkpoint.

    Under ``torchrun`` every process calls this; the first one writes.

    Raises:
        UsageError: something that was asked for cannot be; one line says what.
        FloatingPointError: the loss or a weight is NaN or infinite; the last checkpoint stands.
        LostProcess: another process of the run is gone.
    """
    _check(settings)
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        with distributed.world(settings.device, settings.timeout) as world:
            reporter = reporter or Reporter()
            return _Run(settings, world, reporter if world.first else None).run()
    finally:
        torch.use_deterministic_algorithms(deterministic)


def _check(settings: Settings) -> None:
    if settings.workers is not None and settings.workers < 0:
        raise UsageError(f"--workers must be 0 or more; got {settings.workers}")
    if settings.save_every < 0:
        raise UsageError(f"--save-every must be 0 or more steps; got {settings.save_every}")
    if not 0 < settings.timeout < math.inf:
        raise UsageError(f"--timeout must be more than 0 seconds; got {settings.timeout}")
    out = settings.out
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is not a folder")
    if checkpoint.holds_run(out) and not settings.resume:
        raise UsageError(f"--out {out}: holds a run already; go on with it by --resume, or choose another")


class _Run:
    """Everything of a run that has a state, built and brought to where its last checkpoint was."""

    def __init__(self, settings: Settings, world: World, reporter: Reporter | None) -> None:
        self._settings, self._world, self._reporter = settings, world, reporter
        self._notes: list[str] = []
        found = checkpoint.read(settings.out) if settings.resume else None
        a = self._arguments = (
            complete(settings.given, world.device)
            if found is None
            else resumed(settings.given, found["arguments"])
        )
        if a.deterministic:
            # cuBLAS reads it when it is first used
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self._data = data.load(a, models.preprocessing(a.model, a.image_size))
        if found is not None and found["data"] != self._data.fingerprint:
            raise UsageError(f"--resume: --data {a.data} holds other images than the run was started with")
        self._batch_size = self._fitting_batch()
        workers = settings.workers
        if workers is None:
            workers = 0 if a.data == DIGITS else min(8, max((os.cpu_count() or 1) // world.size, 1))
        pin = world.device.type == "cuda"
        self._order = data.TrainBatches(self._data.sizes[0], self._batch_size, a.seed, world.rank, world.size)
        self._train = data.loader(self._data.train, self._order, workers, pin)
        own = data.ValBatches(self._data.sizes[1], self._batch_size // world.size, world.rank, world.size)
        self._val = data.loader(self._data.val, own, workers, pin)
        self._steps = a.epochs * self._order.batches
        self._mix = _mixup(a.mixup, len(self._data.classes))

        self._built = build(
            a,
            self._data,
            world,
            resuming=found is not None,
            grad_checkpointing=settings.grad_checkpointing,
        )
        self._parts = self._built.parts
        ema = self._parts.ema
        self._trained: nn.Module = self._parts.model if ema is None else ema.module
        self._check_last_map()
        self._notes += [self._built.note] if self._built.note else []
        self._step = 0
        if found is not None:
            self._step = found["step"]
            self._restore(found)
        self._prepare_folder(found)

    # ------------------------------------------------------------------------------------ building

    def _fitting_batch(self) -> int:
        """The batch size; a smaller one where there are fewer images."""
        size, world, images = self._arguments.batch_size, self._world.size, self._data.sizes[0]
        if size % world:
            raise UsageError(f"--batch-size is of all processes together: a multiple of {world}; got {size}")
        most = images // world * world
        if not most:
            raise UsageError(f"--data: {images} images to learn from are too few for {world} processes")
        if most < size:
            self._notes.append(f"batches of {most}: there are {images} images to learn from")
        return min(size, most)

    def _check_last_map(self) -> None:
        """As torch.nn refuses it, but before the first step: the variance of a single value."""
        one = self._batch_size // self._world.size == 1 and self._arguments.image_size <= 32
        if one and distributed.has_batch_norm(self._parts.model):
            raise UsageError(
                f"--batch-size: one image a process at --image-size {self._arguments.image_size} leaves "
                "BatchNorm a last map of 1x1, a single value a channel; take two images or more"
            )

    def _restore(self, found: dict[str, Any]) -> None:
        world, generators = self._world, found["rng"]
        checkpoint.restore(self._settings.out, found, self._parts)
        self._built.scaler.load_state_dict(found["scaler"])
        if len(generators) == world.size:
            randomness.restore(generators[world.rank], world.device)
        else:
            self._notes.append(
                f"{world.size} processes go on where {len(generators)} were: close to, but not bit for bit "
                "what they would have done"
            )

    def _prepare_folder(self, found: dict[str, Any] | None) -> None:
        out = self._settings.out
        # every process has looked for an earlier run before the first one writes
        self._world.barrier()
        self._losses = None
        if self._world.first:
            try:
                out.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=out):
                    pass
            except OSError as error:
                raise UsageError(f"--out {out}: is not writable: {error.strerror}") from None
            checkpoint.clear_unfinished(out)
            self._losses = Losses(out / LOSSES, self._step)
        if self._settings.resume and found is None:
            self._notes.append(f"no checkpoint in {out} yet: this is the beginning")

    # ------------------------------------------------------------------------------------- running

    def run(self) -> Result:
        a = self._arguments
        for note in self._notes:
            self._note(note)
        started = time.perf_counter()
        world = self._world
        where = f"{world.size} x {world.device.type}" if world.size > 1 else str(world.device)
        title = (
            f"{a.model} on {a.data}: {self._built.parameters:,} parameters, {self._data.sizes[0]:,} images"
        )
        self._line(
            f"{title} of {len(self._data.classes)} classes, {self._data.sizes[1]:,} to validate on; "
            f"{self._steps:,} steps of {self._batch_size} on {where}"
        )
        if self._step:
            self._line(f"resumed after step {self._step}")
        small = a.model in models.MINI
        with models.one_thread(self._world.device, small), self._progress() as progress:
            if self._step == 0:
                self._save()
            try:
                first = self._step // self._order.batches
                for epoch in range(first, a.epochs):
                    self._epoch(epoch, started, progress)
            finally:
                self._draw()
            if self._step and first == a.epochs:
                self._line("the run is complete already")
        self._write_weights()
        last = self._last()
        seconds = time.perf_counter() - started
        return Result(
            self._step,
            a.epochs,
            seconds,
            last.loss if last else math.nan,
            (last.val_accuracy or 0.0) if last else math.nan,
            self._built.parameters,
            tuple(self._notes),
        )

    def _epoch(self, epoch: int, started: float, progress: Step) -> None:
        a = self._arguments
        self._order.epoch, self._order.first = epoch, self._step - epoch * self._order.batches
        pending: list[tuple[float, Tensor]] = []
        self._built.forward.train()
        for batch in self._train:
            images, labels = self._on_device(batch)
            lr = a.lr * warm_up_cosine((self._step + 0.5) / self._steps, a.warmup / a.epochs)
            pending.append((lr, self._one_step(images, labels, lr)))
            self._step += 1
            ends = self._step == (epoch + 1) * self._order.batches
            due = bool(self._settings.save_every) and self._step % self._settings.save_every == 0
            if not ends and (due or len(pending) == _READ_EVERY):
                self._record(self._read(pending, epoch))
                pending = []
                if due:
                    self._save()
            progress(self._step / self._steps, f"step {self._step}/{self._steps}")
        rows = self._read(pending, epoch)
        evaluation = self._evaluate()
        rows[-1] = rows[-1]._replace(
            val_loss=evaluation[1] / self._data.sizes[1], val_accuracy=evaluation[0] / self._data.sizes[1]
        )
        self._record(rows)
        self._save()
        last = rows[-1]
        seconds = time.perf_counter() - started
        self._line(
            f"epoch {epoch + 1:>3}/{a.epochs}  step {last.step}/{self._steps}  lr {last.lr:.2e}  "
            f"loss {last.loss:.4f}  validation: loss {last.val_loss:.4f}, accuracy {last.val_accuracy:.2%}  "
            f"{seconds:.0f} s"
        )

    def _on_device(self, batch: Any) -> tuple[Tensor, Tensor]:
        if isinstance(batch, data.Unreadable):
            raise UsageError(f"--data: {batch}")
        images, labels = batch
        device = self._world.device
        images = images.to(device, non_blocking=True, memory_format=self._built.layout)
        return images, labels.to(device, non_blocking=True)

    def _one_step(self, images: Tensor, labels: Tensor, lr: float) -> Tensor:
        """The loss before the step that this takes."""
        a, optimizer = self._arguments, self._parts.optimizer
        if self._mix is not None:
            moments = self._built.moments(images, torch.float32)
            images = normalize(images, *moments, torch.float32)
            with randomness.drawing_from(a.seed, _MIX, self._step):
                images, labels = self._mix(images, labels)
        set_lr(optimizer, lr)
        with torch.autocast(self._world.device.type, AMP[a.amp], enabled=AMP[a.amp] is not None):
            loss = F.cross_entropy(self._built.forward(images), labels, label_smoothing=a.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        self._built.scaler.scale(loss).backward()
        if a.clip_grad:
            self._built.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self._parts.model.parameters(), a.clip_grad)
        self._built.scaler.step(optimizer)
        self._built.scaler.update()
        if self._parts.ema is not None:
            self._parts.ema.update_parameters(self._parts.model)
        return loss.detach()

    def _read(self, pending: list[tuple[float, Tensor]], epoch: int) -> list[Row]:
        """The rows of the last steps, their losses means over all processes.

        Raises:
            FloatingPointError: one is NaN or infinite.
        """
        losses = torch.stack([loss.float() for _, loss in pending])
        values = (self._world.total(losses) / self._world.size).tolist()
        before = self._step - len(pending)
        rows: list[Row] = []
        for number, ((lr, _), loss) in enumerate(zip(pending, values, strict=True), before + 1):
            if not math.isfinite(loss):
                self._record(rows)
                raise FloatingPointError(self._stopped(f"the loss is {loss} at step {number}"))
            rows.append(Row(number, epoch + 1, lr, loss))
        return rows

    def _stopped(self, why: str) -> str:
        kept = checkpoint.read(self._settings.out) if self._world.first else None
        where = f"; the checkpoint of step {kept['step']} is kept" if kept else ""
        return f"{why} (epoch {(self._step - 1) // self._order.batches + 1}){where}"

    def _evaluate(self) -> list[float]:
        """(hits, summed loss) over all validation images."""
        a = self._arguments
        with torch.autocast(self._world.device.type, AMP[a.amp], enabled=AMP[a.amp] is not None):
            found = evaluate(self._trained, (self._on_device(batch) for batch in self._val))
        both = torch.tensor([found.hits, found.loss], dtype=torch.float64, device=self._world.device)
        return [float(v) for v in self._world.total(both)]

    # ------------------------------------------------------------------------------------- writing

    def _record(self, rows: list[Row]) -> None:
        if self._losses is not None:
            self._losses.add(rows)

    def _last(self) -> Row | None:
        return self._losses.rows[-1] if self._losses and self._losses.rows else None

    def _save(self) -> None:
        """Write a checkpoint; a broken model replaces none.

        Raises:
            FloatingPointError: a weight is NaN or infinite.
        """
        broken = torch.tensor(float(self._parts.broken()), device=self._world.device)
        if float(self._world.total(broken)):
            raise FloatingPointError(self._stopped(f"a weight is NaN or infinite after step {self._step}"))
        if self._losses is not None:
            self._losses.sync()
        rest = {
            "arguments": dataclasses.asdict(self._arguments),
            "data": self._data.fingerprint,
            "scaler": self._built.scaler.state_dict(),
            "rng": self._world.gather(randomness.states(self._world.device)),
        }
        sharded = self._arguments.fsdp
        checkpoint.save(self._settings.out, self._step, self._parts, rest, self._world, sharded=sharded)

    def _write_weights(self) -> None:
        a = self._arguments
        state = checkpoint.weights(self._trained, sharded=a.fsdp)
        if self._world.first:
            last = self._last()
            result.save(self._settings.out, state, a, self._data, last.val_accuracy if last else None)

    def _draw(self) -> None:
        if self._losses is not None and self._losses.rows:
            a = self._arguments
            why_not = draw(self._losses.rows, self._settings.out / CURVE, f"{a.model} on {a.data}")
            if why_not is not None:
                self._note(why_not)

    def _line(self, text: str) -> None:
        if self._reporter is not None:
            self._reporter.line(text)

    def _note(self, text: str) -> None:
        if self._reporter is not None:
            self._reporter.note(text)

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Step]:
        if self._reporter is None:
            yield lambda done, text="": None
            return
        with self._reporter.phase(f"Training {self._arguments.model}") as step:
            yield step


def _mixup(alpha: float, classes: int) -> Any:
    """torchvision's MixUp (Zhang et al., 2018), or None where ``alpha`` is 0."""
    if not alpha:
        return None
    try:
        from torchvision.transforms import v2
    except ImportError:
        raise UsageError("--mixup is torchvision's: pip install 'fastvr[train]'") from None
    return v2.MixUp(alpha=alpha, num_classes=classes)
