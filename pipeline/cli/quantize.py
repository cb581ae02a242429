"""`lowbit quantize`: a result without a recipe, and the recipe that would have made it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.pipeline.cli.options import Build, Json, Plugins, StorePlace, progress, show, show_json
from lowbit.pipeline.report.plain_text import plain

Model = Annotated[str, typer.Argument(help="A folder, an ONNX file, or a model id on the Hugging Face Hub.")]
Bits = Annotated[int | None, typer.Option(help="2, 3, 4 or 8; 4 if nothing is said.")]
BlockSize = Annotated[int, typer.Option(help="Weights that share one scale: 16, 32, 64, 128 or 256.")]
Method = Annotated[str, typer.Option(help="How codes are chosen: rtn, mse, hqq, gptq, ...")]
Target = Annotated[list[str] | None, typer.Option(help="An engine: mnn-llm, mnn, onnxruntime-genai; may be given again.")]
Fit = Annotated[str | None, typer.Option(help="Choose bits for each weight, so that the result fits: 3.2GB.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="Where the recipe is written; NAME.yaml here by default.")]


def quantize(
    model: Model,
    bits: Bits = None,
    block_size: BlockSize = 64,
    method: Method = "mse",
    target: Target = None,
    fit: Fit = None,
    recipe: RecipeFile = None,
    build: Build = Path("build"),
    store: StorePlace = None,
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """Quantize a model and write the recipe for it.

    What is not said is chosen for the model, and explained.
    """
    from lowbit.pipeline import api

    api.trust_plugins(*plugins or ())
    console = progress(as_json)
    name = None if recipe is None else recipe.stem
    made = api.recipe_for(model, bits=bits, block_size=block_size, method=method, fit=fit, convert=target, name=name)
    file = made.save_new(recipe or Path(f"{made.name}.yaml"))
    for sentence in made.said:
        console.print(plain(f"  {sentence}"))
    console.print(plain(f"  {file} is the recipe: change it, and `lowbit run {file}`"), soft_wrap=True)
    result = made.run(build, store=store, console=console)
    if as_json:
        show_json(result.figures() | {"recipe_file": file, "chosen": made.said})
    elif console.quiet:
        show(str(result.folder))
