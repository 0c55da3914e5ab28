"""The file of measured choices: what is wrong with it is named, and writers never lose each other's work."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastvr.tuning import Entry, Table, TableError, table

ROOT = Path(__file__).resolve().parents[2]
CARD = "NVIDIA H200"
ENTRY = Entry("triton", {"BLOCK_M": 64, "num_warps": 4}, 0.5, 0.75, 1.0, True, "fastvr 1")


def make(entries: dict[str, Entry], gpu: str = CARD) -> Table:
    return Table(gpu, "sm_90", entries, {"versions": {"triton": "3.9.0"}, "multiprocessors": 132})


def write(path: Path, content: Any) -> None:
    """Content with the checksum that belongs to it."""
    path.write_text(json.dumps(content | {"checksum": table._checksum(content)}))


def content_of(entries: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return {"format": 1, "gpu": CARD, "architecture": "sm_90", "entries": entries} | changed


@pytest.fixture(autouse=True)
def _warn_anew() -> None:
    table._warn.cache_clear()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    reference = Entry("reference", None, 1e-3, None, 1e-3, complete=False)
    written = make({"b|x|m1": ENTRY, "a|x|m1": reference})
    path = tmp_path / "new" / "table.json"
    table.merge(path, written)
    assert table.read(path, CARD) == written
    content = json.loads(path.read_text())
    assert list(content["entries"]) == ["a|x|m1", "b|x|m1"]
    assert content["versions"] == {"triton": "3.9.0"}
    assert sorted(p.name for p in path.parent.iterdir()) == [".table.json.lock", "table.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "unreadable"),
        (b"\xff\xfe", "unreadable"),
        (b'{"format": 1, "gpu"', "unreadable"),
        (b"[" * 100_000, "unreadable"),
        (b"[1]", "names no format"),
        (b'{"gpu": "NVIDIA H200", "entries": {}}', "names no format"),
        (b'{"format": 0}', "names no format"),
        (b'{"format": 2, "anything": "else"}', "newer than 1"),
        (json.dumps(content_of({}, checksum="0" * 64)).encode(), "checksum does not match"),
        (json.dumps(content_of({})).encode(), "checksum does not match"),
    ],
)
def test_a_table_that_cannot_be_used_is_named_once_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: bytes, words: str
) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(text)
    with caplog.at_level(logging.WARNING, logger="fastvr"):
        assert table.load(path, CARD) is None
        assert table.load(path, CARD) is None
    (message,) = caplog.messages
    assert str(path) in message
    assert words in message


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"gpu": "NVIDIA A100"}, "is for NVIDIA A100"),
        ({"gpu": None}, "lacks its gpu"),
        ({"entries": [1]}, "lacks its gpu, architecture or entries"),
        ({"architecture": 90}, "lacks its gpu, architecture or entries"),
    ],
)
def test_a_sound_file_of_something_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changed: dict[str, Any], words: str
) -> None:
    write(tmp_path / "table.json", content_of({}) | changed)
    assert table.load(tmp_path / "table.json", CARD) is None
    assert words in caplog.text


def test_a_directory_in_its_place_is_unreadable(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert table.load(tmp_path) is None
    assert "unreadable" in caplog.text
    assert table.load(tmp_path / "none.json") is None
    assert len(caplog.messages) == 1  # no table at all is nothing to warn of


@pytest.mark.parametrize(
    "wrong",
    [
        {"impl": "cudnn"},
        {"config": [1]},
        {"config": {"BLOCK_M": "64"}},
        {"ms": None},
        {"ms": -1.0},
        {"ms": float("nan")},
        {"ms": float("inf")},
        {"ms": True},
        {"runner_up_ms": "1"},
        {"reference_ms": 0},
        {"complete": 1},
        {"versions": 1},
    ],
    ids=str,
)
def test_a_wrong_entry_goes_with_its_name_and_the_others_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wrong: dict[str, Any]
) -> None:
    path = tmp_path / "table.json"
    write(path, content_of({"good|k|m1": vars(ENTRY), "bad|k|m1": vars(ENTRY) | wrong, "worse": 7}))
    found = table.load(path, CARD)
    assert found is not None
    assert found.entries == {"good|k|m1": ENTRY}
    (message,) = caplog.messages
    assert f"bad|k|m1 ({next(iter(wrong))} is" in message
    assert "worse (it is no object)" in message


def test_a_time_that_no_float_holds(tmp_path: Path) -> None:
    write(tmp_path / "table.json", content_of({"good": vars(ENTRY), "bad": vars(ENTRY) | {"ms": 10**400}}))
    assert table.read(tmp_path / "table.json").entries == {"good": ENTRY}


def test_brackets_as_deep_as_can_be_read_are_no_error(tmp_path: Path) -> None:
    """Writing them for the checksum goes deeper than reading them."""
    path = tmp_path / "table.json"
    for depth in range(400, 1000):
        path.write_text('{"format": 1, "deep": ' + "[" * depth + "]" * depth + "}")
        assert table.load(path, CARD) is None


def test_fields_of_a_newer_fastvr_are_no_fault(tmp_path: Path) -> None:
    write(tmp_path / "table.json", content_of({"k|k|m1": vars(ENTRY) | {"energy": 3}}, owner="somebody"))
    found = table.read(tmp_path / "table.json")
    assert found.entries == {"k|k|m1": ENTRY}
    assert found.header == {"owner": "somebody"}


# ------------------------------------------------------------------------------------------- writing


def test_merging_adds_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    faster = dataclasses.replace(ENTRY, ms=0.25)
    table.merge(path, make({"a": ENTRY, "b": ENTRY}))
    whole = table.merge(path, make({"b": faster, "c": ENTRY}))
    assert whole.entries == {"a": ENTRY, "b": faster, "c": ENTRY}
    assert table.read(path).entries == whole.entries


def test_an_incomplete_entry_leaves_a_complete_one_of_the_same_versions(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    part = dataclasses.replace(ENTRY, ms=0.1, complete=False)
    table.merge(path, make({"same": ENTRY, "other": dataclasses.replace(ENTRY, versions="fastvr 0")}))
    table.merge(path, make({"same": part, "other": part}))
    assert table.read(path).entries == {"same": ENTRY, "other": part}
    table.merge(path, make({"other": ENTRY}))
    assert table.read(path).entries["other"] == ENTRY


def test_a_damaged_file_is_replaced_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "table.json"
    path.write_text("{")
    table.merge(path, make({"a": ENTRY}))
    assert table.read(path).entries == {"a": ENTRY}
    assert "it is replaced" in caplog.text


@pytest.mark.parametrize("changed", [{"format": 2}, {"gpu": "NVIDIA A100"}])
def test_what_is_not_ours_is_left_alone(tmp_path: Path, changed: dict[str, Any]) -> None:
    path = tmp_path / "table.json"
    write(path, content_of({}, **changed))
    before = path.read_bytes()
    with pytest.raises(TableError, match="left as it is"):
        table.merge(path, make({"a": ENTRY}))
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    table.merge(path, make({"a": ENTRY}))

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(TableError, match=r"\(No space left on device\): FASTVR_CACHE_DIR"):
            table.merge(path, make({"b": ENTRY}))
    assert table.read(path).entries == {"a": ENTRY}
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


def test_a_place_that_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TableError, match="cannot be written"):
        table.merge(tmp_path / "file" / "table.json", make({}))


def test_a_lock_that_another_process_holds(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table.merge(path, make({"a": ENTRY}))
    with table._locked(path, 1.0), pytest.raises(TableError, match="another process has held"):
        table.merge(path, make({"b": ENTRY}), wait=0.05)
    table.merge(path, make({"b": ENTRY}), wait=0.05)
    assert set(table.read(path).entries) == {"a", "b"}


_WRITER = """
import os, signal, sys
from pathlib import Path
from fastvr.tuning import Entry, Table, table
path, name, count, kill = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "kill"
print("ready", flush=True)
sys.stdin.readline()
if kill:
    os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
for i in range(count):
    table.merge(path, Table("NVIDIA H200", "sm_90", {f"{name}{i}": Entry("reference", None, 1.0, None, 1.0)}))
"""


def _writers(path: Path, *arguments: tuple[str, int, str]) -> list[int]:
    """The exit statuses of processes that write at once."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), name, str(count), kill],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name, count, kill in arguments
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
    return [process.returncode for process in processes]


def test_two_processes_at_once_both_keep_their_entries(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    assert _writers(path, ("a", 30, ""), ("b", 30, "")) == [0, 0]
    assert set(table.read(path).entries) == {f"{name}{i}" for name in "ab" for i in range(30)}


def test_a_kill_while_writing_leaves_the_old_file_and_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table.merge(path, make({"a": ENTRY}))
    assert _writers(path, ("b", 1, "kill")) == [-signal.SIGKILL]
    assert table.read(path).entries == {"a": ENTRY}
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    table.merge(path, make({"c": ENTRY}), wait=1.0)
    assert set(table.read(path).entries) == {"a", "c"}
    assert not list(tmp_path.glob(".*.tmp"))
