"""Run every case of the corpus, a share of them for each core: `python -m tests.hostile.run GOOD SCRATCH RESULTS.json`.

A case gets 1 GB of memory beyond what the libraries take and SECONDS; an audit hook notes what it opens outside its folder.
What would run in a fresh interpreter is a fork, too.
"""

from __future__ import annotations

import gc
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
import onnxruntime  # noqa: F401
import optimum.exporters.onnx.convert  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
import transformers.utils.chat_template_utils  # noqa: F401

from lowbit.passes.base import PassError
from lowbit.passes.quant.parallel import core_count
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.export.exporter import export_graph
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.store.source_digest import source_digest
from lowbit.pipeline.store.store import Store
from tests.hostile import corpus_checkpoints, corpus_onnx  # noqa: F401  (their cases)
from tests.hostile.corpus import CASES, PASSES, REST
from tests.hostile.forked import fork_workers
from tests.running import know_export, run_in_process

BYTES, SECONDS = 1 << 30, 30
"""Ten seconds are allowed, on a machine that does nothing else; tests share theirs."""


STORE = ".store"
"""Beside the cases: the float export of the good checkpoint, for those that break something else."""


def outcome(name: str, good: Path, folder: Path, canary: Canary) -> dict[str, Any]:
    make, _ = CASES[name]
    recipe = make(folder, good)
    canary.watch(folder / "canary")
    signal.alarm(SECONDS)
    began = time.monotonic()
    try:
        shutil.copytree(folder.parent / STORE, folder / "build" / ".store")
        run_in_process(load_recipe(recipe), folder / "build")
        kind, text = "ran", ""
    except (PipelineError, PassError) as error:
        kind, text = "refused", str(error)
    except BaseException as error:
        kind, text = type(error).__name__, str(error)
    signal.alarm(0)
    return {
        "kind": kind, "text": text[:2000], "seconds": time.monotonic() - began, "canary": canary.opened, "ran": _ran(folder),
        # of this case or one before it, by this process or a worker
        "peak": 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)),
    }  # fmt: skip


class Canary:
    """Notes who opens a file, under whatever name; a hook cannot be taken away again."""

    def __init__(self) -> None:
        self.watch(Path())
        sys.addaudithook(self._hear)

    def watch(self, file: Path) -> None:
        """Look at this file from now on, and at no other."""
        self.file, self.opened = file.resolve(), list[str]()

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and Path(arguments[0]).resolve() == self.file:
            self.opened.append(arguments[0])


def _ran(folder: Path) -> bool:
    """Whether code of the case's own was run: it would have made a folder."""
    return (folder / "ran").exists() or Path("ran").exists()


def in_children(good: Path, scratch: Path) -> dict[str, dict[str, Any]]:
    """The outcome of every case: a child for each core takes its share, and where it dies of a case another takes the rest."""
    shares = [list(CASES)[core :: core_count()] for core in range(core_count())]
    running = {_start(share, good, scratch): share for share in shares}
    while running:
        child, status = os.wait()
        share = running.pop(child)
        left = [name for name in share if not _result(scratch / name).exists()]
        if left:
            died = {"kind": f"died (status {status})", "text": "", "canary": [], "ran": _ran(scratch / left[0])}
            _result(scratch / left[0]).write_text(json.dumps(died), "utf-8")
            running[_start(left[1:], good, scratch)] = left[1:]
    return {name: json.loads(_result(scratch / name).read_text("utf-8")) for name in CASES}


def _start(names: list[str], good: Path, scratch: Path) -> int:
    """A child that writes the outcome of each case; returns its number."""
    if child := os.fork():
        return child
    canary = Canary()
    for name in names:
        folder = scratch / name
        folder.mkdir()
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (_size() + BYTES, resource.RLIM_INFINITY))
        result = outcome(name, good, folder, canary)
        _result(folder).write_text(json.dumps(result), "utf-8")
    os._exit(0)


def _result(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.json"


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
    fork_workers()
    gc.freeze()  # collecting what all have in common would copy it for each
    outcomes = in_children(good.resolve(), scratch.resolve())
    results.write_text(json.dumps(outcomes, indent=1), "utf-8")
    print(summary(outcomes))


def summary(outcomes: dict[str, dict[str, Any]]) -> str:
    """How many were refused, and the most that one took."""
    refused = sum(found["kind"] == "refused" for found in outcomes.values())
    seconds = {name: found.get("seconds", 0.0) for name, found in outcomes.items()}
    slowest, peak = max(seconds, key=lambda name: seconds[name]), max(found.get("peak", 0) for found in outcomes.values())
    return (
        f"{refused} of {len(outcomes)} refused; the slowest, {slowest}, after {seconds[slowest]:.1f} s; "
        f"at most {peak / 1e9:.2f} GB, the libraries counted"
    )


if __name__ == "__main__":
    main()
