"""What the figures of a run come to, in words."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def closing(result: Json) -> str:
    """Which of the two suits what, from the figures of this run alone."""
    if len(result["models"]) != 2:
        return ""
    first, second = result["models"].values()
    sentences = []
    if "flops" in first and "flops" in second:
        large, small = sorted((first, second), key=lambda model: -model["flops"])
        sentences.append(
            f"{small['title']} does {large['flops'] / small['flops']:.1f} times less arithmetic an image "
            f"than {large['title']}" + _intensity(large, small)
        )
    if _best(first, 1) and _best(second, 1):
        slow, fast = sorted((first, second), key=lambda model: _best(model, 1))
        sentences.append(
            f"For one image at a time {fast['title']} suits this machine: "
            f"{ms(1e3 / _best(fast, 1))} ms against {ms(1e3 / _best(slow, 1))} ms."
        )
    batch = result["settings"]["batches"][-1]
    if batch > 1 and _best(first, batch) and _best(second, batch):
        slow, fast = sorted((first, second), key=lambda model: _best(model, batch))
        times = _best(fast, batch) / _best(slow, batch)
        sentences.append(
            f"For many, {fast['title']} classifies {times:.1f} times as many a second at batch {batch}."
            if times >= 1.05
            else f"At batch {batch} both classify about as many a second."
        )
    sentences.extend(_learning(result.get("digits", {}).get("models", {})))
    return "Which suits what. " + " ".join(sentences) if sentences else ""


def _intensity(large: Json, small: Json) -> str:
    if not all(model.get("traffic", {}).get("fastvr") for model in (large, small)):
        return "."
    parts = []
    for model in (large, small):
        counted = model["traffic"]
        saved = 1 - counted["fastvr"]["bytes"] / counted["eager"]["bytes"]
        work = model["flops"] * counted["batch"] / counted["eager"]["bytes"]
        parts.append(f"{model['title']} {work:.0f} FLOP a byte, {saved:.0%} of the bytes saved by fusion")
    return f" ({'; '.join(parts)})."


def _best(model: Json, batch: int) -> float:
    """Images a second in the fastest column; 0 where there is none."""
    rates = [column["batches"].get(str(batch)) for column in model.get("speed", {}).values()]
    return max((float(rate["images_per_s"]) for rate in rates if isinstance(rate, dict)), default=0.0)


def _learning(models: Json) -> list[str]:
    sentences = []
    for part, text in (("all", "Trained from scratch on {n:,} digits"), ("few", "with {n:,} labels")):
        runs = {model["title"]: model[part] for model in models.values() if part in model}
        if len(runs) < 2:
            continue
        worse, better = sorted(runs, key=lambda title: float(runs[title]["accuracy"]))
        a, b = runs[better]["accuracy"], runs[worse]["accuracy"]
        head = text.format(n=runs[better]["samples"]) + f" for {runs[better]['seconds']:.0f} s each"
        even = f"both reach {a:.1%}" if a == b else f"the {better} reaches {a:.1%}, the {worse} {b:.1%}"
        sentences.append(f"{head}, {even}")
    return ["; ".join(sentences) + "."] if sentences else []


def ms(milliseconds: float) -> str:
    """Three digits, and no exponents."""
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:,.0f}"
