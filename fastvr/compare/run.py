"""The comparison, phase by phase. Everything found goes into one JSON-ready dict as it is found.

``--json`` writes it; ``complete`` is false where the run was cut short, and what it did not reach is absent::

    {"schema": 1, "complete": true, "fastvr": version, "notes": [text],
     "environment": {"python", "torch", "triton", "device", "cpu", "gpu", "threads", ...},
     "settings": {"dtype", "batches", "seed", "train_seconds", "photographs", "skipped": [[file, why]]},
     "models": {"vit_b_16": {
         "title", "weights": "random" | path, "parameters", "flops": of one image,
         "traffic": {"batch", "dtype", "arch", "eager": {"launches", "bytes"}, "fastvr": same | null},
         "parity": {"passed", "verdict", "ratio", "max_error", "max_bound", "rms_error", "rms_bound",
                    "images", "dtype", "ops": {"triton" | "pytorch": {op: calls}}, "failure"?},
         "speed": {column: {"name", "backend": {"triton": ops, "pytorch": ops} | null,
                            "batches": {"1": {"p20", "p50", "p80": ms, "rounds", "images_per_s"} | why not},
                            "peak_memory": bytes | null}}}, "resnet50": same},
     "interpreted": see fastvr.compare.interpreted,
     "digits": see fastvr.compare.digits}

Columns are "eager", "fastvr", on a GPU "prepared", and with ``--compile`` "compile".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastvr
from fastvr import backend, doctor
from fastvr.compare import digits, interpreted, measure, parity, photos, traffic
from fastvr.compare.models import FAMILIES, Family, InPyTorch, build, by_family, eager
from fastvr.compare.progress import Reporter, Step
from fastvr.compare.settings import DTYPES, Settings, check_writable, device_for, write_json
from fastvr.models.preprocessing import Preprocessing
from fastvr.models.resnet import ResNet
from fastvr.models.vit import ViT
from fastvr.tuner.calls import meta_copy

SECONDS = {"cpu": (10.0, 3.0), "cuda": (3.0, 1.0)}  # of timing a model and batch size; in a quick run
_TRAFFIC_BATCH = 64


class Comparison:
    """One run; ``result`` holds what is known so far."""

    def __init__(
        self, settings: Settings, *, families: Sequence[Family] = FAMILIES, reporter: Reporter | None = None
    ) -> None:
        self._settings = settings
        self._families = families
        self._reporter = reporter or Reporter()
        self._device = device_for(settings.device)
        gpu = self._device.type == "cuda"
        self._dtype = DTYPES[settings.dtype or ("bfloat16" if gpu else "float32")]
        chosen = settings.batches or ((1, 8, 64, 256) if gpu else (1, 8))
        self._batches = sorted({1, *chosen})  # latency is that of one image
        if settings.quick and settings.batches is None:
            self._batches = [1, 64] if gpu else [1, 4]
        check_writable(settings.json)
        self._weights = by_family(settings.weights, families)
        self._photographs = photos.load(settings.images)
        self._models: dict[str, ViT | ResNet] = {}
        self._eager: dict[str, tuple[nn.Module, str]] = {}
        self.result: dict[str, Any] = {
            "schema": 1,
            "complete": False,
            "fastvr": fastvr.__version__,
            "notes": [],
            "environment": doctor.environment(self._device),
            "settings": {
                "dtype": str(self._dtype).removeprefix("torch."),
                "batches": self._batches,
                "seed": settings.seed,
                "train_seconds": settings.train_seconds,
                "photographs": self._photographs.source,
                "count": len(self._photographs.images),
                "skipped": [list(entry) for entry in self._photographs.skipped],
            },
            "models": {family.key: {"title": family.title} for family in families},
        }

    def run(self) -> None:
        """All phases; ``result["complete"]`` at the end. What an interruption leaves is in ``result``, and in
        the JSON file where one was asked for."""
        for name, why in self._photographs.skipped:
            self._reporter.note(f"skipped {name}: {why}")
        phases: list[tuple[str, Callable[[Step], None]]] = [
            ("Building the models", self._build),
            ("Counting launches and traffic", self._count),
            ("Checking the numbers", self._check),
            ("Measuring the speed", self._time),
        ]
        if self._device.type == "cpu":
            phases.append(("Running the Triton kernels", self._interpret))
        if self._settings.train_seconds > 0:
            phases.append(("Learning handwritten digits", self._learn))
        try:
            for number, (title, phase) in enumerate(phases, 1):
                self._write()
                with self._reporter.phase(f"{number}/{len(phases)} {title}") as step:
                    phase(step)
            self.result["complete"] = True
        finally:
            self._write()

    def _write(self) -> None:
        if self._settings.json is not None:
            write_json(self._settings.json, self.result)

    @property
    def passed(self) -> bool:
        """Whether every parity verdict that was reached is good."""
        verdicts = [model["parity"] for model in self.result["models"].values() if "parity" in model]
        for kind in self.result.get("interpreted", {}).get("models", {}).values():
            verdicts.extend(kind.values())
        return all(verdict["passed"] for verdict in verdicts) and "error" not in self.result.get(
            "interpreted", {}
        )

    def _how(self, family: Family) -> Preprocessing:
        """How photographs are prepared: as the weights say, else as the family's usual ones want it."""
        return self._models[family.key].preprocessing or family.preprocessing

    def _build(self, step: Step) -> None:
        for done, family in enumerate(self._families):
            weights = self._weights.get(family.key)
            step(done / len(self._families), family.title)
            sample = self._photographs.batch(8, family.preprocessing, seed=self._settings.seed)
            model = build(family, weights, sample, seed=self._settings.seed)
            model = model.to(self._device, self._dtype)
            self._models[family.key] = model
            self._eager[family.key] = eager(family, model)
            self.result["models"][family.key] |= {
                "weights": "random" if weights is None else str(weights),
                "parameters": sum(p.numel() for p in model.parameters()),
            }

    def _count(self, step: Step) -> None:
        gpu = self._device.type == "cuda"
        arch = backend.architecture(self._device) if gpu else "sm_90"
        dtype = self._dtype if gpu else torch.bfloat16
        for done, family in enumerate(self._families):
            step(done / len(self._families), family.title)
            how = self._how(family)
            images = torch.empty(_TRAFFIC_BATCH, 3, how.size, how.size, dtype=dtype, device="meta")
            images = images.contiguous(memory_format=family.memory_format)
            model = meta_copy(self._models[family.key]).to(dtype)
            peer = meta_copy(self._eager[family.key][0]).to(dtype)
            plain = traffic.eager_traffic(peer, images)
            try:
                fused = traffic.count(model, images, arch=arch)
            except backend.BackendError as error:
                fused = None
                self.result["notes"].append(f"{family.title}: launches not counted: {error}")
            self.result["models"][family.key] |= {
                "flops": traffic.flops(peer, images[:1]),
                "traffic": {
                    "batch": _TRAFFIC_BATCH,
                    "dtype": str(dtype).removeprefix("torch."),
                    "arch": arch,
                    "eager": {"launches": plain.launches, "bytes": plain.bytes},
                    "fastvr": fused and {"launches": fused.launches, "bytes": fused.bytes},
                },
            }

    def _check(self, step: Step) -> None:
        mode = "triton" if self._device.type == "cuda" else "auto"
        for done, family in enumerate(self._families):
            step(done / len(self._families), family.title)
            x = self._photographs.batch(4, self._how(family), seed=self._settings.seed)
            x = family.input(x, self._device, self._dtype)
            model, (peer, _) = self._models[family.key], self._eager[family.key]
            self.result["models"][family.key]["parity"] = parity.verdict(model, peer, x, mode=mode)

    def _time(self, step: Step) -> None:
        each = SECONDS[self._device.type][self._settings.quick]
        cells = len(self._families) * len(self._batches)
        for row, family in enumerate(self._families):
            images = self._photographs.batch(self._batches[-1], self._how(family), seed=self._settings.seed)
            images = family.input(images, self._device, self._dtype)
            speed = self.result["models"][family.key]["speed"] = self._columns(family, images[:1])
            for column, batch in enumerate(self._batches):
                step((row * len(self._batches) + column) / cells, f"{family.title}, batch {batch}")
                calls = self._calls(family, list(speed), images[:batch])
                with torch.no_grad():
                    timings = measure.interleaved(calls, self._device, seconds=each)
                for name, timing in timings.items():
                    speed[name]["batches"][str(batch)] = (
                        timing
                        if isinstance(timing, str)
                        else timing.json() | {"images_per_s": 1e3 * batch / timing.p50}
                    )
                if batch == self._batches[-1]:
                    self._peaks(family, speed, calls)

    def _columns(self, family: Family, one: Tensor) -> dict[str, Any]:
        names = {"eager": self._eager[family.key][1], "fastvr": "fastvr"}
        if self._device.type == "cuda":
            names["prepared"] = "prepared"
        if self._settings.compile:
            names["compile"] = "compiled"
        columns: dict[str, Any] = {
            key: {"name": name, "backend": None, "batches": {}, "peak_memory": None}
            for key, name in names.items()
        }
        with backend.observe() as ran, torch.no_grad():
            self._models[family.key](one)
        columns["fastvr"]["backend"] = {by: sum(ops.values()) for by, ops in parity.ops(ran).items()}
        return columns

    def _calls(self, family: Family, columns: Sequence[str], x: Tensor) -> dict[str, measure.Call]:
        model, (peer, _) = self._models[family.key], self._eager[family.key]
        calls: dict[str, measure.Call] = {"eager": lambda: peer(x), "fastvr": lambda: model(x)}
        if "prepared" in columns:
            prepared = fastvr.prepare(model, x)
            calls["prepared"] = lambda: prepared(x)
        if "compile" in columns and (compiled := self._compiled(family, peer, x)) is not None:
            calls["compile"] = compiled
        return calls

    def _compiled(self, family: Family, peer: nn.Module, x: Tensor) -> measure.Call | None:
        inner = peer.model if isinstance(peer, InPyTorch) else peer
        torch._dynamo.reset()
        mode = "max-autotune" if self._device.type == "cuda" else "default"
        compiled = torch.compile(inner, mode=mode, dynamic=False)

        def call() -> Any:
            with backend.use_backend("reference"):
                return compiled(x)

        try:
            with torch.no_grad():
                call()
        except Exception as error:  # no compiler on this machine, most often; the other columns stand
            note = f"{family.title}: torch.compile failed: {str(error).strip().splitlines()[0][:200]}"
            if note not in self.result["notes"]:
                self.result["notes"].append(note)
            return None
        return call

    def _peaks(self, family: Family, speed: dict[str, Any], calls: dict[str, measure.Call]) -> None:
        weights = sum(p.numel() * p.element_size() for p in self._models[family.key].parameters())
        for name in ("eager", "fastvr"):
            if isinstance(speed[name]["batches"][str(self._batches[-1])], dict):
                with torch.no_grad():
                    speed[name]["peak_memory"] = measure.peak_memory(calls[name], weights, self._device)

    def _interpret(self, step: Step) -> None:
        how = Preprocessing(interpreted.SIZE, interpreted.SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        crops = self._photographs.batch(2, how, seed=self._settings.seed)
        # how long it takes is not known; the bar creeps
        self.result["interpreted"] = interpreted.run(
            crops, tick=lambda seconds: step(1 - 2 ** (-seconds / 20), "in Triton's interpreter")
        )

    def _learn(self, step: Step) -> None:
        found: dict[str, Any] = {}
        self.result["digits"] = found
        try:
            digits.compare(
                seconds=self._settings.train_seconds,
                device=self._device,
                seed=self._settings.seed,
                found=found,
                step=step,
            )
        except ImportError:
            del self.result["digits"]
            self.result["notes"].append("no digits: they come with scikit-learn: pip install 'fastvr[data]'")
