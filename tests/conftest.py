"""Without a GPU every kernel runs in Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import fastvr  # noqa: F401  (after the choice above)
from fastvr.backend import triton_missing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # the interpreter is one thread of Python; more threads in PyTorch only fight over its cores
    torch.set_num_threads(1)
    if triton_missing() is None:
        from fastvr.testing import interpreter

        interpreter.install()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, metavar="N", help="of each test, every Nth of its cases")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every, cases = config.getoption("every"), collections.Counter[str]()
    kept, left = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        # what PyTorch's compiler traces differs most between versions, and from case to case
        skipped = cases[test] % every and not ("compiles" in test or "exports" in test)
        (left if skipped else kept).append(item)
        cases[test] += 1
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite on a CPU takes every core, unless the command line says otherwise."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # a worker's own configuration comes through here too
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if whole and DEVICE == "cpu" and config.pluginmanager.hasplugin("xdist"):
        options = config.option
        if options.numprocesses is None and not options.usepdb and not options.collectonly:
            options.numprocesses = os.cpu_count()


@pytest.fixture(autouse=True, scope="session")
def _no_tables_of_the_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What somebody has tuned on this machine decides no test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTVR_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("FASTVR_TUNING_TABLE", raising=False)
        yield


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """PyTorch lets convolutions use TF32 unless told otherwise, each algorithm of cuDNN's as it likes."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield
