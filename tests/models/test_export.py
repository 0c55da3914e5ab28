"""Programs that leave the process: torch.export, ONNX, AOTInductor; with fastvr's operators, and without."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastvr
from fastvr import backend
from fastvr.testing import assert_parity, truth_model

BATCH = torch.export.Dim("batch", min=1, max=64)


def _export(model: nn.Module, x: torch.Tensor, mode: str) -> torch.export.ExportedProgram:
    with fastvr.use_backend(mode):
        return torch.export.export(model, (x,), dynamic_shapes=({0: BATCH},))


def _ours(program: torch.export.ExportedProgram) -> set[str]:
    """fastvr's operators in the program."""
    calls = (str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return {target.split(".")[1] for target in calls if target.startswith("fastvr.")}


def _hold(run, model: nn.Module, images, sizes=(1, 3)) -> None:
    with torch.no_grad():
        for n in sizes:
            assert_parity(run(images(n)), model(images(n)), truth_model(model)(images(n).double()))


@pytest.mark.parametrize("kind", ["vit", "bottleneck"])
def test_decompositions_leave_none_of_fastvrs_operators(kind, short, images) -> None:
    model = short(kind)
    program = _export(model, images(2), "triton")
    assert len(_ours(program)) > 2
    plain = program.run_decompositions(fastvr.decompositions())
    assert not _ours(plain)
    _hold(plain.module(), model, images)


@pytest.mark.parametrize("kind", ["vit", "bottleneck"])
def test_under_the_reference_there_are_none_from_the_start(kind, short, images) -> None:
    model = short(kind)
    program = _export(model, images(2), "reference")
    assert not _ours(program)
    _hold(program.module(), model, images)


def test_gradients_on_change_no_program(tiny_vit, images) -> None:
    """On a GPU a program gets the fused operators also where nobody wrote ``no_grad``."""
    model, x = tiny_vit(), images(2)
    with backend.assume_architecture("sm_90"):
        assert all(p.requires_grad for p in model.parameters())
        program = _export(model, x, "auto")
        with torch.no_grad():
            assert _ours(_export(model, x, "auto")) == _ours(program)
    assert _ours(program) >= {"patch_embed", "attention", "layernorm_mlp"}
    assert not {name for name in _ours(program) if name.endswith("_training")}


_OTHER_PROCESS = """
import sys, torch
torch.set_num_threads(1)
x, folder = torch.load(sys.argv[1] + "/x.pt"), sys.argv[1]
results = {}
results["decomposed"] = torch.export.load(f"{folder}/decomposed.pt2").module()(x)
assert "fastvr" not in sys.modules
import fastvr
results["operators"] = torch.export.load(f"{folder}/operators.pt2").module()(x)
torch.save(results, folder + "/results.pt")
"""


def test_another_process_runs_what_was_saved(short, images, tmp_path) -> None:
    model = short("vit")
    operators = _export(model, images(2), "triton")
    programs = {
        "operators": operators,
        "decomposed": operators.run_decompositions(fastvr.decompositions()),
    }
    for name, program in programs.items():
        torch.export.save(program, tmp_path / f"{name}.pt2")
    torch.save(images(3), tmp_path / "x.pt")
    command = [sys.executable, "-c", _OTHER_PROCESS, str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(fastvr.__file__).parents[1], capture_output=True)
    results = torch.load(tmp_path / "results.pt")
    assert results.keys() == programs.keys()
    for found in results.values():
        _hold(lambda _, found=found: found.detach(), model, images, sizes=(3,))


@pytest.mark.parametrize("kind", ["vit", "bottleneck"])
def test_onnx(kind, short, images, tmp_path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, path = short(kind), tmp_path / "model.onnx"
    with fastvr.use_backend("reference"):
        torch.onnx.export(
            model,
            (images(2),),
            path,
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]
    _hold(lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), model, images)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aot_inductor(short, images, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    model = short("vit")
    program = _export(model, images(2), "reference")
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    _hold(torch._inductor.aoti_load_package(path), model, images)
