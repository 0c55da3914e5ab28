"""The comparison's result as a person reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fastvr.compare import summary

Json = dict[str, Any]
_SMALL = {"vit": "small ViT", "resnet": "small ResNet"}


def show(result: Json, console: Console) -> None:
    """Print what there is of ``result``; phases that were not reached leave no rows."""
    console.print()
    console.print(_heading(result))
    table = _table(result)
    if table.row_count:
        console.print(table)
    for line in _footnotes(result):
        console.print(Padding(Text(line), (0, 0, 0, 2)))
    if result.get("interpreted", {}).get("models"):
        console.print()
        console.print(_kernels(result["interpreted"]))
    if "digits" in result and result["digits"].get("models"):
        console.print()
        console.print(_digits(result["digits"]))
    failures = list(_failures(result))
    for name, text in failures:
        console.print()
        console.print(Text(f"{name}: parity FAILED", style="bold red"))
        console.print(Text(text))
    if paragraph := summary.closing(result):
        console.print()
        console.print(Text(paragraph))
    if not result["complete"]:
        console.print()
        console.print(Text("Interrupted: this table is partial.", style="yellow"))


def _heading(result: Json) -> Text:
    environment, settings = result["environment"], result["settings"]
    gpu = environment["gpu"]
    where = gpu["name"] if gpu else f"{environment['cpu']}, {environment['threads']} threads, no GPU used"
    weights = {model.get("weights") for model in result["models"].values()} - {None}
    text = Text(f"fastvr {result['fastvr']} on {where}\n", style="bold")
    text.append(
        f"{settings['dtype']}, PyTorch {environment['torch']}, "
        f"Triton {environment['triton'] or 'not installed'}; "
        f"{settings['count']} photographs from {settings['photographs']}",
        style="not bold",
    )
    if "random" in weights:
        text.append("\nRandom weights: speed and parity do not depend on them.", style="not bold")
    return text


# --------------------------------------------------------------------------------------- the table


def _table(result: Json) -> Table:
    models = result["models"]
    columns = [
        (key, column, model)
        for key, model in models.items()
        for column in (model.get("speed") or dict.fromkeys(("eager", "fastvr")))
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column("", no_wrap=True)
    previous = ""
    for key, column, model in columns:
        title = model["title"] if key != previous else ""
        previous = key
        name = (model.get("speed") or {}).get(column, {}).get("name") or {"eager": "PyTorch"}.get(
            column, column
        )
        table.add_column(f"{title}\n{name}", justify="right", no_wrap=True)

    def row(label: str, cell: Callable[[str, Json], str]) -> None:
        cells = [cell(column, model) for _, column, model in columns]
        if any(cells):
            table.add_row(label, *cells)

    def once(value: Callable[[Json], str]) -> Callable[[str, Json], str]:
        return lambda column, model: value(model) if column == "eager" else ""

    row("parameters, M", once(lambda m: f"{m['parameters'] / 1e6:.1f}" if "parameters" in m else ""))
    row("GFLOP an image", once(lambda m: f"{m['flops'] / 1e9:.1f}" if "flops" in m else ""))
    row("launches a pass [1]", lambda c, m: _counted(c, m, lambda t, n: str(t["launches"])))
    row("MB moved an image [1]", lambda c, m: _counted(c, m, lambda t, n: f"{t['bytes'] / n / 1e6:.0f}"))
    row("latency, ms [2]", lambda c, m: _timed(c, m, 1, lambda t: summary.ms(t["p50"])))
    row(
        "  p20 - p80",
        lambda c, m: _timed(
            c, m, 1, lambda t: f"{summary.ms(t['p20'])} - {summary.ms(t['p80'])}", missing=""
        ),
    )
    for batch in result["settings"]["batches"]:
        row(f"images/s, batch {batch}", _throughput(batch))
    row("peak memory, MB", _memory)
    row("ran on", _ran)
    row("parity [3]", lambda c, m: _verdict(m["parity"]) if c == "fastvr" and "parity" in m else "")
    return table


def _counted(column: str, model: Json, text: Callable[[Json, int], str]) -> str:
    if "traffic" not in model or column not in ("eager", "fastvr"):
        return ""
    counted = model["traffic"][column]
    return text(counted, model["traffic"]["batch"]) if counted else "n/a"


def _timed(column: str, model: Json, batch: int, text: Callable[[Json], str], *, missing: str = "n/a") -> str:
    batches = model.get("speed", {}).get(column, {}).get("batches", {})
    if not batches:
        return missing if "speed" in model else ""
    if str(batch) not in batches:
        return ""
    timing = batches[str(batch)]
    return text(timing) if isinstance(timing, dict) else missing and str(timing)


def _throughput(batch: int) -> Callable[[str, Json], str]:
    return lambda column, model: _timed(column, model, batch, lambda timing: _rate(timing["images_per_s"]))


def _memory(column: str, model: Json) -> str:
    if "speed" not in model or column not in ("eager", "fastvr"):
        return ""
    size = model["speed"][column]["peak_memory"]
    return "n/a" if size is None else f"{size / 2**20:.0f}"


def _ran(column: str, model: Json) -> str:
    if "speed" not in model:
        return ""
    ran = model["speed"][column]["backend"]
    if ran is None:
        return "PyTorch" if column != "prepared" else ""
    names = {"triton": "Triton", "pytorch": "PyTorch"}
    return "\n".join(f"{names[by]}\n({count} ops)" for by, count in sorted(ran.items(), reverse=True))


def _rate(rate: float) -> str:
    return f"{rate:.1f}" if rate < 100 else f"{rate:,.0f}"


def _verdict(verdict: Json) -> str:
    return f"OK {verdict['ratio']:.0%}" if verdict["passed"] else "FAILED"


# -------------------------------------------------------------------------------- below the table


def _footnotes(result: Json) -> list[str]:
    models = list(result["models"].values())
    lines = []
    for skipped in result["settings"]["skipped"]:
        lines.append(f"skipped {skipped[0]}: {skipped[1]}")
    if counted := next((model["traffic"] for model in models if "traffic" in model), None):
        lines.append(
            f"[1] of a {counted['dtype']} pass over {counted['batch']} images on {counted['arch']}, "
            "every op on its Triton kernel; counted, not measured"
        )
    if any(model.get("speed") for model in models):
        lines.append("[2] batch 1, median; the columns are timed in turn")
    if any("parity" in model for model in models):
        lines.append(
            "[3] the largest share of the allowed error that is used: twice PyTorch's own, against float64"
        )
    if result["environment"]["gpu"] is None and any(model.get("speed") for model in models):
        lines.append(
            "No GPU: fastvr runs PyTorch here, so there is nothing for it to be faster than, and its parity "
            "above is PyTorch's. Peak memory is measured on a GPU only."
        )
    interpreted = result.get("interpreted", {})
    if "missing" in interpreted:
        lines.append(f"The Triton kernels were not run: {interpreted['missing']}.")
    if "error" in interpreted:
        lines.append(f"The Triton kernels FAILED to run in the interpreter: {interpreted['error']}")
    lines.extend(result["notes"])
    return lines


def _kernels(found: Json) -> Table:
    table = Table(
        title="The Triton kernels, run by Triton's interpreter on crops of the same photographs",
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    dtypes = list(next(iter(found["models"].values())))
    table.add_column("")
    for dtype in dtypes:
        table.add_column(f"parity [3], {dtype}", justify="right")
    table.add_column("kernels run", ratio=1)
    for kind, verdicts in found["models"].items():
        ran: dict[str, int] = next((v["ops"].get("triton", {}) for v in verdicts.values() if "ops" in v), {})
        kernels = ", ".join(f"{op} {times}" for op, times in ran.items())
        table.add_row(_SMALL.get(kind, kind), *(_verdict(verdicts[dtype]) for dtype in dtypes), kernels)
    return table


def _failures(result: Json) -> list[tuple[str, str]]:
    failures = [
        (model["title"], model["parity"]["failure"])
        for model in result["models"].values()
        if "parity" in model and not model["parity"]["passed"]
    ]
    for kind, verdicts in result.get("interpreted", {}).get("models", {}).items():
        failures += [
            (f"{_SMALL.get(kind, kind)}, interpreted, {dtype}", verdict["failure"])
            for dtype, verdict in verdicts.items()
            if not verdict["passed"]
        ]
    return failures


def _digits(digits: Json) -> Table:
    title = f"From scratch on handwritten digits: accuracy on {digits['test']} held-out ones"
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for heading in ("parameters", "labels", "accuracy", "epochs", "steps", "seconds"):
        table.add_column(heading, justify="right")
    for model in digits["models"].values():
        for part in ("all", "few"):
            if part in model:
                run = model[part]
                table.add_row(
                    model["title"],
                    f"{model['parameters']:,}",
                    f"{run['samples']:,}",
                    f"{run['accuracy']:.1%}",
                    f"{run['epochs']:.0f}",
                    f"{run['steps']:,}",
                    f"{run['seconds']:.0f}",
                )
    return table
