"""Nothing that is imported needs Linux."""

from __future__ import annotations

import subprocess
import sys

IMPORT_ALL = """
import builtins, importlib, os, pkgutil, sys

ELSEWHERE = ("fcntl", "resource", "grp", "pwd", "termios")
real = builtins.__import__

def without(name, globals=None, *rest, **options):
    if name.partition(".")[0] in ELSEWHERE and (globals or {}).get("__name__", "").startswith("lowbit"):
        raise ModuleNotFoundError(f"{globals['__name__']} imports {name}", name=name)
    return real(name, globals, *rest, **options)

for name in [name for name in dir(os) if name.startswith(("sched_", "posix_fadvise", "POSIX_FADV", "memfd"))]:
    delattr(os, name)
builtins.__import__ = without
import lowbit
names = [one.name for one in pkgutil.walk_packages(lowbit.__path__, "lowbit.")]
for room in ("passes", "pipeline"):
    package = importlib.import_module(f"lowbit.{room}")
    names += [one.name for one in pkgutil.walk_packages(package.__path__, f"lowbit.{room}.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(set(names)))
from lowbit.passes.quant.parallel import core_count
assert core_count() >= 1
"""


def test_everything_is_imported_without_the_modules_of_linux() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", IMPORT_ALL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 120
