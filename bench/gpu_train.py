"""Training of both models on a GPU: the gradient of every parameter by the parity rule, and steps a second.

A step is what people run: forward, cross-entropy, backward, fused optimizer, bfloat16 by autocast. The
columns are taken in turn in one process; a wrong gradient has no speed.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import cases
import models
import record
import timing
import torch
import torch.nn.functional as F
from session import Session, describe
from torch import Tensor, nn

from fastvr import backend
from fastvr.testing import ParityReport, guarded, measure_parity, truth_model
from fastvr.train.optimize import decay_groups

# precision: (dtype of the parameters, whether autocast makes it bfloat16)
PRECISIONS = {"bfloat16": (torch.bfloat16, False), "autocast": (torch.float32, True)}
# of the default column on an H200 at batch 256: times the images a second of a peer, and images a second
GOALS: dict[str, dict[str, float]] = {
    "vit_b_16": {"eager": 1.3, "compile": 1.1, "images/s": 3300.0},
    "resnet50": {"eager": 1.5, "compile": 1.2, "images/s": 5000.0},
}
BATCH, BATCH_SMALL = 256, 2
_COMPILE_SECONDS = 120.0  # forward and backward with max-autotune; without them it is not begun
_GATE_BATCH, _GATE_BATCH_SMALL = 16, 4
_LR = 1e-4


def loss(model: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, *, autocast: bool) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        logits = model(x)
        # 16 bits are not enough for a softmax over a thousand classes; the truth's float64 stays
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target)


def gradients(
    model: nn.Module, x: Tensor, target: Tensor, *, mode: str, autocast: bool = False
) -> dict[str, Tensor | None]:
    """The loss's gradient of every parameter, in train mode, under the backend ``mode``."""
    with torch.enable_grad(), backend.use_backend(mode):
        model.train().zero_grad()
        loss(model, x, target, autocast=autocast).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def batch_of(pair: models.Pair, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(size)
    labels = torch.randint(pair.ours.num_classes, (size,), generator=generator)
    return pair.example(size, dtype, device), labels.to(device)


@dataclasses.dataclass(frozen=True)
class Gate:
    """PyTorch's own gradients of one batch, and the true ones."""

    pair: models.Pair
    x: Tensor
    target: Tensor
    autocast: bool
    eager: dict[str, Tensor | None]
    truth: dict[str, Tensor | None]

    @staticmethod
    def of(name: str, precision: str, session: Session) -> Gate:
        dtype, autocast = PRECISIONS[precision]
        pair = models.build(name, dtype, session.device, small=session.small, train=True)
        size = _GATE_BATCH_SMALL if session.small else _GATE_BATCH
        x, target = batch_of(pair, size, dtype, session.device)
        exact = truth_model(pair.eager)
        return Gate(
            pair,
            x,
            target,
            autocast,
            gradients(pair.eager, x, target, mode="reference", autocast=autocast),
            gradients(exact, x.double(), target, mode="reference"),
        )

    def report(self, mode: str, name: str) -> tuple[ParityReport, dict[str, int]]:
        """How our model's gradients come out under ``mode``, and what ran."""
        with guarded(), backend.observe() as ran:
            actual = gradients(self.pair.ours, self.x, self.target, mode=mode, autocast=self.autocast)
        report = measure_parity(actual, self.eager, self.truth, kind="gradient", sample_dim=None, name=name)
        return report, {f"{op}: {implementation}": n for (op, implementation), n in ran.items()}


def parity(name: str, precision: str, session: Session) -> dict[str, Any]:
    """One training step of ``name`` with every kernel forced, which raises where an op has none."""
    gate = Gate.of(name, precision, session)
    report, ran = gate.report("triton", f"{name} training")
    if not any(key.endswith(": triton") for key in ran):
        raise AssertionError(f"{name}: no kernel ran: {ran}")
    return {"baseline": gate.pair.baseline, "fastvr": report, "ran": ran}


def stepping(
    name: str, model: nn.Module, x: Tensor, target: Tensor, *, mode: str, compiled: bool = False
) -> Callable[[], Tensor]:
    """A training step of a copy of ``model``, under autocast and the backend ``mode``; it gives the loss."""
    model = copy.deepcopy(model).train()
    groups = decay_groups(model, 0.05)
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(groups, lr=_LR, momentum=0.9, nesterov=True, fused=True)
        if name == "resnet50"
        else torch.optim.AdamW(groups, lr=_LR, fused=True)
    )
    forward: Callable[[Tensor], Tensor] = model
    if compiled and x.device.type == "cuda":
        forward = torch.compile(model, mode="max-autotune-no-cudagraphs", dynamic=False)
    elif compiled:
        # without Inductor's C++: to find mistakes in Python
        forward = torch.compile(model, backend="aot_eager", dynamic=False)

    def step() -> Tensor:
        with torch.enable_grad(), backend.use_backend(mode):
            value = loss(forward, x, target, autocast=True)
            value.backward()
            optimizer.step()
        # at the end, so that a step's peak includes its gradients
        optimizer.zero_grad()
        return value.detach()

    return step


def warm_up(step: Callable[[], Tensor], device: torch.device) -> dict[str, float]:
    """Run ``step``, and say what it allocates at its peak beside weights and optimizer state, in GiB.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    step()  # compiles, and makes the optimizer's state
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    value = step()
    if not value.isfinite():
        raise FloatingPointError(f"the loss is {float(value)}")
    # the allocator counts as the host asks, so that nothing is waited for
    return {"step_gib": round((torch.cuda.max_memory_allocated(device) - before) / 2**30, 3)} if gpu else {}


def _row(name: str, batch: int, session: Session, *, compiling: bool) -> dict[str, Any]:
    gate = Gate.of(name, "autocast", session)
    pair, device = gate.pair, session.device
    x, target = batch_of(pair, batch, torch.float32, device)
    columns = {"eager": "reference", "fastvr": "auto"}
    if device.type == "cuda":
        columns["fastvr, triton forced"] = "triton"
    if compiling:
        torch.compiler.reset()
        columns["compile"] = "reference"
    row: dict[str, Any] = {"baseline": {"eager": pair.baseline}}
    good: dict[str, Callable[[], Tensor]] = {}
    for column, mode in columns.items():
        row[column] = {}
        ours = column.startswith("fastvr")
        try:
            if ours:
                report, row[column]["ran"] = gate.report(mode, f"{name} {column}")
                row[column]["parity"] = report.verdict
                if not report.passed:
                    continue
            model = pair.ours if ours else pair.eager
            step = stepping(name, model, x, target, mode=mode, compiled=column == "compile")
            row[column] |= warm_up(step, device)
        except Exception as error:
            row[column]["error"] = describe(error)
            continue
        good[column] = step
    for column, times in timing.interleaved(good, device, rep_ms=3 if session.small else 1000).items():
        speed = round(batch / times.p50 * 1e3, 1)
        row[column] |= {"latency_ms": times.as_dict(), "ms": times.p50, "images_per_s": speed}
    if "H200" in record.gpu_name(device) and batch == BATCH:
        row["goals"] = verdicts(name, row)
    return row


def verdicts(name: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Each of ``name``'s goals that the row's default column can be held to."""
    ours = row.get("fastvr", {}).get("images_per_s")
    if ours is None:
        return []
    found = []
    for against, limit in GOALS[name].items():
        peer = 1.0 if against == "images/s" else row.get(against, {}).get("images_per_s")
        if peer is not None:
            value = ours / peer
            found.append({"against": against, "value": value, "limit": limit, "holds": value >= limit})
    return found


def bench(session: Session, content: dict[str, Any], save: Callable[[], None], *, compiling: bool) -> bool:
    """A row a model into ``content["training"]``; False where the budget ended it."""
    batch = BATCH_SMALL if session.small else BATCH
    for name in cases.MODELS:
        if session.left() <= (_COMPILE_SECONDS if compiling and not session.small else 0):
            return False
        label = f"{name} training b{batch}"
        try:
            row = _row(name, batch, session, compiling=compiling)
        except Exception as error:
            session.say(f"bench FAILED {label}: {describe(error)}")
            # what an earlier round has measured stays
            content["training"].setdefault(label, {"fastvr": {"error": describe(error)}})
            save()
            continue
        content["training"][label] = row
        save()
        speeds = (f"{c} {v['images_per_s']:g}/s" for c, v in row.items() if "images_per_s" in v)
        session.say(f"bench {label}: " + ", ".join(speeds))
    return True
