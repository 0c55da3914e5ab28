"""The compile cache that travels: packed small, adopted anywhere, and hit by Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_cache
import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]

COMPILE = """
import sys
from pathlib import Path
sys.path[:0] = [{bench!r}, {root!r}]
import gpu_cache
if len(sys.argv) > 1:
    print(gpu_cache.adopt(Path(sys.argv[1])))
import cases, launches
hits = gpu_cache.Hits()
hits.listen()
case = cases.Case.of("layer_norm", "cached", batch=4, tokens=3, dim=768)
for job in launches.sweep(case, "bfloat16", "sm_90")[:2]:
    for launch in launches.record_job(job):
        compiled = launches.compile_launch(launch, "sm_90")
        assert compiled.asm["cubin"]
print(hits)
"""


def _compile(*argv: str, **environment: str) -> str:
    code = COMPILE.format(bench=str(ROOT / "bench"), root=str(ROOT))
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, env=kept | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_triton_hits_a_cache_that_was_packed_moved_and_adopted(tmp_path: Path) -> None:
    made, packed, moved = tmp_path / "made", tmp_path / "packed", tmp_path / "moved"
    assert _compile(TRITON_CACHE_DIR=str(made)).startswith("0 kernels from the cache, 2 compiled")
    size = gpu_cache.pack(made, packed, arch="sm_90")
    whole = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
    assert 0 < size < whole
    assert not [file for file in packed.rglob("*") if file.suffix in (".ptx", ".ttir", ".llir")]
    made.rename(tmp_path / "gone")
    packed.rename(moved)
    assert "2 kernels from the cache, 0 compiled" in _compile(str(moved), TMPDIR=str(tmp_path))


def _fake(folder: Path, size: int = 10) -> Path:
    (folder / "abc").mkdir(parents=True)
    files = {name: folder / "abc" / name for name in ("k.json", "k.cubin", "k.ptx")}
    for file in files.values():
        file.write_bytes(b"x" * size)
    group = {"child_paths": {name: str(file) for name, file in files.items()}}
    (folder / "abc" / "__grp__k.json").write_text(json.dumps(group))
    return folder


def test_a_cache_past_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_cache, "LIMIT_BYTES", 15)
    with pytest.raises(ValueError, match="MB"):
        gpu_cache.pack(_fake(tmp_path / "a"), tmp_path / "b")


def test_another_tritons_cache_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    packed = tmp_path / "b"
    gpu_cache.pack(_fake(tmp_path / "a"), packed)
    manifest = json.loads((packed / gpu_cache.MANIFEST).read_text())
    (packed / gpu_cache.MANIFEST).write_text(json.dumps(manifest | {"triton": "0.1"}))
    assert "another machine" in gpu_cache.adopt(packed)
    assert "no compile cache" in gpu_cache.adopt(tmp_path / "missing")
    assert "TRITON_CACHE_DIR" not in os.environ
