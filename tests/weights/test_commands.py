"""``fastvr convert`` and ``fastvr verify``, on files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import fastvr
from fastvr.cli import app
from fastvr.models.preprocessing import Preprocessing
from fastvr.verify import verify

runner = CliRunner()


@pytest.fixture
def checkpoint(make_peer, tmp_path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file(make_peer("torchvision-vit").state_dict(), path)
    return path


def test_convert_and_back(checkpoint, tmp_path) -> None:
    folder, back = tmp_path / "folder", tmp_path / "back.pt"
    made = runner.invoke(
        app, ["convert", str(checkpoint), str(folder), "--to", "transformers", "--num-heads", "2"]
    )
    assert made.exit_code == 0, made.output
    made = runner.invoke(app, ["convert", str(folder), str(back), "--to", "torchvision"])
    assert made.exit_code == 0, made.output
    before, after = fastvr.load_model(checkpoint, num_heads=2), fastvr.load_model(back, num_heads=2)
    assert all(torch.equal(t, after.state_dict()[name]) for name, t in before.state_dict().items())
    smaller = runner.invoke(
        app, ["convert", str(folder), str(back), "--to", "timm", "--image-size", "16", "--num-classes", "3"]
    )
    assert smaller.exit_code == 0, smaller.output
    changed = fastvr.load_model(back, num_heads=2)
    assert (changed.img_size, changed.num_classes) == ((16, 16), 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "missing.pt", "out", "--to", "timm"], "missing.pt: no such checkpoint"),
        (["convert", "WEIGHTS", "out", "--to", "timm"], "share its width of 32: give --num-heads"),
        (["convert", "WEIGHTS", "out", "--to", "onnx", "--num-heads", "2"], "--to must be one of timm, "),
        (["convert", "WEIGHTS", "out/x.pt", "--to", "timm", "--num-heads", "2"], "OUT must lie in a folder"),
        (
            ["convert", "WEIGHTS", "out.bin", "--to", "timm", "--num-heads", "2"],
            "OUT must end in .safetensors",
        ),
        (["convert", "WEIGHTS", "WEIGHTS/x", "--to", "timm", "--num-heads", "2"], "Not a directory"),
        (["verify", "WEIGHTS"], "give --num-heads"),
        (
            ["convert", "WEIGHTS", "out", "--to", "timm", "--num-heads", "2", "--norm-eps", "nan"],
            "norm_eps must be",
        ),
        (["verify", "missing.pt"], "missing.pt: no such checkpoint"),
        (["verify", "WEIGHTS", "--dtype", "int8"], "--dtype must be one of"),
        (["verify", "WEIGHTS", "--batch", "0"], "--batch must be at least 1"),
        (["verify", "WEIGHTS", "--seed", str(2**64)], "--seed must be from 0 to below 2**64"),
    ],
)
def test_bad_arguments_are_named(arguments, message, checkpoint, monkeypatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    made = runner.invoke(app, [word.replace("WEIGHTS", str(checkpoint)) for word in arguments])
    assert made.exit_code == 2
    assert message in made.output
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


@pytest.mark.parametrize("there", [False, True], ids=["new folder", "old folder"])
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_folder_is_written_whole_or_not_at_all(there, fault, at, checkpoint, tmp_path, monkeypatch) -> None:
    out = tmp_path / "new" / "out"
    model = fastvr.load_model(checkpoint, num_heads=2)
    if there:
        fastvr.save_model(model, out, "timm")
    before = {path.name: path.read_bytes() for path in out.iterdir()} if there else {}
    model.preprocessing = Preprocessing(32, 32, (0.5,) * 3, (0.5,) * 3)
    calls = iter(range(99))
    fsync = os.fsync

    def fail(handle: int) -> None:
        if next(calls) == at:
            raise fault
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(fault)):
        fastvr.save_model(model, out, "transformers")
    assert ({path.name: path.read_bytes() for path in out.iterdir()} if there else {}) == before
    assert out.exists() == there


def test_what_another_model_left_is_not_taken_for_the_new_ones(make_peer, tmp_path) -> None:
    """Its preprocessing, where the new one says nothing of that."""
    transformers = pytest.importorskip("transformers")
    source, out = tmp_path / "in", tmp_path / "out"
    make_peer("transformers-vit").save_pretrained(source)
    make_peer("transformers-vit").save_pretrained(out)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(out)
    assert fastvr.load_model(out).preprocessing is not None
    made = runner.invoke(app, ["convert", str(source), str(out), "--to", "transformers"])
    assert made.exit_code == 0, made.output
    assert fastvr.load_model(out).preprocessing is None
    # a folder in its own place keeps what it says
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(out)
    how = fastvr.load_model(out).preprocessing
    for layout, eps in (("transformers", []), ("timm", ["--norm-eps", "1e-6"])):
        made = runner.invoke(app, ["convert", str(out), str(out), "--to", layout, *eps])
        assert made.exit_code == 0, made.output
        assert fastvr.load_model(out).preprocessing == how


def test_a_wider_dtype_is_said(make_peer, tmp_path) -> None:
    make_peer("transformers-vit").bfloat16().save_pretrained(tmp_path / "in")
    made = runner.invoke(
        app, ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "transformers"]
    )
    assert made.exit_code == 0, made.output
    assert "in float32 (of bfloat16)" in made.output


def test_a_configuration_that_its_own_library_refuses_is_one_line(make_peer, tmp_path) -> None:
    save_file(make_peer("transformers-vit").state_dict(), tmp_path / "model.safetensors")
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": "wide"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = runner.invoke(app, ["verify", str(tmp_path), "--num-heads", "2"])
    assert made.exit_code == 2
    (line,) = made.stderr.strip().splitlines()
    assert "its own library cannot load it: " in line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_shows_both_errors(dtype, make_peer, tmp_path) -> None:
    make_peer("transformers-vit").save_pretrained(tmp_path)
    made = runner.invoke(app, ["verify", str(tmp_path), "--dtype", dtype])
    assert made.exit_code == 0, made.output
    for words in ("ViT in the layout of transformers", "max error", "RMS error", "Against float64: "):
        assert words in made.output
    rows = [line.split() for line in made.output.splitlines()]
    numbers = {row[0]: [float(word) for word in row[1:]] for row in rows if len(row) == 3}
    assert set(numbers) == {"transformers", "fastvr", "allowed"}
    assert all(0 < ours <= most for ours, most in zip(numbers["fastvr"], numbers["allowed"], strict=True))


@pytest.mark.parametrize("kind", ["encoder", "timm-vit", "timm-resnet", "torchvision-vit"])
def test_verify_takes_files_without_a_configuration(kind, make_peer, tmp_path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({name: t.contiguous() for name, t in make_peer(kind).state_dict().items()}, path)
    heads = [] if "resnet" in kind else ["--num-heads", "2"]
    made = runner.invoke(app, ["verify", str(path), "--batch", "2", *heads])
    assert made.exit_code == 0, made.output
    assert f"layout of {kind.partition('-')[0]}" in made.output


@pytest.mark.parametrize("kind", ["deit-teacher", "clip-projection", "clip-classifier", "siglip", "resnet"])
def test_verify_needs_no_architectures(kind, make_peer, tmp_path) -> None:
    make_peer(f"transformers-{kind}").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": None}))
    assert verify(tmp_path, batch=1).ours.passed


def test_verify_a_siglip_without_its_pooling(make_peer, tmp_path) -> None:
    peer = make_peer("transformers-siglip")
    peer.config.vision_use_head = False
    type(peer)(peer.config).save_pretrained(tmp_path)
    assert verify(tmp_path, batch=1).ours.passed


def test_verify_fails_where_the_numbers_differ(make_peer, tmp_path, monkeypatch) -> None:
    make_peer("transformers-vit").save_pretrained(tmp_path)
    forward = fastvr.ViT.forward
    monkeypatch.setattr(fastvr.ViT, "forward", lambda self, x: forward(self, x) + 1)
    made = runner.invoke(app, ["verify", str(tmp_path)])
    assert made.exit_code == 1
    assert "differs" in made.output
