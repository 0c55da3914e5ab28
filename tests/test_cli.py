"""The command line as a person meets it: what it prints, where, and its exit status."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import fastvr
from fastvr import __main__ as command
from fastvr import backend, doctor
from fastvr.cli import app
from fastvr.compare import run
from fastvr.ops._op import OPS


def fastvr_command(*args: str) -> Result:
    return CliRunner().invoke(app, list(args), env={"COLUMNS": "100"})


def test_version() -> None:
    result = fastvr_command("--version")
    assert (result.exit_code, result.output) == (0, f"fastvr {fastvr.__version__}\n")


def test_without_typer_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "typer" else find(name))
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == ("fastvr: the command line needs typer: pip install 'fastvr[cli]'\n")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--batch", "0"], "--batch must be"),
        (["--batch", "1,x"], "--batch must be"),
        (["--dtype", "float8"], "--dtype must be one of"),
        (["--device", "tpu"], "--device tpu: must be"),
        (["--train-seconds", "-1"], "--train-seconds must be"),
        (["--train-seconds", "nan"], "--train-seconds must be"),
        (["--images", "no/such/directory"], "no such directory"),
        (["--json", "no/such/directory/out.json"], "does not exist"),
        (["--weights", "no-such-file.safetensors"], "no-such-file.safetensors"),
    ],
)
def test_mistakes_are_one_line_and_status_2(args: list[str], words: str) -> None:
    result = fastvr_command("compare", *args)
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]  # but for progress
    assert len(errors) == 1
    assert errors[0].startswith("fastvr: ")
    assert words in errors[0]


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = fastvr_command("compare", "--device", "cuda")
    assert result.exit_code == 2
    assert "no such GPU" in result.stderr


@pytest.mark.parametrize(
    ("outcome", "status"), [(None, 0), (KeyboardInterrupt, 130), (backend.BackendError("no kernel"), 2)]
)
def test_how_a_comparison_ends(monkeypatch: pytest.MonkeyPatch, outcome: Any, status: int) -> None:
    pytest.importorskip("sklearn")

    def phases(self: run.Comparison) -> None:
        if outcome is not None:
            raise outcome
        self.result["complete"] = True

    monkeypatch.setattr(run.Comparison, "run", phases)
    result = fastvr_command("compare")
    assert result.exit_code == status
    assert ("partial" in result.stdout) == (status == 130)
    assert ("fastvr: no kernel" in result.stderr) == (status == 2)


def test_wrong_numbers_are_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")

    def phases(self: run.Comparison) -> None:
        self.result["models"]["resnet50"]["parity"] = {
            "passed": False,
            "verdict": "FAILED",
            "failure": "logits differ",
        }
        self.result["complete"] = True

    monkeypatch.setattr(run.Comparison, "run", phases)
    result = fastvr_command("compare")
    assert result.exit_code == 1
    assert "ResNet-50: parity FAILED" in result.stdout
    assert "logits differ" in result.stdout


def test_skipped_files_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    pillow.new("RGB", (40, 40)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("nothing")
    monkeypatch.setattr(run.Comparison, "_build", lambda self, step: (_ for _ in ()).throw(KeyboardInterrupt))
    result = fastvr_command("compare", "--images", str(tmp_path), "--json", str(tmp_path / "out.json"))
    assert result.exit_code == 130
    assert "bad.png: not an image" in result.stderr
    assert "bad.png: not an image" in result.stdout
    assert json.loads((tmp_path / "out.json").read_text())["settings"]["skipped"] == [
        ["bad.png", "not an image"]
    ]


def test_doctor_says_what_runs_and_why() -> None:
    result = fastvr_command("doctor")
    assert result.exit_code == 0
    for words in ("PyTorch", "Triton", "GPU", "C compiler", "kernel cache", "tuning table", "mode", *OPS):
        assert words in result.stdout


def test_doctor_as_json() -> None:
    found = json.loads(fastvr_command("doctor", "--json").stdout)
    assert {entry["op"] for entry in found["ops"]} == set(OPS)
    assert found["environment"]["torch"] == torch.__version__
    assert found["cache"]["path"]


def test_every_op_is_asked_with_arguments_that_it_takes() -> None:
    for name, args in doctor._arguments(torch.device("meta"), torch.bfloat16).items():
        results = OPS[name].overload(*args)
        assert {y.device.type for y in (results if isinstance(results, tuple) else (results,))} == {"meta"}
        assert OPS[name].unsupported(*args) is None


def test_doctor_explains_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert {entry["runs"] for entry in doctor.choices(cpu)} == {"pytorch"}
    assert "need a GPU" in doctor.choices(cpu)[0]["why"]
    with backend.use_backend("triton"):
        assert {entry["runs"] for entry in doctor.choices(cpu)} == {"error"}
    with backend.use_backend("reference"):
        assert "'reference'" in doctor.choices(cpu)[0]["why"]
    with backend.assume_architecture("sm_90"):
        runs = {entry["op"]: entry["runs"] for entry in doctor.choices(torch.device("meta"))}
    assert runs["max_pool"] == "triton"
    assert runs["linear"] == "pytorch"


def test_doctor_sees_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "below" / "cache"))
    assert doctor._cache() == {"path": str(tmp_path / "below" / "cache"), "writable": True}
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    found = doctor.report()
    assert not found["cache"]["writable"]
    assert any("TRITON_CACHE_DIR" in line for line in found["advice"])
