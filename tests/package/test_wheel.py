"""The package as a user gets it: built, installed into an environment of its own, run in a folder that has our names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("lowbit", "passes", "pipeline", "recipes", "tests/models")
TRAP = "raise SystemExit('the folder that a command starts in is no place for modules')"


def run(*command: object, **options: Any) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source without results: setuptools writes beside it."""
    folder = tmp_path_factory.mktemp("source")
    for room in ROOMS:
        copytree(ROOT / room, folder / room, ignore=ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "setup.py", "README.md"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    """Built by way of the source distribution, so that both are whole."""
    out = source / "dist"
    backend = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    archive = run(sys.executable, "-c", backend, "build_sdist", out, cwd=source).splitlines()[-1]
    run(sys.executable, "-m", "tarfile", "-e", out / archive, out)
    name = run(sys.executable, "-c", backend, "build_wheel", out, cwd=out / archive.removesuffix(".tar.gz")).splitlines()[-1]
    return out / name


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a fresh environment that has this one's libraries, and lowbit from the wheel."""
    folder = tmp_path_factory.mktemp("envs") / "an environment, fr\u00ecsch"
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "libraries.pth").write_text("\n".join(libraries), "utf-8")
    python = folder / "bin" / "python"
    pip = ("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed")
    run(sys.executable, *pip, wheel)
    return folder / "bin"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder of somebody else, with our names in it, spaces and other letters in its path."""
    folder = tmp_path / "somebody's caf\u00e9 \u4f60\u597d"
    (folder / "passes").mkdir(parents=True)
    for name in ("pipeline.py", "passes/__init__.py", "json.py", "multiprocessing.py", "numpy.py", "lowbit.py"):
        (folder / name).write_text(TRAP, "utf-8")
    return folder


def test_the_wheel_is_the_tree(wheel: Path) -> None:
    """Every file of the rooms is inside, and nothing has another top-level name."""
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    place = {"lowbit": "", "passes": "passes/", "pipeline": "pipeline/", "recipes": "recipes/", "tests/models": "tests/models/"}
    expected = {
        f"lowbit/{place[room]}{file.relative_to(ROOT / room).as_posix()}"
        for room in ROOMS
        for file in (ROOT / room).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith(".")
    }
    scripts = {name for name in expected if name.startswith("lowbit/tests/models/") and name.endswith(".py")}
    assert inside == expected - scripts, "how the demo models were trained stays in the repository"
    assert {"lowbit/py.typed", "lowbit/recipes/targets/apple-m3-pro.yaml", "lowbit/pipeline/calibrate/prompts.txt"} <= inside


def test_a_recipe_runs_in_a_foreign_folder(installed: Path, foreign: Path) -> None:
    """The demo by its name, and a shorter copy of it from the folder, by the wheel alone."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    lowbit = installed / "lowbit"
    assert "plan of demo-q3" in run(lowbit, "plan", "demo-q3", cwd=foreign, env=environment)
    found = run(installed / "python", "-P", "-c", "import lowbit; print(lowbit.__path__[0])", cwd=foreign, env=environment)
    package = Path(found.strip())
    assert package.is_relative_to(installed.parent)
    text = (package / "recipes" / "demo-q3.yaml").read_text("utf-8").replace("../tests", f"{package}/tests")
    (foreign / "mine.yaml").write_text(text.replace("windows: 20", "windows: 2"), "utf-8")
    run(lowbit, "run", "mine.yaml", cwd=foreign, env=environment)
    manifest = json.loads((foreign / "build" / "mine" / "manifest.json").read_text("utf-8"))
    assert manifest["hand_offs"]["mnn"]["bit_exact"] is True
    assert "codes equal bit for bit" in run(lowbit, "check", Path("build", "mine"), cwd=foreign, env=environment)
