"""The ``fastvr`` command. ``python -m fastvr`` is the same."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Run the command line, or say in one line what it needs."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"fastvr: the command line needs {' and '.join(missing)}: pip install 'fastvr[cli]'",
            file=sys.stderr,
        )
        raise SystemExit(2)
    from fastvr.cli import app

    app()


if __name__ == "__main__":
    main()
