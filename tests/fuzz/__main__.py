"""Fuzz every reader of strangers' files: `python -m tests.fuzz [--minutes M] [--target NAME] [--cores N]`.

The minutes are shared out over the targets, on all cores. Prints what each did; status 1 where one found something.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lowbit.passes.quant.parallel import core_count

TARGETS = tuple(sorted(file.stem for file in (Path(__file__).parent / "targets").glob("[a-z]*.py")))
WORK = Path("build", "fuzz")
"""What was learned (`corpus`) and found, by target."""
SECONDS, MEGABYTES, BYTES = 10, 2048, 1 << 16
"""What one input may take, and its size."""


@dataclass(frozen=True)
class Result:
    """What one target did.

    Attributes:
        features: of coverage.
        failure: the last lines of what libFuzzer said, where it stopped early.
        findings: inputs that let out what they should not.
    """

    executions: int
    features: int
    failure: str
    findings: list[Path]


def module_of(name: str) -> str:
    """The module of a target."""
    return f"tests.fuzz.targets.{name}"


def fuzz(module: str, seconds: int, folder: Path) -> Result:
    """Fuzz one target for some seconds, or until it finds something; `folder` keeps what it learns and finds."""
    findings = folder / "findings"
    findings.mkdir(parents=True, exist_ok=True)
    before = set(findings.iterdir())
    options = [
        f"-max_total_time={seconds}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", f"-max_len={BYTES}",
        f"-artifact_prefix={findings.resolve()}/", "-print_final_stats=1",
    ]  # fmt: skip
    command = [sys.executable, "-m", "tests.fuzz.harness", module, str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    for left in folder.glob("scratch-*"):
        shutil.rmtree(left, ignore_errors=True)
    said = done.stdout + done.stderr
    last = (done.stdout if "Uncaught Python exception" in done.stdout else done.stderr).strip().splitlines()[-25:]
    executions = re.findall(r"stat::number_of_executed_units:\s*(\d+)|^#(\d+)\s", said, re.MULTILINE)
    features = re.findall(r" ft: (\d+)", said)
    return Result(
        max((int(total or number) for total, number in executions), default=0), int(features[-1]) if features else 0,
        "\n".join(last) if done.returncode else "", sorted(set(findings.iterdir()) - before),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description="Fuzz every reader of strangers' files.")
    parser.add_argument("--minutes", type=float, default=10, help="by the clock, for all targets together")
    parser.add_argument("--target", choices=TARGETS, help="one alone")
    parser.add_argument("--cores", type=int, default=core_count(), help="targets at a time")
    given = parser.parse_args()
    names = [given.target] if given.target else list(TARGETS)
    seconds = max(1, int(60 * given.minutes * min(given.cores, len(names)) / len(names)))
    print(f"{'target':<20} {'executions':>11} {'features':>9} {'findings':>9}   ({seconds} s each)")
    with ThreadPoolExecutor(given.cores) as pool:
        results = dict(zip(names, pool.map(lambda name: fuzz(module_of(name), seconds, WORK / name), names), strict=True))
    for name, result in results.items():
        print(f"{name:<20} {result.executions:>11,} {result.features:>9,} {len(result.findings):>9}")
    for name, result in results.items():
        if result.failure:
            print(f"\n{name} stopped:\n{result.failure}")
        for file in result.findings:
            print(f"\nFound {file}. Replay it: {sys.executable} -m tests.fuzz.harness {module_of(name)} {WORK / name} {file}")
    return int(any(result.failure for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
