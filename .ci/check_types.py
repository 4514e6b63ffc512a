"""Runs mypy over the package as it is installed, and makes sure that it saw all of it.

From the root of the repository a type checker finds `opd/` alone, because `envs/` is `opd.envs` only once
it is installed, and reports success for the part that it saw.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("opd", "envs", "rewards", "trainers", "launch")


def main(site: Path) -> int:
    """Check `site`, which holds the installed package; the exit code."""
    expected = sum(1 for folder in SOURCES for _ in (ROOT / folder).rglob("*.py"))
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "opd"]
    done = subprocess.run(
        [*command, "--cache-dir", str(ROOT / ".mypy_cache")], cwd=site, capture_output=True, text=True
    )
    print(done.stdout + done.stderr, end="")
    if done.returncode:
        return done.returncode
    found = re.search(r"in (\d+) source files", done.stdout)
    seen = int(found.group(1)) if found else 0
    if seen != expected:
        print(f"mypy saw {seen} files, but there are {expected} under {', '.join(SOURCES)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
