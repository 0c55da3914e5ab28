"""``fastvr train`` as a person meets it: what it leaves, and what it says to a mistake."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from typer.testing import CliRunner, Result

import fastvr
from fastvr.cli import app
from fastvr.models import checkpointing
from fastvr.train import checkpoint, data, models, record, run
from fastvr.train.optimize import decay_groups, warm_up_cosine
from fastvr.train.settings import Settings, complete

pytest.importorskip("sklearn")
CPU = torch.device("cpu")
SHORT = ("--epochs", "2", "--val-share", "0.9", "--device", "cpu")  # 8 steps in all


def train(*args: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, args)], env={"COLUMNS": "100"})


def mistake(*args: object) -> str:
    """The one line that ``fastvr train`` says to a mistake."""
    result = train(*args)
    assert result.exit_code == 2, result.output
    (error,) = (line for line in result.stderr.splitlines() if line.startswith("fastvr: "))
    return error


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on the digits, by the command line."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    result = train(*SHORT, "--out", out)
    assert result.exit_code == 0, result.output
    assert "of the validation images right after 4 steps (2 epochs)" in result.stdout
    assert "epoch   2/2  step 4/4" in result.stderr
    return out


def test_a_run_leaves_weights_with_a_card_losses_and_a_curve(done: Path) -> None:
    card = json.loads((done / "model.json").read_text())
    assert card["classes"] == [str(digit) for digit in range(10)]
    assert card["arguments"]["epochs"] == 2
    with (done / "losses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [bool(row["val_accuracy"]) for row in rows] == [False, True, False, True]
    model = fastvr.train.load(done)
    loaded = data.load(complete({"val_share": 0.9}, CPU), models.preprocessing("vit_mini", 8))
    images, labels = zip(*(loaded.val[i, 0] for i in range(loaded.sizes[1])), strict=True)
    with torch.no_grad():
        hits = int((model(torch.stack(images)).argmax(-1) == torch.tensor(labels)).sum())
    assert hits / loaded.sizes[1] == float(rows[-1]["val_accuracy"]) == card["validation_accuracy"]
    again = fastvr.load_model(done)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("model", models.MINI)
def test_checkpointed_blocks_give_the_same_losses(
    model: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and the same weights; it may be asked for, or not, when a run is resumed."""
    recomputed, original = [], checkpointing.recomputed

    def noted(function: Any, x: torch.Tensor, block: torch.nn.Module) -> torch.Tensor:
        recomputed.append(block)
        return original(function, x, block)

    monkeypatch.setattr("fastvr.models._model.recomputed", noted)
    given = ("--model", model, "--data", folder, "--image-size", 16, "--device", "cpu", "--workers", 0)
    for name, options in (("plain", ()), ("checkpointed", ("--grad-checkpointing",))):
        result = train(*given, "--epochs", 1, "--batch-size", 16, "--out", tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        assert bool(recomputed) == bool(options)
    plain, checkpointed = tmp_path / "plain", tmp_path / "checkpointed"
    assert (plain / "losses.csv").read_bytes() == (checkpointed / "losses.csv").read_bytes()
    weights, same = (load_file(path / "model.safetensors") for path in (plain, checkpointed))
    assert weights.keys() == same.keys()
    for name, tensor in weights.items():
        assert torch.equal(same[name], tensor), name
    assert train("--out", checkpointed, "--resume").exit_code == 0


def test_the_curve_is_an_image(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [record.Row(step, 1, 0.1, 1 / step) for step in range(1, 80)]
    rows.append(record.Row(80, 1, 0.1, 0.01, 0.5, 0.9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # letters that no font of matplotlib's has
        assert record.draw(rows, tmp_path / "curve.png", "猫") is None
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size == (960, 540)


def test_the_curve_has_room_for_a_validation_loss_above_all_others(tmp_path: Path, monkeypatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure,
        "savefig",
        lambda self, *args, **given: (drawn.append(self), save(self, *args, **given)),
    )
    rows = [
        record.Row(1, 1, 0.1, 0.5),
        record.Row(2, 1, 0.1, 0.4, 3.0, 0.2),
        record.Row(3, 2, 0.1, 0.3, 2.0, 0.3),
    ]
    record.draw(rows, tmp_path / "curve.png", "overfitting")
    assert drawn[0].axes[0].get_ylim()[0] == 0
    assert drawn[0].axes[0].get_ylim()[1] >= 3


def test_a_complete_run_can_be_resumed(done: Path) -> None:
    before = (done / "losses.csv").read_bytes(), (done / "model.safetensors").read_bytes()
    result = train("--out", done, "--resume")
    assert result.exit_code == 0, result.output
    assert "the run is complete already" in result.stderr
    assert ((done / "losses.csv").read_bytes(), (done / "model.safetensors").read_bytes()) == before


def test_resuming_with_other_arguments_names_them(done: Path) -> None:
    error = mistake("--out", done, "--resume", "--lr", 0.5, "--epochs", 2, "--ema", 0.9)
    assert "--lr was 0.002, is 0.5; --ema was 0.0, is 0.9" in error
    assert "--epochs" not in error
    assert "--data was 'digits'" in mistake("--out", done, "--resume", "--data", "photos")


def test_a_folder_with_a_run_is_left_alone(done: Path, tmp_path: Path) -> None:
    assert "holds a run already; go on with it by --resume" in mistake("--out", done)
    (tmp_path / "model.safetensors").touch()
    assert "holds a run already" in mistake("--out", tmp_path)


def test_a_damaged_checkpoint(done: Path, tmp_path: Path) -> None:
    whole = (done / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    assert "checkpoint.pt: torch.load(weights_only=True) cannot read it" in mistake(
        "--out", tmp_path, "--resume"
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "vit_enormous"], "--model must be one of vit_mini, resnet_mini,"),
        (["--data", "no/such/folder"], "--data no/such/folder: no such folder"),
        (["--epochs", "0"], "--epochs must be more than 0; got 0"),
        (["--lr", "nan"], "--lr must be more than 0; got nan"),
        (["--warmup", "30"], "--warmup must be from 0 to below the 30 epochs; got 30.0"),
        (["--label-smoothing", "1"], "--label-smoothing must be from 0 to below 1; got 1.0"),
        (["--ema", "1"], "--ema must be from 0 to below 1"),
        (["--optimizer", "lion"], "--optimizer must be adamw or sgd; got 'lion'"),
        (["--amp", "fp8"], "--amp must be off or bf16 or fp16; got 'fp8'"),
        (
            ["--image-size", "9"],
            "--model vit_mini, --image-size 9: vit_mini: image_size must be a multiple of 4; got 9",
        ),
        (["--device", "tpu"], "--device tpu"),
        (["--new-head"], "--new-head is for the weights of a --checkpoint"),
        (["--fsdp"], "--fsdp spreads weights over processes, and there is one"),
        (["--save-every", "-1"], "--save-every must be 0 or more steps; got -1"),
        (["--workers", "-1"], "--workers must be 0 or more; got -1"),
        (["--seed", str(2**64)], "--seed must be from 0 to below 2**64; got 18446744073709551616"),
        (["--val-share", "0.999"], "--val-share 0.999 leaves no digits to learn from"),
        (["--val-share", "0.001"], "--val-share 0.001 leaves no digits to validate on"),
        (["--timeout", "0"], "--timeout must be more than 0 seconds; got 0.0"),
        (["--checkpoint", "none.safetensors"], "--checkpoint: none.safetensors: no such checkpoint"),
        (["--model", "resnet_mini", "--batch-size", "1"], "leaves BatchNorm a last map of 1x1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_leave_nothing(args: list[str], words: str, tmp_path: Path) -> None:
    assert words in mistake(*args, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is not a folder" in mistake("--out", tmp_path / "file")
    assert "is not writable" in mistake("--out", tmp_path / "file" / "below", *SHORT)


def test_one_image_at_1x1_in_training_is_refused_as_torch_does() -> None:
    model = models.create("resnet_mini", 10, 3, 32).train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.zeros(1, 3, 32, 32))


def test_another_number_of_classes_takes_a_new_head(done: Path, folder: Path, tmp_path: Path) -> None:
    other = models.create("vit_mini", 7, 1, 8)
    torch.save(other.state_dict(), tmp_path / "seven.pt")
    args = ("--out", tmp_path / "out", "--checkpoint", tmp_path / "seven.pt", *SHORT)
    error = mistake(*args)
    assert "7 classes" in error
    assert "(the images have 10); --new-head" in error
    settings = Settings(tmp_path / "new", {"checkpoint": str(tmp_path / "seven.pt"), "new_head": True})
    built = run._Run(settings, run.World(0, 1, CPU), None)._parts.model.state_dict()
    assert built["head.weight"].shape == (10, 96)
    for name, tensor in other.state_dict().items():
        assert name.startswith("head.") or torch.equal(built[name], tensor), name


def test_a_new_head_on_what_has_none_or_other_names_or_lies_in_a_folder(tmp_path: Path) -> None:
    headless = models.create("vit_mini", 0, 1, 8)
    fastvr.save_model(headless, tmp_path / "headless", "transformers")
    fastvr.save_model(models.create("vit_mini", 7, 1, 8), tmp_path / "seven", "torchvision")
    for name in ("headless", "seven"):
        given = {"checkpoint": str(tmp_path / name), "new_head": True}
        model = run._Run(Settings(tmp_path / "out", given), run.World(0, 1, CPU), None)._parts.model
        assert model.state_dict()["head.weight"].shape == (10, 96)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's writer would name the byte at which it stood."""

    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    content = {"x": torch.zeros(9)}
    monkeypatch.setattr(checkpoint, "save", lambda *args, **named: checkpoint._write(content, Full()))
    result = train(*SHORT, "--out", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "fastvr: [Errno 28] No space left on device"


def test_losses_that_are_not_from_the_first_step_on(tmp_path: Path) -> None:
    """Somebody moved the table away: what was not yet saved is still cut, once."""
    path = tmp_path / "losses.csv"
    losses = record.Losses(path, 4)
    losses.add([record.Row(step, 1, 0.1, 1.0) for step in range(5, 10)])
    with path.open("a") as file:
        file.write("10,1,0.")
    assert [row.step for row in record.Losses(path, 7).rows] == [5, 6, 7]


def test_a_nan_stops_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = run._Run._one_step

    def breaks(self: Any, images: torch.Tensor, *args: Any) -> torch.Tensor:
        return step(self, images * math.nan if self._step == 6 else images, *args)

    monkeypatch.setattr(run._Run, "_one_step", breaks)
    result = train(*SHORT, "--batch-size", 32, "--out", tmp_path)
    assert result.exit_code == 1
    assert "fastvr: the loss is nan at step 7 (epoch 2); the checkpoint of step 5 is kept" in result.stderr
    found = checkpoint.read(tmp_path)
    assert found is not None
    assert found["step"] == 5
    assert all(t.isfinite().all() for t in found["model"].values())
    assert (tmp_path / "losses.csv").read_text().splitlines()[-1].startswith("6,2,")


def test_weights_that_are_lost_with_a_finite_loss_replace_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = run._Run._one_step

    def breaks(self: Any, *args: Any) -> torch.Tensor:
        loss = step(self, *args)
        if self._step == 3:  # the last before a checkpoint
            self._parts.model.head.bias.data[0] = math.inf
        return loss

    monkeypatch.setattr(run._Run, "_one_step", breaks)
    with pytest.raises(
        FloatingPointError, match=r"a weight is NaN or infinite after step 4 .*; the checkpoint"
    ):
        run.train(Settings(tmp_path, {"epochs": 1, "val_share": 0.8}, save_every=4, device="cpu"))
    assert (checkpoint.read(tmp_path) or {})["step"] == 0


# ---------------------------------------------------------------------------------------- folders


def test_folders_without_classes(tmp_path: Path, folder: Path) -> None:
    assert "one subfolder with images for each class" in mistake(
        "--data", tmp_path, "--out", tmp_path / "out"
    )
    (tmp_path / "empty").mkdir()
    assert "one subfolder with images for each class" in mistake(
        "--data", tmp_path, "--out", tmp_path / "out"
    )
    (tmp_path / "empty").rmdir()
    (tmp_path / "class0").symlink_to(folder / "class0")
    assert "holds one class, 'class0'" in mistake("--data", tmp_path, "--out", tmp_path / "out")
    split = tmp_path / "split"
    split.mkdir()
    (split / "train").symlink_to(folder)
    assert "has train/, but no val/" in mistake("--data", split, "--out", tmp_path / "out")
    (split / "val").symlink_to(tmp_path)
    assert "only one has class1" in mistake("--data", split, "--out", tmp_path / "out")


def test_names_that_are_no_text(folder: Path, tmp_path: Path) -> None:
    images = os.fsencode(tmp_path / "images")
    os.mkdir(images)
    for name, source in ((b"\xff\xfe", "class0"), ("größe 猫".encode(), "class1")):
        os.symlink(folder / source, os.path.join(images, name))
    result = train("--data", os.fsdecode(images), "--out", tmp_path / "out", "--image-size", 8, "--epochs", 1)
    assert result.exit_code == 0, result.output
    card = json.loads((tmp_path / "out" / "model.json").read_text())
    assert card["classes"] == ["größe 猫", os.fsdecode(b"\xff\xfe")]
    assert train("--out", tmp_path / "out", "--resume").exit_code == 0


def test_an_unreadable_image_is_named(folder: Path, tmp_path: Path) -> None:
    for label in ("class0", "class1"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for path in (folder / label).iterdir():
            (tmp_path / "images" / label / path.name).write_bytes(path.read_bytes())
    bad = tmp_path / "images" / "class1" / "7.png"
    bad.write_bytes(bad.read_bytes()[:60])
    for workers in (0, 1):
        error = mistake("--data", tmp_path / "images", "--out", tmp_path / str(workers), "--workers", workers)
        assert f"{bad}: cannot be read as an image" in error


def test_what_the_model_sees_depends_on_the_seed_alone(folder: Path) -> None:
    arguments = complete({"data": str(folder), "image_size": 16}, CPU)
    loaded = data.load(arguments, models.preprocessing("vit_mini", 16))
    train, val = loaded.sizes
    assert (train, val, loaded.classes, loaded.in_chans) == (36, 4, ("class0", "class1"), 3)

    def epoch(
        number: int, first: int = 0, rank: int = 0, processes: int = 1, workers: int = 0
    ) -> torch.Tensor:
        order = data.TrainBatches(train, 8, 0, rank, processes)
        order.epoch, order.first = number, first
        batches: DataLoader[Any] = data.loader(loaded.train, order, workers, pin=False)
        return torch.stack([images for images, _ in batches])

    torch.manual_seed(1)
    whole = epoch(0)
    assert whole.dtype == torch.uint8
    assert whole.shape == (4, 8, 3, 16, 16)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(epoch(0, first=1, workers=2), whole[1:])
    assert torch.equal(torch.cat([epoch(0, rank=rank, processes=2) for rank in (0, 1)], 1), whole)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(epoch(1), whole)
    seen = [key for rank in range(3) for batch in data.ValBatches(val, 2, rank, 3) for key in batch]
    assert sorted(row for row, epoch in seen if epoch >= 0) == list(range(val))
    assert len(seen) == 6  # as many from every process
    assert loaded.val[0, -1][1] == -1


# ------------------------------------------------------------------------------------ arithmetic


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [warm_up_cosine((step + 0.5) / 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 0.5) / 10 for step in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5, abs=0.02)
    assert 0 < rates[-1] < 1e-3
    assert warm_up_cosine(0.0, 0.0) == 1.0


def test_what_has_one_dimension_or_is_a_position_does_not_decay() -> None:
    model = models.create("vit_mini", 10, 1, 8)
    model.head.requires_grad_(False)
    decay, plain = decay_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    decays = {names[id(p)] for p in decay["params"]}
    assert decays == {
        name
        for name in names.values()
        if name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"))
    }
    assert len(decay["params"]) + len(plain["params"]) == len(names) - 2


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_with_the_gradients_scaled(amp: str, folder: Path, tmp_path: Path) -> None:
    given = {"data": str(folder), "image_size": 8, "batch_size": 6, "epochs": 2, "mixup": 0.2, "amp": amp}
    ended = run.train(Settings(tmp_path, given, device="cpu", workers=0))
    losses = [row.loss for row in record.Losses(tmp_path / "losses.csv", ended.steps).rows]
    assert len(losses) == ended.steps == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    scaler = (checkpoint.read(tmp_path) or {})["scaler"]
    assert bool(scaler) == (amp == "fp16")
