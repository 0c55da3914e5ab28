"""The short table at the end of a GPU run, from the files it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_COLUMNS = ("eager", "compile", "fastvr", "fastvr, triton forced", "prepared", "prepared, triton forced")
_FAILURES = 8
_SLOWEST = 12


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
    lines.append(f"  {'op':24}{'shapes':>7}{'triton wins':>13}{'median ratio':>14}{'worst roofline':>16}  at")
    for op, keys in _best(content).items():
        pairs = [(m["triton"], m["reference"]) for m in keys.values() if len(m) == 2]
        if not pairs:
            continue
        ratios = sorted(reference["p50"] / triton["p50"] for triton, reference in pairs)
        fastest = [min(pair, key=lambda row: row["p50"]) for pair in pairs]
        worst = min(fastest, key=lambda row: row["roofline"])
        lines.append(
            f"  {op:24}{len(pairs):>7}{sum(r > 1 for r in ratios):>13}{ratios[len(ratios) // 2]:>13.2f}x"
            f"{worst['roofline']:>15.1%}  {worst['case']} {worst['dtype']}"
        )
    return lines


def _bench(content: dict[str, Any]) -> list[str]:
    peak = content["peaks"].get("bfloat16")
    lines = [
        f"bench ({_state(content)})"
        + (f": peaks {peak['tflops']:.0f} TFLOP/s, {peak['gbs']:.0f} GB/s" if peak else "")
    ]
    for name, row in _model_rows(content).items():
        lines.append(f"  {name}")
        for column in _COLUMNS:
            found = row.get(column)
            if found is None:
                continue
            if "ms" not in found:
                lines.append(f"    {column:26}{found.get('error', found.get('parity', ''))[:80]}")
                continue
            rest = f"{found['roofline']:>8.1%}" if "roofline" in found else ""
            rest += f"{found['step_gib']:>8.2f} GiB a step" if "step_gib" in found else ""
            latency = found["latency_ms"]["p50"]
            lines.append(f"    {column:26}{latency:>10.3f} ms{found['images_per_s']:>12.1f} images/s{rest}")
        for goal in row.get("goals", ()):
            word = "holds" if goal["holds"] else "MISSED"
            against = goal["against"] if goal["against"] in ("images/s", "ms") else f"x {goal['against']}"
            column = f"{goal['column']} " if "column" in goal else ""
            lines.append(f"    {word}: {column}{goal['value']:.5g} {against}, goal {goal['limit']:g}")
    if content["gpu"] == "cpu":
        return lines
    return lines + _slowest(content["ops"]) + _slower(content)


def _model_rows(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Inference and training; files from before the latter was measured have none of it."""
    return {**content["models"], **content.get("training", {})}


def _ours(row: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """What runs by default, or the forced kernel where that is slower than it: name and measurement."""
    found = [(name, row[name]) for name in ("fastvr", "fastvr, triton forced") if "p50" in row.get(name, {})]
    return min(found, key=lambda pair: pair[1]["p50"]) if found else None


def _slowest(ops: dict[str, Any]) -> list[str]:
    """The layers by the share of their own roofline that they reach: where to work next."""
    rows = [(case, *best) for case, row in ops.items() if (best := _ours(row)) and "roofline" in best[1]]
    rows.sort(key=lambda row: row[2]["roofline"])
    if not rows:
        return []
    lines = ["  layers furthest from their roofline (the larger of arithmetic and traffic at the peaks)"]
    lines.append(f"    {'':52}{'ms':>9}{'TFLOP/s':>9}{'GB/s':>8}{'share':>8}")
    for case, _, found in rows[:_SLOWEST]:
        speeds = f"{found['tflops']:>9.1f}{found['gbs']:>8.0f}{found['roofline']:>8.1%}"
        lines.append(f"    {case:52}{found['p50']:>9.4f}{speeds}")
    return lines


def _slower(content: dict[str, Any]) -> list[str]:
    """Layers and models where what runs by default is slower than eager: there must be none."""
    slower = []
    for case, row in content["ops"].items():
        if "p50" in row.get("eager", {}) and "p50" in row.get("fastvr", {}):
            slower.append((row["fastvr"]["p50"] / row["eager"]["p50"], case))
    for model, row in _model_rows(content).items():
        for column in ("fastvr", "prepared"):
            if "ms" in row.get("eager", {}) and "ms" in row.get(column, {}):
                slower.append((row[column]["ms"] / row["eager"]["ms"], f"{model} {column}"))
    # two runs of the same call differ by that much
    slower = sorted((pair for pair in slower if pair[0] > 1.02), reverse=True)
    if not slower:
        return ["  never slower than eager: holds for every layer and model measured"]
    return [f"  SLOWER than eager: {case} ({ratio:.2f}x its time)" for ratio, case in slower]


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
