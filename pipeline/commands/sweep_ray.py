"""`lowbit sweep --on ray://...`: the runs of a sweep on a Ray cluster whose nodes share the build folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lowbit.passes.trust import trust_folders, trusted_folders
from lowbit.pipeline.commands.sweep import Runs, attempt
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.report.plain_text import plain
from lowbit.pipeline.store.store import Store


def run_on(address: str) -> Runs:
    """Runs recipes on the cluster at `address`, each on a node of its own as far as there are any.

    Raises:
        PipelineError: ray is not installed, or there is no cluster.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise PipelineError("ray is not installed: pip install lowbit[ray], here and on every node.") from error

    def runs(recipes: list[Recipe], folder: Path, model: Path | None, store: Store, console: Console) -> dict[str, str]:
        try:
            ray.init(address, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
        except (ConnectionError, ValueError) as error:
            raise PipelineError(f"--on {address}: no Ray cluster answers there: {error}") from error
        try:
            # a run uses every core of a node, so each asks for a whole one
            cores = max(1, min(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"]))
            remote = ray.remote(num_cpus=cores, max_retries=2)(_run)
            there = replace(store, root=store.root.resolve())
            shared = folder.resolve(), None if model is None else model.resolve(), there, trusted_folders()
            waiting = {remote.remote(one.file.resolve(), *shared): one.name for one in recipes}
            failures = {}
            while waiting:
                (done,), _ = ray.wait(list(waiting))
                name = waiting.pop(done)
                try:
                    node, why = ray.get(done)
                except ray.exceptions.RayError as error:
                    node, why = "a node", f"died: {str(error).splitlines()[0]}"
                if why is not None:
                    failures[name] = why
                console.print(plain(f"  {name} {'done' if why is None else f'failed: {why}'} on {node}"))
            return failures
        finally:
            ray.shutdown()

    return runs


def _run(file: Path, folder: Path, model: Path | None, store: Store, plugins: tuple[Path, ...]) -> tuple[str, str | None]:
    """On a node: one recipe; the node, and what went wrong. Folders of `plugins` are trusted there as they are here."""
    import ray

    node = ray.get_runtime_context().get_node_id()[:8]
    try:
        trust_folders(*plugins)
        recipe = load_recipe(file)
    except (PipelineError, OSError) as error:
        return node, str(error)
    return node, attempt(recipe, folder, model, store, Console(quiet=True))
