"""The command line as a person meets it: what it prints, where, and its exit status."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner, Result

import fastvr
from fastvr import __main__ as command
from fastvr import backend, doctor, tuner, tuning
from fastvr.cli import app, common
from fastvr.cli import doctor as doctor_command
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
        (["--seed", "-1"], "--seed must be from 0 to below 2**64; got -1"),
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
    for words in ("PyTorch", "Triton", "GPU", "C compiler", "kernel cache", "tuning tables", "mode", *OPS):
        assert words in result.stdout


def test_doctor_as_json() -> None:
    found = json.loads(fastvr_command("doctor", "--json").stdout)
    assert {entry["op"] for entry in found["ops"]} == set(OPS)
    assert found["environment"]["torch"] == torch.__version__
    assert found["cache"]["path"]


def test_doctor_names_the_vendors_calls_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.report()["onednn"]
    if found["missing"] is None:
        assert {"linear", "conv_bn_relu"} <= set(found["ops"])
        assert "float32" in found["dtypes"]
        assert "for prepared models on the CPU, float32" in fastvr_command("doctor").stdout
    monkeypatch.setattr(doctor.mkldnn, "missing", lambda: "this PyTorch is built without oneDNN")
    found = doctor.report()
    assert found["onednn"]["dtypes"] == []
    assert not any("oneDNN" in advice for advice in found["advice"])
    assert "this PyTorch is built without oneDNN" in fastvr_command("doctor").stdout


def test_every_op_is_asked_with_arguments_that_it_takes() -> None:
    for name, args in doctor._arguments(torch.device("meta"), torch.bfloat16).items():
        results = OPS[name].overload(*args)
        assert {y.device.type for y in tree_leaves(results)} == {"meta"}
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


# -------------------------------------------------------------------------------------------- tuning


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["vit_bas"], "did you mean 'vit_base'?"),
        (["nothing"], "MODEL must be one of vit_tiny, vit_small"),
        (["vit_base", "--batch", "0"], "--batch must be"),
        (["vit_base", "--dtype", "int8"], "--dtype must be one of"),
        (["vit_base", "--budget", "0"], "--budget must be more than 0 seconds"),
        (["vit_base", "--json", "no/such/directory/out.json"], "does not exist"),
        (["vit_base"], "PyTorch sees no GPU, so there is nothing to tune here"),
        (["vit_base", "--quick"], "--dry-run goes through it all"),
    ],
)
def test_tune_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, args: list[str], words: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = fastvr_command("tune", *args)
    assert result.exit_code == 2
    (error,) = result.stderr.splitlines()
    assert error.startswith("fastvr: ")
    assert words in error


def test_two_dry_runs_at_once_fill_one_table(tmp_path: Path) -> None:
    """End to end, in processes of their own that write one file."""
    pytest.importorskip("triton")
    root = str(Path(fastvr.__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": root, "FASTVR_CACHE_DIR": str(tmp_path), "COLUMNS": "120"}
    environment.pop("TRITON_INTERPRET", None)  # the command sees to it
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "fastvr", "tune", model, "--dry-run", "--batch", "1", "--dtype", dtype],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for model, dtype in (("vit_tiny", "float32"), ("vit_base", "bfloat16"))
    ]
    path = tmp_path / "tuning" / "dry-run" / "cpu.json"
    for process in runs:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        assert "A dry run" in out
        assert "candidates were dropped" not in out
        assert f"Written to {path}" in out
    entries = tuning.table.read(path, "cpu").entries
    assert {key.split("|")[1] for key in entries} == {"float32", "bfloat16"}
    assert {key.split("|")[0] for key in entries} >= {"patch_embed", "attention", "linear"}


def _report(**changed: Any) -> tuner.Report:
    entry = tuning.Entry("triton", {"BLOCK_M": 128}, 0.5, 0.6, 1.0)
    vendor = tuning.Entry("reference", {"BLOCK_M": 64}, 0.25, 0.5, 0.25, complete=False)
    report = tuner.Report("NVIDIA H200", Path("table.json"), "device", planned=5, known=1)
    report.won = [
        tuner.Won("linear 2x8", 12, "linear|a", entry, 0.75),
        tuner.Won("attention 2x8", 12, "attention|a", vendor, None),
    ]
    report.dropped = [
        tuner.Dropped("linear 2x8", {"linear": {"BLOCK_M": n}}, f"OutOfResources: {n}\nmore")
        for n in range(20)
    ]
    for name, value in changed.items():
        setattr(report, name, value)
    return report


@pytest.mark.parametrize(
    ("changed", "status", "words"),
    [
        ({}, 0, "Written to table.json"),
        ({"stopped": "budget"}, 0, "The budget ended first: 2 shapes are left"),
        ({"stopped": "interrupted"}, 130, "Interrupted: 2 shapes are left"),
        ({"stopped": "the GPU failed: lost"}, 1, "Stopped: the GPU failed: lost"),
        ({"unsaved": "the disk is full"}, 1, "NOT SAVED: the disk is full"),
    ],
)
def test_how_tuning_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: dict[str, Any], status: int, words: str
) -> None:
    pytest.importorskip("triton")
    from fastvr.tuner import command

    asked: dict[str, Any] = {}

    def run(name: str, **options: Any) -> tuner.Report:
        asked.update(options, name=name)
        return _report(**changed)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "unavailable", lambda device: None)
    monkeypatch.setattr(command, "run", run)
    out = tmp_path / "out.json"
    result = fastvr_command("tune", "resnet50", "--batch", "8,1", "--json", str(out))
    assert result.exit_code == status, result.output
    assert words in result.stdout
    assert "5 shapes, 1 known before, 2 measured" in result.stdout
    assert "linear 2x8" in result.stdout
    assert "2.00x" in result.stdout  # over PyTorch
    assert "1.50x" in result.stdout  # over the default
    assert "PyTorch (not all tried)" in result.stdout
    assert "BLOCK_M=3: OutOfResources: 3" in result.stdout
    assert "and 8 more" in result.stdout
    assert (asked["name"], asked["batches"], asked["dtype"], asked["budget"]) == (
        "resnet50",
        (1, 8),
        torch.bfloat16,
        600.0,
    )
    assert len(json.loads(out.read_text())["dropped"]) == 20


def test_doctor_names_the_tables_in_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card = tuning.Card("NVIDIA H100", "sm_90", 132)
    sibling = tuning.Card("NVIDIA H200", "sm_90", 132)
    monkeypatch.setenv("FASTVR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "card", lambda device: card)

    def put(which: tuning.Card) -> None:
        entries = {"linear|bfloat16|m64.n8": tuning.Entry("triton", None, 1.0, None, None)}
        tuning.table.merge(tuning.own_path(which.name), tuning.Table(which.name, which.architecture, entries))
        tuning.reload()

    put(sibling)
    found = doctor._table(torch.device("cuda"))
    assert found["entries"] == 0
    assert found["path"] == str(tmp_path / "tuning" / "NVIDIA_H100.json")
    (table,) = found["tables"]
    assert (table["gpu"], table["entries"], table["exact"]) == ("NVIDIA H200", 1, False)
    report: dict[str, Any] = doctor.report() | {"tuning": found, "unavailable": None}
    report["environment"] |= {"gpu": {"name": card.name, "architecture": "sm_90", "memory": 2**36}}
    (advice,) = [line for line in doctor._advice(report, torch.device("cuda")) if "fastvr tune" in line]
    assert "the choices of NVIDIA H200 serve" in advice
    put(card)
    found = doctor._table(torch.device("cuda"))
    assert [table["exact"] for table in found["tables"]] == [True, False]
    report["tuning"] = found
    assert not [line for line in doctor._advice(report, torch.device("cuda")) if "fastvr tune" in line]
    monkeypatch.setattr(common, "PIPED_WIDTH", 250)
    console = common.make_console()
    with console.capture() as shown:
        doctor_command.show(report, console)
    assert "same architecture: NVIDIA H200" in shown.get()
    tuning.reload()
