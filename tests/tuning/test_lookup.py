"""What answers for a shape: the card's own tables, the nearest shape, a sibling's table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastvr.kernels
from fastvr import tuning
from fastvr.tuning import Card, Entry, Table, table

CUDA = torch.device("cuda", 0)
CARD = Card("NVIDIA H100", "sm_90", 132)
CONFIGS = [{"BLOCK_M": size, "num_warps": 4} for size in (64, 128, 256)]


def key(m: int, n: int = 768, dtype: torch.dtype = torch.bfloat16, op: str = "linear") -> str:
    return tuning.key(op, dtype, m=m, n=n)


def entry(ms: float, impl: str = "triton", config: int | None = 0) -> Entry:
    return Entry(impl, None if config is None else CONFIGS[config], ms, None, None)


class Machine:
    """A card, and the folders where tables are looked for."""

    def __init__(self, root: Path) -> None:
        self.shipped, self.own = root / "shipped", root / "cache" / "tuning"

    def put(self, folder: Path, card: Card, entries: dict[str, Entry]) -> Path:
        path = folder / tuning._file_name(card.name)
        table.merge(
            path, Table(card.name, card.architecture, entries, {"multiprocessors": card.multiprocessors})
        )
        tuning.reload()
        return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(tmp_path)
    made.shipped.mkdir()
    monkeypatch.setenv("FASTVR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTVR_TUNING_TABLE", raising=False)
    monkeypatch.setattr(tuning, "_card", lambda index: CARD)
    monkeypatch.setattr(tuning, "table_path", lambda gpu: made.shipped / tuning._file_name(gpu))
    monkeypatch.setattr(tuning, "_measured_here", {})
    table._warn.cache_clear()
    tuning.reload()
    yield made
    tuning.reload()


def ms(table_key: str) -> float | None:
    found = tuning.lookup(table_key, CUDA)
    return None if found is None else found.ms


def test_nothing_measured_leaves_the_default(machine: Machine) -> None:
    assert tuning.lookup(key(64), CUDA) is None
    assert tuning.choice(key(64), CUDA, "reference") == "reference"
    assert tuning.choice(key(64), CUDA, "triton") == "triton"


def test_the_users_entries_win_over_the_shipped_ones(machine: Machine) -> None:
    machine.put(machine.shipped, CARD, {key(64): entry(1.0, "reference"), key(1024): entry(2.0)})
    machine.put(machine.own, CARD, {key(64): entry(3.0)})
    assert (ms(key(64)), ms(key(1024))) == (3.0, 2.0)
    assert tuning.choice(key(64), CUDA, "reference") == "triton"
    tuning.remember(CARD, {key(64): entry(4.0)})
    assert ms(key(64)) == 4.0


def test_one_named_table_stands_instead_of_all(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine.put(machine.own, CARD, {key(64): entry(1.0)})
    named = machine.put(tmp_path / "named", CARD, {key(8): entry(2.0)})
    monkeypatch.setenv("FASTVR_TUNING_TABLE", str(named))
    tuning.reload()
    assert (ms(key(64)), ms(key(8))) == (None, 2.0)
    assert tuning.own_path(CARD.name) == named
    other = machine.put(tmp_path / "named", Card("NVIDIA H200", "sm_90", 132), {key(8): entry(2.0)})
    monkeypatch.setenv("FASTVR_TUNING_TABLE", str(other))
    tuning.reload()
    assert ms(key(8)) is None
    assert "is for NVIDIA H200, and this is NVIDIA H100; it is ignored" in caplog.text


def test_the_nearest_batch_serves_within_a_factor(machine: Machine) -> None:
    machine.put(machine.own, CARD, {key(256): entry(1.0), key(4096): entry(2.0)})
    assert [ms(key(m)) for m in (32, 64, 256, 512, 1024, 2048, 16384, 32768)] == [
        None,
        1.0,
        1.0,
        1.0,
        1.0,
        2.0,
        2.0,
        None,
    ]  # fmt: skip  (1024 lies between: the smaller one)
    assert ms(key(512, n=769)) is None
    assert ms(key(512, dtype=torch.float32)) is None
    assert ms(key(512, op="norm_linear")) is None


def test_batches_1_8_and_64_answer_up_to_256(machine: Machine) -> None:
    def at(batch: int) -> str:
        return tuning.key("attention", torch.float16, b=tuning.bucket(batch), n=197)

    machine.put(machine.own, CARD, {at(batch): entry(batch) for batch in (1, 8, 64)})
    assert all(ms(at(batch)) is not None for batch in range(1, 257))
    assert ms(at(257)) is None


def test_a_size_that_does_not_vary_is_not_bridged(machine: Machine) -> None:
    machine.put(machine.own, CARD, {tuning.key("stem", torch.float16, c=64, m=8): entry(1.0)})
    assert ms(tuning.key("stem", torch.float16, c=64, m=16)) is None
    assert ms(tuning.key("stem", torch.float16, c=128, m=8)) is None


def test_a_sibling_serves_where_the_card_was_not_measured(machine: Machine) -> None:
    near, far = Card("NVIDIA H200", "sm_90", 132), Card("NVIDIA H20", "sm_90", 78)
    machine.put(machine.shipped, near, {key(64): entry(1.0), key(1024): entry(2.0)})
    machine.put(machine.shipped, far, {key(64): entry(9.0), key(8192): entry(9.0)})
    machine.put(machine.own, Card("NVIDIA A100", "sm_80", 132), {key(64): entry(8.0)})
    assert [ms(key(m)) for m in (64, 1024, 8192)] == [1.0, 2.0, None]
    machine.put(machine.own, CARD, {key(64): entry(3.0)})
    # own entries first, near ones too; the sibling for the rest
    assert [ms(key(m)) for m in (64, 16, 1024)] == [3.0, 3.0, 2.0]
    assert tuning.measured(CARD) == {key(64): entry(3.0)}
    assert [(source.table.gpu, source.path is None) for source in tuning.sources(CARD)] == [
        ("NVIDIA H100", False),
        ("NVIDIA H200", False),
    ]


def test_only_a_gpu_is_looked_up(machine: Machine) -> None:
    machine.put(machine.own, CARD, {key(64): entry(1.0)})
    for device in ("cpu", "meta"):
        assert tuning.lookup(key(64), torch.device(device)) is None


def test_tables_are_read_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.put(machine.own, CARD, {key(64): entry(1.0)})
    read = []
    real = table.load
    monkeypatch.setattr(table, "load", lambda *args: (read.append(args), real(*args))[1])
    for m in (64, 64, 128, 8192):
        tuning.lookup(key(m), CUDA)
    once = len(read)
    assert once > 0
    for m in (64, 128, 8192, 32):
        tuning.lookup(key(m), CUDA)
    assert len(read) == once
    tuning.reload()
    tuning.lookup(key(64), CUDA)
    assert len(read) == 2 * once


def config(m: int, candidates: list[tuning.Config], default: tuning.Config) -> tuning.Config:
    return tuning.config("linear", key(m), CUDA, default=lambda: default, candidates=lambda: candidates)


def test_a_configuration_that_the_kernel_no_longer_offers_does_not_run(machine: Machine) -> None:
    machine.put(machine.own, CARD, {key(64): entry(1.0, config=1), key(8): entry(1.0, config=None)})
    assert config(64, CONFIGS, CONFIGS[0]) == CONFIGS[1]
    assert config(128, CONFIGS, CONFIGS[0]) == CONFIGS[1]  # the nearest
    assert config(8, CONFIGS, CONFIGS[0]) == CONFIGS[0]
    for offered in (CONFIGS[:1], [c | {"SPLIT_K": 1} for c in CONFIGS]):
        tuning.reload()
        assert config(64, offered, offered[0]) == offered[0]
    with tuning.force_config("linear", CONFIGS[2]):
        assert config(64, CONFIGS, CONFIGS[0]) == CONFIGS[2]


def test_candidates_are_asked_once_a_shape(machine: Machine) -> None:
    machine.put(machine.own, CARD, {key(64): entry(1.0, config=1)})
    asked = []
    for _ in range(3):
        tuning.config(
            "linear",
            key(64),
            CUDA,
            default=lambda: CONFIGS[0],
            candidates=lambda: (asked.append(1), CONFIGS)[1],
        )
    assert len(asked) == 1


def test_where_the_users_tables_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FASTVR_TUNING_TABLE", raising=False)
    monkeypatch.setenv("FASTVR_CACHE_DIR", str(tmp_path))
    assert tuning.own_path("AMD Instinct MI300X (x)") == tmp_path / "tuning" / "AMD_Instinct_MI300X_x.json"
    monkeypatch.delenv("FASTVR_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.own_path("GPU") == tmp_path / ".cache" / "fastvr" / "tuning" / "GPU.json"

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(tuning.TableError, match="FASTVR_CACHE_DIR"):
        tuning.own_path("GPU")


def test_without_a_home_the_shipped_tables_still_serve(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.put(machine.shipped, CARD, {key(64): entry(1.0)})
    monkeypatch.delenv("FASTVR_CACHE_DIR")

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    tuning.reload()
    assert ms(key(64)) == 1.0


def test_shipped_tables_are_sound() -> None:
    for path in (Path(next(iter(fastvr.kernels.__path__))) / "configs").glob("*.json"):
        assert table.read(path).entries
