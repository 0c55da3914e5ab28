"""What the person at the terminal sees while the comparison runs; on stderr, so that stdout can be piped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Step(Protocol):
    def __call__(self, done: float, text: str = "") -> None:
        """``done`` of the phase, from 0 to 1, and what is being done now."""


class Reporter:
    """Progress bars on a terminal, one line a phase elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        self._console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def phase(self, title: str) -> Iterator[Step]:
        if not self._console.is_terminal:
            self._console.print(f"{title} ...", markup=False, highlight=False, soft_wrap=True)
            yield lambda done, text="": None
            return
        progress = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}", style="dim"),
            console=self._console,
        )
        with progress:
            task: TaskID = progress.add_task(title, total=1.0, text="")

            def step(done: float, text: str = "") -> None:
                progress.update(task, completed=min(done, 1.0), text=text)

            yield step
            step(1.0)
