"""What a launch is given, seen by a recorder, and what the compiler makes of it.

Run as a script, without TRITON_INTERPRET, this file compiles one launch with overlap and prints its PTX.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
from fastvr import backend, tuning
from fastvr.kernels import common
from fastvr.ops.linear import LINEAR, linear

SPLIT = {
    "BLOCK_M": 64,
    "BLOCK_N": 64,
    "BLOCK_K": 64,
    "GROUP_M": 8,
    "SPLIT_K": 2,
    "num_warps": 4,
    "num_stages": 3,
}


def _launches(arch):
    """The launches of a linear layer whose product is split, recorded on meta tensors."""
    found = []
    x, weight = (torch.empty(40, 128, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with (
        backend.use_backend("triton"),
        backend.assume_architecture(arch),
        tuning.force_config("linear", SPLIT),
        common.record_launches(lambda *launch: found.append(launch)),
    ):
        LINEAR.kernel(x, weight, None, None, None, "none")
    return found


def _ptx():
    from fastvr.testing.offline import compile_kernel

    with common.overlapping_launches():
        recorded = _launches("sm_90")
    return [
        compile_kernel(kernel, given, arch="sm_90", **options).asm["ptx"]
        for kernel, _, given, options in recorded
    ]


if __name__ == "__main__":
    print("\n".join(_ptx()))
    sys.exit()


@pytest.mark.parametrize(
    ("arch", "able"), [("sm_80", False), ("sm_90", True), ("sm_120", True), ("gfx942", False)]
)
def test_launches_overlap_where_asked_for_and_possible(arch, able):
    for overlap in (False, True):
        if overlap:
            with common.overlapping_launches():
                recorded = _launches(arch)
        else:
            recorded = _launches(arch)
        assert len(recorded) == 2
        for _, _, arguments, options in recorded:
            assert bool(arguments.get("PDL")) == (overlap and able)
            assert options.get("launch_pdl", False) == (overlap and able)


def test_every_overlapping_launch_waits_before_it_reads():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    entries = done.stdout.split(".visible .entry")[1:]
    assert len(entries) == 2
    for entry in entries:
        wait, begin = entry.index("griddepcontrol.wait"), entry.index("griddepcontrol.launch_dependents")
        assert wait < begin
        assert not any(read in entry[:wait] for read in ("ld.global", "cp.async", "st.global"))


def test_overlap_changes_no_number(device):
    x, weight = torch.randn(5, 32, device=device), torch.randn(7, 32, device=device)
    with backend.use_backend("triton"):
        plain = linear(x, weight)
        with common.overlapping_launches():
            assert torch.equal(linear(x, weight), plain)
