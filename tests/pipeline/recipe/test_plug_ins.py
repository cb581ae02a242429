"""Code of others runs only where the user said so, never because a recipe names it."""

from __future__ import annotations

import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import lowbit
from lowbit.passes import trust
from lowbit.pipeline.errors import PipelineError, RecipeError
from lowbit.pipeline.recipe.load import load_recipe

PASS = """
from pathlib import Path
from lowbit.passes.base import Pass
from lowbit.pipeline.recipe.sections import Convert
from lowbit.passes.methods.rtn import Rtn

Path({ran!r}).touch()

class Toy(Pass):
    pass

class Coarse(Rtn):
    pass

class Engine(Convert):
    folder = "toy"
"""
NAMED: dict[str, dict[str, Any]] = {
    "pass": {"passes": ["strange.all"]},
    "method": {"passes": [{"quantize_matmul": {"bits": 4, "method": "strange.all"}}]},
    "method with options": {
        "calibrate": {},
        "passes": [{"quantize_matmul": {"bits": 4, "method": {"refine": {"after": {"strange.all": {}}}}}}],
    },
    "target": {"passes": ["narrow_embedding"], "convert": {"target": "strange.all"}},
}


class Toys:
    """A package in a stranger's folder, and a recipe that names it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ran = folder, folder.parent / "ran"
        (folder / "strange").mkdir(parents=True)
        (folder / "strange" / "__init__.py").write_text(f"from pathlib import Path\nPath({str(self.ran)!r}).touch()\n", "utf-8")
        self.write(PASS.format(ran=str(self.ran)))

    def write(self, code: str) -> None:
        (self.folder / "strange" / "all.py").write_text(code, "utf-8")

    def recipe(self, **sections: Any) -> Path:
        file = self.folder / "mine.yaml"
        file.write_text(yaml.safe_dump({"model": "./x", **(sections or NAMED["pass"])}), "utf-8")
        return file


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toys]:
    """In the working directory, which is in Python's path."""
    made = Toys(tmp_path / "stranger")
    monkeypatch.chdir(made.folder)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(sys, "path", [str(made.folder), *sys.path])
    monkeypatch.setattr(trust, "_folders", {})
    trust._installed.cache_clear()
    yield made
    trust._installed.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "strange"]:
        del sys.modules[name]


def loads(file: Path) -> bool:
    """Whether it does; if not, the remedy is said."""
    try:
        load_recipe(file)
    except RecipeError as error:
        said = "which is not trusted, and a recipe cannot make it so. If you trust it, give its folder with --plugins"
        if said not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("sections", NAMED.values(), ids=NAMED)
def test_a_recipe_runs_no_code_but_where_the_user_trusts_it(toys: Toys, sections: dict[str, Any]) -> None:
    file = toys.recipe(**sections)
    assert not loads(file)
    assert not toys.ran.exists()
    lowbit.trust_plugins(toys.folder)
    assert loads(file)
    assert toys.ran.exists()


def test_what_the_program_imported_is_trusted(toys: Toys) -> None:
    __import__("strange.all")
    assert loads(toys.recipe())


def test_a_folder_in_the_settings_is_trusted(toys: Toys, tmp_path: Path) -> None:
    settings = tmp_path / "config" / "lowbit" / "settings.yaml"
    settings.parent.mkdir(parents=True)
    for text, wrong in (
        ("trust: [x]", "settings are a list of folders"), ("trust_plugins: 3", "settings are a list of folders"),
        ("- a", "settings are a list of folders"), ("trust_plugins: [./no]", ":1:17: './no' cannot be trusted"),
        ("trust_plugins: [~nobody/x]", "cannot be trusted"), ('trust_plugins: ["a\\0"]', "cannot be seen"),
    ):  # fmt: skip
        settings.write_text(text, "utf-8")
        with pytest.raises(RecipeError, match=wrong) as error:
            load_recipe(toys.recipe())
        assert str(error.value).startswith(str(settings))
    settings.write_text("", "utf-8")
    assert not loads(toys.recipe())
    settings.write_text("trust_plugins: [../../stranger]", "utf-8")
    assert loads(toys.recipe())


def test_an_installed_package_that_says_so_is_trusted(toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site"
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(installed)])
    for folder in (toys.folder, installed):  # the stranger's says so, too
        (folder / "strange-1.dist-info").mkdir(parents=True)
        (folder / "strange-1.dist-info" / "METADATA").write_text("Name: strange\nVersion: 1\n", "utf-8")
    (toys.folder / "strange-1.dist-info" / "entry_points.txt").write_text("[lowbit.plugins]\nstrange = strange\n", "utf-8")
    assert not loads(toys.recipe())
    (installed / "strange-1.dist-info" / "entry_points.txt").write_text("[lowbit.plugins]\nstrange = strange\n", "utf-8")
    trust._installed.cache_clear()
    assert not loads(toys.recipe()), "the working directory's comes first in the path, and is another"
    assert not toys.ran.exists()
    file = toys.recipe()
    (toys.folder / "strange").rename(installed / "strange")
    monkeypatch.setattr(sys, "path", [*sys.path, str(installed)])
    assert loads(file)


def test_a_package_that_is_spread_over_folders_is_trusted_in_all_or_not(toys: Toys, tmp_path: Path) -> None:
    (toys.folder / "strange" / "__init__.py").unlink()
    (tmp_path / "mine" / "strange").mkdir(parents=True)
    lowbit.trust_plugins(tmp_path / "mine")
    assert not loads(toys.recipe())
    assert not toys.ran.exists()


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "import sys; sys.exit()", "1 / 0", "x = (", "import no_such", "a\0b"])
def test_code_that_fails_is_a_sentence(toys: Toys, code: str) -> None:
    toys.write(code)
    lowbit.trust_plugins(toys.folder)
    with pytest.raises(RecipeError, match=r"mine.yaml:3:3: (the|there is no) pass module 'strange.all'"):
        load_recipe(toys.recipe())


def test_a_folder_of_plug_ins_must_be_there(tmp_path: Path) -> None:
    for folder in (tmp_path / "no", "a\0b"):
        with pytest.raises(PipelineError):
            lowbit.trust_plugins(folder)


def test_the_command_line_says_how_to_trust(toys: Toys) -> None:
    command = [sys.executable, "-m", "lowbit", "plan", str(toys.recipe())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"--plugins {toys.folder}" in done.stderr
    assert not toys.ran.exists()
    done = subprocess.run([*command, "--plugins", "."], capture_output=True, text=True, check=False)
    assert toys.ran.exists()
    assert "stranger/x" in done.stderr, "its model is not there"
