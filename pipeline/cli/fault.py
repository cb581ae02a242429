"""An exception that nobody foresaw -> a sentence, and a file with all that is needed to mend it."""

from __future__ import annotations

import platform
import shlex
import tempfile
import traceback
from pathlib import Path

from lowbit.passes.trust import plug_in_of
from lowbit.pipeline.store.digests import versions

PACKAGES = (
    "lowbit", "numpy", "numba", "onnx", "onnx-graphsurgeon", "onnxruntime", "MNN", "torch", "transformers", "tokenizers",
    "safetensors", "pydantic", "typer", "rich", "filelock",
)  # fmt: skip


def tell_fault(error: Exception, arguments: list[str]) -> str:
    """Whose fault it is, and where the report lies: in the build folder or, if there is none, in that of temporary files.

    Args:
        arguments: the command line, without the name of the program.
    """
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    plug_in = _plug_in(error)
    whose = f"this is a fault of lowbit's own: {what}" if plug_in is None else f"the plug-in {plug_in} failed: {what}"
    to = "report it" if plug_in is None else "report it to the plug-in's author"
    text = _report(error, arguments)
    for folder in (_build(arguments), None):
        if folder is not None and not folder.is_dir():
            continue
        try:
            with tempfile.NamedTemporaryFile(
                "w",
                prefix="lowbit-error-",
                suffix=".txt",
                dir=folder,
                delete=False,
                encoding="utf-8",
                errors="backslashreplace",
            ) as file:
                file.write(text)
        except OSError:
            continue
        return f"{whose}\n  {file.name} says where: {to} with that file."
    return f"{whose}\n  No report could be written, so this is where: {to} with it.\n{text}"


def _report(error: Exception, arguments: list[str]) -> str:
    found = "\n".join(f"{name} {version}" for name, version in versions(PACKAGES).items())
    trace = "".join(traceback.format_exception(error))
    return (
        f"{shlex.join(['lowbit', *arguments])}\n\nPython {platform.python_version()}, {platform.platform()}\n{found}\n\n{trace}"
    )


def _plug_in(error: BaseException | None) -> str | None:
    """The plug-in that was at work when the exception was raised, be it in what the plug-in called."""
    found = None
    while error is not None and found is None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            found = plug_in_of(frame.f_globals.get("__name__", "")) or found
        error = error.__cause__
    return found


def _build(arguments: list[str]) -> Path:
    """The folder of `--build`, which may not be there."""
    for place, word in enumerate(arguments):
        if word == "--build" and place + 1 < len(arguments):
            return Path(arguments[place + 1])
        if word.startswith("--build="):
            return Path(word.removeprefix("--build="))
    return Path("build")
