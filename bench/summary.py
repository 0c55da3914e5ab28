"""The short table at the end of a GPU run, from the files it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_COLUMNS = ("eager", "compile", "fastvr", "fastvr, triton forced", "prepared", "prepared, triton forced")
_FAILURES = 8


def _load(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content


def _state(content: dict[str, Any]) -> str:
    return "complete" if content.get("complete") else "cut short"


def _parity(content: dict[str, Any]) -> list[str]:
    failures = content["failures"]
    lines = [
        f"parity ({_state(content)}): {content['passed']} of {content['planned']} op cases and "
        f"{len(content['models'])} models checked, {len(failures)} failures"
    ]
    for failure in failures[:_FAILURES]:
        lines.append(f"  FAILED {failure['job']}: {failure['error'].splitlines()[0][:120]}")
    return lines


def _best(content: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """op -> key -> mode -> its fastest measurement."""
    best: dict[str, dict[str, dict[str, Any]]] = {}
    for row in content["measured"]:
        modes = best.setdefault(row["key"].split("|")[0], {}).setdefault(row["key"], {})
        if row["mode"] not in modes or row["p50"] < modes[row["mode"]]["p50"]:
            modes[row["mode"]] = row
    return best


def _tune(content: dict[str, Any]) -> list[str]:
    lines = [f"tune ({_state(content)}): {len(content['failures'])} candidates failed"]
    lines.append(f"  {'op':18}{'shapes':>7}{'triton wins':>13}{'median ratio':>14}{'worst roofline':>16}  at")
    for op, keys in _best(content).items():
        pairs = [(m["triton"], m["reference"]) for m in keys.values() if len(m) == 2]
        if not pairs:
            continue
        ratios = sorted(reference["p50"] / triton["p50"] for triton, reference in pairs)
        fastest = [min(pair, key=lambda row: row["p50"]) for pair in pairs]
        worst = min(fastest, key=lambda row: row["roofline"])
        lines.append(
            f"  {op:18}{len(pairs):>7}{sum(r > 1 for r in ratios):>13}{ratios[len(ratios) // 2]:>13.2f}x"
            f"{worst['roofline']:>15.1%}  {worst['case']} {worst['dtype']}"
        )
    return lines


def _bench(content: dict[str, Any]) -> list[str]:
    peak = content["peaks"].get("bfloat16")
    lines = [
        f"bench ({_state(content)})"
        + (f": peaks {peak['tflops']:.0f} TFLOP/s, {peak['gbs']:.0f} GB/s" if peak else "")
    ]
    for name, row in content["models"].items():
        lines.append(f"  {name}")
        for column in _COLUMNS:
            found = row.get(column)
            if found is None:
                continue
            if "ms" not in found:
                lines.append(f"    {column:26}{found.get('error', found.get('parity', ''))[:80]}")
                continue
            roofline = f"{found['roofline']:>8.1%}" if "roofline" in found else ""
            latency = found["latency_ms"]["p50"]
            lines.append(
                f"    {column:26}{latency:>10.3f} ms{found['images_per_s']:>12.1f} images/s{roofline}"
            )
    return lines


def table(out: Path, seconds: float) -> str:
    """What the run's files say, in a screenful."""
    parity, tune, bench = (_load(out / f"{step}.json") for step in ("parity", "tune", "bench"))
    header = next((content for content in (bench, tune, parity) if content), {})
    lines = [""]
    if header:
        versions = header["versions"]
        lines = [
            "",
            f"{header['gpu']}, torch {versions['torch']}, triton {versions['triton']}, "
            f"commit {header['commit'][:12]}, sources {header['sources']}",
        ]
        if header["gpu"] == "cpu":
            lines.append("no GPU: small shapes in the interpreter; the times say nothing")
    for content, lines_of in ((parity, _parity), (tune, _tune), (bench, _bench)):
        if content:
            lines += lines_of(content)
    return "\n".join([*lines, f"{seconds:.0f} s in all; files in {out}"])
