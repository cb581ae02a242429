"""The command line: `python -m pipeline run|plan|check|frontier|...`, installed as `lowbit`."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lowbit.passes.base import PassError
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.recipe.load import find_recipe, load_recipe

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

RecipeName = Annotated[str, typer.Argument(help="A recipe file, or the name of one in recipes/.")]
ModelFolder = Annotated[Path | None, typer.Option(help="Take the checkpoint from this folder instead.")]
StorePlace = Annotated[
    str | None, typer.Option(help="Where finished steps are kept: a folder, or a URL to share them (s3://, ssh://, file://).")
]
Build = Annotated[Path, typer.Option(help="Where results go.")]


@app.command()
def run(recipe: RecipeName, model: ModelFolder = None, build: Build = Path("build"), store: StorePlace = None) -> None:
    """Run a recipe: checkpoint to ONNX to low bits to MNN, checked."""
    from lowbit.pipeline.run.runner import run_recipe
    from lowbit.pipeline.store.shared import store_at

    run_recipe(load_recipe(find_recipe(recipe)), build, model, Console(), store_at(build, store))


@app.command()
def plan(recipe: RecipeName, model: ModelFolder = None, build: Build = Path("build")) -> None:
    """Say what a run would do and how large its result would be; touches nothing."""
    from lowbit.pipeline.commands.plan import make_plan, plan_tables

    for table in plan_tables(make_plan(load_recipe(find_recipe(recipe)), build, model)):
        Console().print(table)


@app.command()
def check(folder: Annotated[Path, typer.Argument(help="A finished folder, build/<recipe>.")]) -> None:
    """Prove a finished folder again: hashes of all files, every code of both models."""
    from lowbit.pipeline.commands.check import check_folder

    found = check_folder(folder)
    print(f"{folder}: {found['files']} files unchanged, {found['weights']:,} codes equal bit for bit.")


@app.command()
def frontier(
    recipe: RecipeName,
    model: ModelFolder = None,
    build: Build = Path("build"),
    points: Annotated[int, typer.Option(min=0, help="At how many sizes the KL divergence is measured.")] = 5,
) -> None:
    """Find how good the model can be at every size, for a recipe with allocate_bits; a table and a picture."""
    from lowbit.pipeline.commands.frontier import frontier as find_frontier

    folder = find_frontier(load_recipe(find_recipe(recipe)), build, model, points, Console())
    print(f"  {folder}/frontier.svg\n  {folder}/frontier.png\n  {folder}/frontier.json")


@app.command()
def measure(
    into: Annotated[Path, typer.Option(help="Where the tables go; recipes in its parent know them by name.")] = Path(
        "recipes/targets"
    ),
    build: Build = Path("build"),
) -> None:
    """Measure how long a product takes at each width here: tables for the target: of allocate_bits."""
    from lowbit.pipeline.commands.measure import measure as measure_here

    measure_here(into, build, Console())


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Finished folders, build/<recipe>.")],
    into: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("build/compare.html"),
) -> None:
    """Show finished results side by side, here and on a page."""
    from lowbit.pipeline.report.comparison import comparison_rows, comparison_table, read_results, write_comparison

    results = read_results(folders)
    rows = comparison_rows(results, {})
    write_comparison(into, results, rows)
    Console().print(comparison_table(rows))
    print(f"  {into}")


@app.command()
def sweep(
    recipe: RecipeName,
    vary: Annotated[list[str], typer.Option(help="An option and its values: passes.quantize_matmul.bits=4,3,2")],
    model: ModelFolder = None,
    build: Build = Path("build"),
    on: Annotated[str | None, typer.Option(help="A Ray cluster, ray://HOST:PORT; its nodes share --build.")] = None,
    store: StorePlace = None,
) -> None:
    """Run every combination of some options and compare them."""
    from lowbit.pipeline.commands.sweep import Runs, read_axes, run_here
    from lowbit.pipeline.commands.sweep import sweep as run_sweep
    from lowbit.pipeline.store.shared import store_at

    runs: Runs = run_here
    if on is not None:
        from lowbit.pipeline.commands.sweep_ray import run_on

        runs = run_on(on)
    axes, place = read_axes(vary), store_at(build, store)
    print(f"  {run_sweep(load_recipe(find_recipe(recipe)), axes, build, model, Console(), runs, place)}")


@app.command()
def chat(
    folder: Annotated[Path, typer.Argument(help="A finished folder, build/<recipe>.")],
    runtime: Annotated[str | None, typer.Option(help="mnn, genai or onnx; by default the first that is there.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this, and end.")] = None,
) -> None:
    """Talk to a finished result."""
    from lowbit.pipeline.commands.chat import answer, open_chat, talk

    opened = open_chat(folder, runtime)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends an answer, not the chat
    if prompt is None:
        talk(opened, Console())
    else:
        answer(opened, prompt, Console())


@app.command()
def doctor(build: Build = Path("build")) -> None:
    """Look whether everything that runs need is here, and say what to do where it is not; status 1 then."""
    from lowbit.pipeline.commands.doctor import examine, findings_table

    findings = examine(build)
    Console().print(findings_table(findings))
    raise typer.Exit(0 if all(well for _, well, _ in findings) else 1)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from lowbit.pipeline.recipe.json_schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


class _Stopped(BaseException):
    """Ctrl-C, by a name that typer does not catch on the way."""


def _stop(*_: object) -> None:
    raise _Stopped


def main() -> None:
    """Run the command line; mistakes of the user end it with status 2 and a sentence."""
    signal.signal(signal.SIGINT, _stop)
    try:
        app()
    except (PipelineError, PassError) as error:
        print("\n".join([f"error: {error}", *(f"  {note}" for note in getattr(error, "__notes__", ()))]), file=sys.stderr)
        sys.exit(2)
    except _Stopped:
        print("\nstopped. What was finished is kept: run again to go on.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
