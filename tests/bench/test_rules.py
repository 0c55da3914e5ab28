"""The rules of the audit: each can fail, and what is right passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rules

from fastvr.testing.offline import Resources

ROOT = Path(__file__).resolve().parents[2]


def _resources(**changes: Any) -> Resources:
    right = {
        "name": "k", "arch": "sm_90", "registers": 128, "spills": 0, "loop_spills": 0, "stack": 0,
        "shared": 1024, "num_warps": 4, "mma": {"HGMMA": 8}, "tma": 0, "tf32": False, "fits": True,
        "ctas_per_sm": 4,
    }  # fmt: skip
    return Resources(**(right | changes))


def _failures(resources: Resources, **changes: Any) -> list[str]:
    given: dict[str, Any] = {
        "dtype": "bfloat16",
        "dot": True,
        "arguments": {"BLOCK_M": 64},
        "options": {"num_warps": 4, "enable_fp_fusion": True},
    }
    return rules.binary_failures(resources, **(given | changes))


def test_a_right_binary_passes() -> None:
    assert _failures(_resources()) == []


@pytest.mark.parametrize(
    ("resources", "changes", "words"),
    [
        ({"spills": 3, "loop_spills": 1}, {}, "3 spills (1 in loops)"),
        ({"fits": False, "shared": 300_000}, {}, "does not fit (300000 bytes"),
        ({"tf32": True, "mma": {}}, {"dtype": "float32"}, "TF32"),
        ({"mma": {}}, {}, "no matrix instructions"),
        ({"mma": {"HMMA": 4}}, {}, "no HGMMA (has HMMA)"),
        ({"mma": {"HMMA": 4}, "arch": "sm_100"}, {}, "no UTC"),
        ({}, {"options": {"num_warps": 4}}, "enable_fp_fusion"),
        ({}, {"arguments": {"BLOCK_M": 64, "TMA": 1}}, "no TMA loads"),
    ],
)
def test_each_rule_can_fail(resources: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    failures = _failures(_resources(**resources), **changes)
    assert len(failures) == 1
    assert words in failures[0]


def test_descriptors_become_pointers_where_there_is_no_tma() -> None:
    given = {"BLOCK_M": 64, "TMA": 1}
    assert _failures(_resources(tma=8), arguments=given) == []
    assert _failures(_resources(arch="sm_80", mma={"HMMA": 4}), arguments=given) == []


def test_a_thin_tile_may_use_the_older_instruction() -> None:
    assert _failures(_resources(mma={"HMMA": 4}), arguments={"BLOCK_M": 16}) == []


def test_a_kernel_without_products_needs_no_matrix_instructions() -> None:
    assert _failures(_resources(mma={}), dot=False) == []


def test_float32_products_need_no_matrix_instructions() -> None:
    assert _failures(_resources(mma={}), dtype="float32") == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("x = tl.load(p, mask=m)", "without other="),
        ("x = tl.load(p, m)", "without other="),
        ("acc = tl.dot(a, b, acc)", "input_precision"),
        ("p = tl.make_block_ptr(p, s, st, o, b, (1, 0))", "make_block_ptr"),
    ],
)
def test_each_source_rule_can_fail(line: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "k.py"
    file.write_text(f"import triton.language as tl\n{line}\n")
    (failure,) = rules.source_failures(file)
    assert failure.startswith("k.py:2: ")
    assert words in failure


@pytest.mark.parametrize(
    "line", ["x = tl.load(p)", "x = tl.load(p, mask=m, other=0.0)", "tl.dot(a, b, input_precision=P)"]
)
def test_right_source_passes(line: str, tmp_path: Path) -> None:
    file = tmp_path / "k.py"
    file.write_text(line)
    assert rules.source_failures(file) == []


@pytest.mark.parametrize("file", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_our_kernels_keep_the_source_rules(file: Path) -> None:
    assert rules.source_failures(file) == []
