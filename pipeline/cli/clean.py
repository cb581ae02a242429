"""`lowbit clean`."""

from __future__ import annotations

from pathlib import Path

from lowbit.pipeline.cli.options import Build, show


def clean(build: Build = Path("build")) -> None:
    """Remove all results; refused while a run works with them."""
    from lowbit.pipeline.commands.clean import clean_build

    if left := clean_build(build):
        show(f"{build}: left {', '.join(left)}, which no run made")
