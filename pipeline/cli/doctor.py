"""`lowbit doctor`."""

from __future__ import annotations

from pathlib import Path

import typer

from lowbit.pipeline.cli.options import Build, Json, show, show_json


def doctor(build: Build = Path("build"), as_json: Json = False) -> None:
    """Look whether all that runs need is here.

    What to do is said where it is not; status 1 then.
    """
    from lowbit.pipeline import api

    findings = api.doctor(build)
    if as_json:
        show_json([{"name": name, "well": well, "text": text} for name, well, text in findings])
    else:
        show(api.findings_table(findings))
    raise typer.Exit(0 if all(well for _, well, _ in findings) else 1)
