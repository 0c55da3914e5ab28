"""``fastvr doctor``."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastvr.cli.common import make_console


def doctor(
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What this machine has, which implementation of each op runs on it and why, and what would help."""
    from fastvr import doctor as module

    found = module.report()
    if json:
        typer.echo(json_module.dumps(found, indent=1))
    else:
        show(found, make_console())


def show(found: dict[str, Any], console: Console) -> None:
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
