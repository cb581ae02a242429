"""Run every case of the corpus, each in a process of its own: `python -m tests.hostile.run GOOD SCRATCH RESULTS.json`.

A child gets 1 GB of memory beyond what the libraries take and SECONDS; an audit hook notes what it opens outside its folder.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

# before the forks: what every run imports
import optimum.exporters.onnx.convert  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

from lowbit.passes.base import PassError
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.export.exporter import export_graph
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.store.source_digest import source_digest
from lowbit.pipeline.store.store import Store
from tests.hostile import corpus_checkpoints, corpus_onnx  # noqa: F401  (their cases)
from tests.hostile.corpus import CASES, PASSES, REST
from tests.running import know_export, run_in_process

BYTES, SECONDS = 1 << 30, 30
"""Ten seconds are allowed, on a machine that does nothing else; tests share theirs."""


STORE = ".store"
"""Beside the cases: the float export of the good checkpoint, for those that break something else."""


def outcome(name: str, good: Path, folder: Path) -> dict[str, Any]:
    make, _ = CASES[name]
    recipe = make(folder, good)
    opened: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and Path(arguments[0]).resolve() == (folder / "canary").resolve():
            opened.append(arguments[0])

    sys.addaudithook(watch)
    began = time.monotonic()
    try:
        shutil.copytree(folder.parent / STORE, folder / "build" / ".store")
        run_in_process(load_recipe(recipe), folder / "build")
        kind, text = "ran", ""
    except (PipelineError, PassError) as error:
        kind, text = "refused", str(error)
    except BaseException as error:
        kind, text = type(error).__name__, str(error)
    return {"kind": kind, "text": text[:2000], "seconds": time.monotonic() - began, "canary": opened, "ran": _ran(folder)}


def _ran(folder: Path) -> bool:
    """Whether code of the case's own was run: it would have made a folder."""
    return (folder / "ran").exists() or Path("ran").exists()


def in_a_child(name: str, good: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (_size() + BYTES, resource.RLIM_INFINITY))
        signal.alarm(SECONDS)
        result = outcome(name, good, folder)
        result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        content = stream.read()
    _, status = os.waitpid(child, 0)
    return (
        json.loads(content) if content else {"kind": f"died (status {status})", "text": "", "canary": [], "ran": _ran(folder)}
    )


def _size() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def good_recipe(path: Path, good: Path) -> Path:
    path.write_text(f"model: {good}\n{PASSES}\n{REST}\n", "utf-8")
    return path


def main() -> None:
    good, scratch, results = map(Path, sys.argv[1:])
    source_digest(export_graph)  # remembered in every child
    fine = good_recipe(scratch.resolve() / "fine.yaml", good.resolve())
    know_export(load_recipe(fine), Store(scratch.resolve() / STORE))
    found = {name: in_a_child(name, good.resolve(), scratch.resolve() / name) for name in CASES}
    results.write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()
