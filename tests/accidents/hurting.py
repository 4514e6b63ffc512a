"""Real runs that are killed, or whose disk fills up, at a chosen one of their operations on files.

A `Hospital` is one process that has imported everything; each run is a fork of it, so that a start costs no imports
and a SIGKILL is a real one. A small library (hurting.c), loaded before libc, counts the operations below the run's
folder and does the harm.
"""

import json
import os
import select
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
BEFORE, HALF, AFTER, FULL = range(4)
"""Killed before an operation, in the middle of what it writes, after it; from it on the disk has no room."""


def compiler():
    """The C compiler, or None."""
    return shutil.which("cc") or shutil.which("gcc")


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    """Its exit code; -9: it was killed."""
    operations: int
    """Those on files below its folder; 0 of a run that was killed."""
    said: str
    """Its stdout and stderr."""


class Hospital:
    """Starts runs that are hurt: `run(settings, at=..., how=...)`. Close it after use."""

    def __init__(self, folder):
        self.folder = folder
        library = folder / "hurting.so"
        subprocess.run([compiler(), "-shared", "-fPIC", "-O1", "-o", library, HERE / "hurting.c", "-ldl"], check=True)
        paths = [str(HERE), str(HERE.parent / "zero"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "LD_PRELOAD": str(library),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "hurting.py"), str(library)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=folder,
        )

    def run(self, settings, *, at=0, how=BEFORE, extra=(), watch=None):
        """`opd train` with these settings, begun or gone on with; hurt at operation `at`, from 1; 0: not.

        `watch` is called with the number of its process, again and again while it lives.
        """
        (self.folder / "run.yaml").write_text(json.dumps(settings))  # JSON is YAML
        arguments = ["train", str(self.folder / "run.yaml"), "--resume=auto", *extra]
        asked = {"root": settings["out"], "at": at, "how": how, "arguments": arguments}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        number = int(self._process.stdout.readline())
        while watch is not None and not select.select([self._process.stdout], [], [], 0.1)[0]:
            watch(number)
        answer = json.loads(self._process.stdout.readline())
        return Ended(answer["code"], answer["operations"], (self.folder / "said.txt").read_text(errors="replace"))

    def close(self):
        self._process.communicate()  # it ends with its input


def serve(library):
    """Answer each line of stdin, a run to be made, with a line that says how it ended."""
    import ctypes

    # What a run needs is here before the first fork.
    import opd.backends.local
    import opd.envs
    import opd.launch.plan.plan
    import opd.launch.run.training  # noqa: F401
    from opd.launch.cli.main import main

    hurt = ctypes.CDLL(library)
    for line in sys.stdin:
        asked = json.loads(line)
        Path("count").unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            hurt.hurt_arm(asked["root"].encode(), ctypes.c_long(asked["at"]), asked["how"])
            code = 70
            try:
                code = main(asked["arguments"])
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            Path("count").write_text(str(hurt.hurt_count()))
            os._exit(code)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        counted = Path("count")
        answer = {"code": os.waitstatus_to_exitcode(status), "operations": 0}
        answer["operations"] = int(counted.read_text()) if counted.exists() else 0
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
