"""A folder of small images, and runs on it in processes of their own, which tests may kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import training_jobs


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in brightness, a little, 20 images of each, 16 pixels wide."""
    pytest.importorskip("torchvision")
    return training_jobs.make_folder(tmp_path_factory.mktemp("images"), classes=2, images=20)


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """``training_jobs.start``; what still runs at the end of the test is killed."""
    started = []

    def begin(*args: Any, **kwargs: Any) -> Any:
        job = training_jobs.start(*args, **kwargs)
        started.append(job)
        return job

    yield begin
    for job in started:
        if job.is_alive():
            job.kill()
        job.join()


@pytest.fixture
def finish(start: Callable[..., Any]) -> Callable[..., int | None]:
    """Run to its end, and the exit status (minus a signal's number where one ended it)."""

    def run(*args: Any, **kwargs: Any) -> int | None:
        job = start(*args, **kwargs)
        job.join(120)
        return job.exitcode

    return run
