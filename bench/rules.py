"""Rules for kernels that their source or their binary shows.

From the source: a masked load names what masked lanes hold, a ``tl.dot`` names its precision, nothing uses
the block pointers that newer Tritons lack. From the binary: no spills, it fits, matrix instructions where
16-bit operands are multiplied, TMA where the configuration says so, no TF32 in float32.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

TMA = ("sm_90", "sm_100", "sm_120")  # where a tensor descriptor is one; elsewhere it becomes pointers


def source_failures(path: Path) -> list[str]:
    """What a kernel file does against the rules, as "file:line: what"."""
    failures = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "tl"):
            continue
        named = {keyword.arg for keyword in node.keywords}
        what = None
        if node.func.attr == "load":
            masked = "mask" in named or len(node.args) > 1
            if masked and "other" not in named and len(node.args) < 3:
                what = "a masked tl.load without other=: its masked lanes are undefined"
        elif node.func.attr == "dot":
            if "input_precision" not in named:
                what = "tl.dot without input_precision=: float32 operands become TF32"
        elif node.func.attr in ("make_block_ptr", "advance"):
            what = f"tl.{node.func.attr} is gone from Triton 3.9"
        if what:
            failures.append(f"{path.name}:{node.lineno}: {what}")
    return failures


def matrix_instruction(arch: str, arguments: dict[str, Any], options: dict[str, int]) -> str | None:
    """The start of the mnemonic that a 16-bit tl.dot must become, or None where any will do.

    Hopper's and Blackwell's own instructions take tiles of at least 64 rows from four warps.
    """
    wide = arguments.get("BLOCK_M", 0) >= 64 and options.get("num_warps", 4) >= 4
    if wide and arch == "sm_90":
        return "HGMMA"
    if wide and arch == "sm_100":
        return "UTC"
    return None


def binary_failures(
    resources: Any, *, dtype: str, dot: bool, arguments: dict[str, Any], options: dict[str, int]
) -> list[str]:
    """What a compiled kernel does against the rules; ``resources`` as ``offline.inspect`` gives them."""
    failures = []
    if resources.spills:
        failures.append(f"{resources.spills} spills ({resources.loop_spills} in loops)")
    if not resources.fits:
        failures.append(f"does not fit ({resources.shared} bytes of shared memory)")
    if dtype == "float32" and resources.tf32:
        failures.append("TF32 in a float32 kernel")
    if dot and dtype in ("float16", "bfloat16"):
        wanted = matrix_instruction(resources.arch, arguments, options)
        if not resources.mma:
            failures.append("no matrix instructions")
        elif wanted and not any(name.startswith(wanted) for name in resources.mma):
            failures.append(f"no {wanted} (has {', '.join(resources.mma)})")
    if arguments.get("TMA") and resources.arch in TMA and not resources.tma:
        failures.append("no TMA loads")
    if options.get("enable_fp_fusion") is not True:
        failures.append("launched without enable_fp_fusion=True")
    return failures
