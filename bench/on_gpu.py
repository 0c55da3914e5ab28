"""Everything that needs a GPU, in one command, for a machine that may be there for ten minutes only.

    python bench/on_gpu.py --out DIR [--budget SECONDS] [parity|tune|bench|all]
    python bench/on_gpu.py warm --out DIR [--arch sm_90]

parity: every op and both models, their gradients too, Triton forced. tune: every configuration beside the
vendor's call; writes the table DIR/<GPU>.json. bench: models, their training steps and layers against eager
and torch.compile with max-autotune. Each saves as it goes: what the budget or a crash cuts off loses nothing
that was done.

warm compiles beforehand, on a machine without a GPU, what the other steps launch; --cache DIR takes it along
(found by itself in bench/cache). Without a GPU the steps run on small shapes in Triton's interpreter, with a
stand-in timer: to find mistakes in Python, not to measure.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import gpu_cache  # noqa: E402  (imports neither torch nor Triton)

STEPS = ("parity", "tune", "bench")
# of the whole budget, the point by which a step of "all" must have ended
_SHARES = {"parity": 0.35, "tune": 0.65, "bench": 1.0}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", nargs="?", choices=(*STEPS, "all", "warm"), default="all")
    parser.add_argument("--out", type=Path, required=True, help="where results go (warm: the cache)")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all steps (default 540)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--cache", type=Path, default=ROOT / "bench" / "cache", help="what warm has made")
    parser.add_argument("--arch", default="sm_90", help="warm: what to compile for (default sm_90)")
    parser.add_argument("--seed", type=int, default=0, help="of the random shapes")
    parser.add_argument("--samples", type=int, help="random shapes an op and dtype (warm takes the same)")
    parser.add_argument("--op", nargs="+", help="only these ops and no models")
    return parser.parse_args(argv)


def interpreted_again(argv: list[str]) -> None:
    """Kernels are made for the interpreter when they are decorated, so the whole process must be."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        os.execve(sys.executable, [sys.executable, str(Path(__file__).resolve()), *argv], environment)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    if args.step == "warm":
        import launches

        launches.refuse_interpreter("bench/on_gpu.py warm")
        restrict(args)
        return min(1, gpu_cache.warm(args.out, args.arch, seed=args.seed, samples=args.samples))
    import torch

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        interpreted_again(argv)
    else:
        print(gpu_cache.adopt(args.cache), flush=True)
    return measure(args, device)


def restrict(args: argparse.Namespace) -> None:
    """``--op``: only these, and no models."""
    import cases

    if not args.op:
        return
    if unknown := set(args.op) - set(cases.OPS):
        raise SystemExit(f"--op takes {', '.join(cases.OPS)}; got {', '.join(sorted(unknown))}")
    cases.OPS = tuple(op for op in cases.OPS if op in args.op)
    cases.MODELS = cases.MORE_MODELS = ()


def measure(args: argparse.Namespace, device: object) -> int:
    import time

    import gpu_bench
    import gpu_parity
    import gpu_tune
    import summary
    import torch
    from session import Session, describe

    assert isinstance(device, torch.device)
    hits, small = gpu_cache.Hits(), device.type == "cpu"
    if device.type == "cpu":
        from fastvr.testing import interpreter

        interpreter.install()
        torch.set_num_threads(1)
    else:
        hits.listen()
    restrict(args)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    runs = {"parity": gpu_parity.run, "tune": gpu_tune.run, "bench": gpu_bench.run}
    failures = 0
    for step in STEPS if args.step == "all" else (args.step,):
        share = _SHARES[step] if args.step == "all" else 1.0
        session = Session(
            out=args.out,
            device=device,
            deadline=started + args.budget * share,
            small=small,
            seed=args.seed,
            samples=args.samples or (gpu_parity.SAMPLES_SMALL if small else gpu_parity.SAMPLES),
        )
        before = time.monotonic()
        try:
            failures += runs[step](session)
        except Exception as error:
            # the other steps may still have something to say
            failures += 1
            session.say(f"{step} FAILED as a whole: {describe(error)}")
        print(f"{step} took {time.monotonic() - before:.0f} s", flush=True)
        if device.type == "cuda":
            print(hits, flush=True)
    print(summary.table(args.out, time.monotonic() - started))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
