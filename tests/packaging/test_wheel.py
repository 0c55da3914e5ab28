"""The wheel, installed elsewhere, imported from outside and from the root of the checkout.

`kernels` is also a package of Hugging Face's: ours must never answer to that name.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECK = """
import importlib.util
import fastvr, fastvr.kernels, fastvr.backend
other = importlib.util.find_spec("kernels")
assert other is None or "fastvr" not in (other.origin or "")
print(fastvr.__file__)
if fastvr.backend.triton_missing() is None:
    import fastvr.kernels.linear
    print(fastvr.kernels.linear.__file__)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel; its dependencies come from the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # a build writes into its source tree: leave the checkout alone
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.decode().split("\0")):
        path = ROOT / name
        if not path.exists() and not path.is_symlink():
            continue
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            target.symlink_to(path.readlink())
        else:
            target.write_bytes(path.read_bytes())
    build = [sys.executable, "-c", "from setuptools import build_meta; print(build_meta.build_wheel('..'))"]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def _import(site: Path, cwd: Path) -> list[str]:
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n{CHECK}"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_wheel_holds_every_package_and_nothing_else(site: Path) -> None:
    tops = {path.name for path in site.iterdir()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"fastvr"}
    package = ROOT / "fastvr"
    sources = {p.relative_to(package) for p in package.rglob("*.py") if "kernels" not in p.parts}
    shipped = {p.relative_to(site / "fastvr") for p in (site / "fastvr").rglob("*.py")}
    assert sources <= shipped
    kernels = {p.name for p in (ROOT / "kernels").glob("*.py")}
    assert kernels == {p.name for p in (site / "fastvr" / "kernels").glob("*.py")}
    assert not (site / "fastvr" / "kernels" / "__init__.py").exists()


def test_import_from_outside(site: Path, tmp_path: Path) -> None:
    for origin in _import(site, tmp_path):
        assert origin.startswith(str(site))


def test_import_from_the_root_of_the_checkout(site: Path) -> None:
    # the current folder is not on the path of `python -c` with a leading insert: the wheel wins
    for origin in _import(site, ROOT):
        assert origin.startswith(str(site))


def test_symlink_serves_the_checkout() -> None:
    link = ROOT / "fastvr" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_beside_hugging_faces_kernels(tmp_path: Path) -> None:
    """A package called `kernels` on the path, as Hugging Face's, stays what it is."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("OTHER = True\n")
    code = (
        "import kernels, fastvr.kernels.common; "
        "assert kernels.OTHER; assert not hasattr(fastvr.kernels, 'OTHER')"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_tables_of_measured_choices_ship(site: Path, tmp_path: Path) -> None:
    """Where the wheel looks for a GPU's table is where it puts those of the checkout."""
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); from fastvr import tuning; "
        "print(tuning.table_path('Some GPU'))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.strip()).parent
    assert folder == site / "fastvr" / "kernels" / "configs"
    expected = {path.name for path in (ROOT / "kernels" / "configs").glob("*.json")}
    assert expected == {path.name for path in folder.glob("*.json")}
