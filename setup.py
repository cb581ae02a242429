"""Which packages there are: every room, so that a new one is never forgotten. All else is in pyproject.toml."""

from setuptools import find_packages, setup

rooms = [f"lowbit.{room}" for room in ("passes", "pipeline")]
within = [f"{room}.{name}" for room in rooms for name in find_packages(room.partition(".")[2])]
setup(packages=["lowbit", "lowbit.recipes", "lowbit.tests.models", *rooms, *within])
