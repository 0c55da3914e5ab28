"""Kernels are compiled for GPUs that are not there, and what the compiler made of them is read correctly.

Run as a script, without TRITON_INTERPRET, this file compiles its cases and prints them as JSON.
"""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvr.testing import offline

NVIDIA_MMA = {
    "sm_80": "HMMA",
    "sm_86": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
}


@triton.jit
def _gemm_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    M,
    N,
    K,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + rows[:, None] * K + (k + inner)[None, :], rows[:, None] < M, 0.0)
        b = tl.load(b_ptr + cols[None, :] * K + (k + inner)[:, None], cols[None, :] < N, 0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    tl.store(c_ptr + rows[:, None] * N + cols[None, :], acc.to(c_ptr.dtype.element_ty), mask)


@triton.jit
def _descriptor_kernel(a_desc, b_desc, c_desc, K, BLOCK: tl.constexpr):
    row, col = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        acc = tl.dot(a_desc.load([row, k]), b_desc.load([col, k]).T, acc)
    c_desc.store([row, col], acc.to(tl.bfloat16))


@triton.jit(do_not_specialize=["m"])
def _specialised_kernel(x_ptr, n, m, bias_ptr, SCALE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 16) * n, tl.arange(0, 16) < m, 0.0) * SCALE
    if bias_ptr is not None:
        x += tl.load(bias_ptr)
    tl.store(x_ptr + tl.arange(0, 16) * n, x)


def _gemm(arch, *, dtype=torch.bfloat16, precision=None, block=(64, 64, 32), **options):
    sizes = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), block, strict=True))
    arguments = {"a_ptr": dtype, "b_ptr": dtype, "c_ptr": dtype, "M": 1000, "N": 768, "K": 768}
    compiled = offline.compile_kernel(
        _gemm_kernel, {**arguments, "PRECISION": precision, **sizes}, arch=arch, **options
    )
    return dataclasses.asdict(offline.inspect(compiled))


def _tma(arch):
    tensor = torch.empty(1024, 768, dtype=torch.bfloat16, device="meta")
    blocks = {name: TensorDescriptor.from_tensor(tensor, [64, 64]) for name in ("a_desc", "b_desc", "c_desc")}
    compiled = offline.compile_kernel(_descriptor_kernel, {**blocks, "K": 768, "BLOCK": 64}, arch=arch)
    return dataclasses.asdict(offline.inspect(compiled))


def _binary(n, m, bias=None, scale=2.0):
    arguments = {"x_ptr": torch.float32, "n": n, "m": m, "bias_ptr": bias, "SCALE": scale}
    return offline.compile_kernel(_specialised_kernel, arguments, arch="sm_90").hash


def _compile_all():
    ieee = {"dtype": torch.float32, "precision": "ieee", "block": (32, 32, 16)}
    tf32 = {**ieee, "precision": "tf32"}
    huge = {"block": (128, 256, 64), "num_stages": 4, "num_warps": 8}
    return {
        **{arch: _gemm(arch) for arch in offline.ARCHITECTURES},
        "spills": _gemm("sm_80", maxnreg=32),
        "tf32": {arch: _gemm(arch, **tf32)["tf32"] for arch in ("sm_80", "sm_90", "sm_100")},
        "default": _gemm("sm_80", dtype=torch.float32, block=(32, 32, 16))["tf32"],
        "ieee": _gemm("sm_90", **ieee),
        "huge on sm_86": _gemm("sm_86", **huge),
        "huge on sm_90": _gemm("sm_90", **huge),
        "tma": _tma("sm_90"),
        "no tma": _tma("sm_80"),
        "binaries": {
            "one": _binary(1, 5),
            "odd": _binary(3, 5),
            "sixteens": _binary(16, 5),
            "more sixteens": _binary(32, 5),
            "unspecialised": [_binary(3, m) for m in (1, 16, 100)],
            "bias": _binary(3, 5, bias=torch.float32),
            "constant": _binary(3, 5, scale=3.0),
        },
    }


if __name__ == "__main__":
    print(json.dumps(_compile_all()))
    sys.exit()


@pytest.fixture(scope="module")
def compiled():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("arch", offline.ARCHITECTURES)
def test_every_architecture_compiles_a_gemm(compiled, arch):
    resources = compiled[arch]
    assert resources["arch"] == arch
    assert resources["name"] == "_gemm_kernel"
    assert 32 <= resources["registers"] <= 255
    # ptxas of triton 3.6 keeps one value of the loop's prologue on the stack
    assert resources["spills"] <= 3
    assert resources["loop_spills"] == 0
    assert resources["stack"] <= 8
    assert resources["num_warps"] == 4
    assert resources["shared"] >= 64 * 32 * 2 * 2
    assert resources["fits"]
    assert not resources["tf32"]
    if arch == "gfx942":
        assert all(name.startswith("v_mfma") for name in resources["mma"])
        assert resources["mma"]
        assert resources["ctas_per_sm"] is None
    else:
        assert set(resources["mma"]) == {NVIDIA_MMA[arch]}
        assert 2 <= resources["ctas_per_sm"] <= 16


def test_too_few_registers_show_as_spills(compiled):
    assert compiled["spills"]["registers"] <= 32
    assert compiled["spills"]["spills"] > compiled["spills"]["loop_spills"] > 10
    assert compiled["spills"]["stack"] > 0


def test_tf32_is_found_where_it_is_and_only_there(compiled):
    assert compiled["tf32"] == {"sm_80": True, "sm_90": True, "sm_100": True}
    assert compiled["default"]
    assert not compiled["ieee"]["tf32"]
    assert compiled["ieee"]["mma"] == {}


def test_a_tile_beyond_shared_memory_does_not_fit(compiled):
    small, large = compiled["huge on sm_86"], compiled["huge on sm_90"]
    assert small["shared"] > 101_376
    assert not small["fits"]
    assert small["ctas_per_sm"] == 0
    assert large["fits"]
    assert large["ctas_per_sm"] == 1


def test_host_descriptors_become_tma_where_there_is_tma(compiled):
    assert compiled["tma"]["tma"] >= 3
    assert compiled["tma"]["mma"].keys() == {"HGMMA"}
    assert compiled["no tma"]["tma"] == 0
    assert compiled["no tma"]["mma"].keys() == {"HMMA"}


def test_arguments_are_specialised_as_in_a_launch(compiled):
    binaries = compiled["binaries"]
    assert binaries["sixteens"] == binaries["more sixteens"]
    assert set(binaries["unspecialised"]) == {binaries["odd"]}
    kinds = [binaries[kind] for kind in ("one", "odd", "sixteens", "bias", "constant")]
    assert len(set(kinds)) == 5


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match=r"arch must be one of sm_80, .*; got 'sm_70'"):
        offline.compile_kernel(_gemm_kernel, {}, arch="sm_70")
    with pytest.raises(RuntimeError, match=r"_compile_all is no compiled kernel"):
        offline.compile_kernel(_compile_all, {}, arch="sm_80")
    with pytest.raises(FileNotFoundError, match="no-such-tool is neither"):
        offline._run("no-such-tool")
