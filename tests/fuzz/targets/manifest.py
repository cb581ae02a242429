"""manifest.json, and the check that it is sealed."""

from __future__ import annotations

from pathlib import Path

from lowbit.pipeline.commands.check_facts import ALWAYS, check_names, check_seal
from lowbit.pipeline.report.manifest import MANIFEST, read_manifest
from lowbit.pipeline.report.quality import Quality
from tests.fuzz.target import Target
from tests.pipeline.report.manifests import manifest, output_quality


def prepare(folder: Path) -> Target:
    def attempt(data: bytes) -> None:
        (folder / MANIFEST).write_bytes(data)
        found = read_manifest(folder)
        check_seal(folder, found)
        check_names(folder, found)

    right = manifest().model_copy(update={"files": dict.fromkeys(ALWAYS, "e" * 64)})
    sealed = right.model_copy(update={"seal": right.digest})
    outputs = manifest(Quality(onnxruntime=output_quality()))
    return Target([sealed.text.encode(), right.text.encode(), outputs.text.encode()], attempt)
