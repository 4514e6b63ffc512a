"""A long run takes no more of the machine at its end than after its first steps: memory, files, threads, processes.

What is measured is the whole process, seen from outside (/proc), ten times a second: its resident memory, the open
files, the threads and the processes below it. The first tenth of the steps is warm-up: allocators, caches that are
bounded, the first checkpoint and evaluation. The rest is cut into quarters by the steps that have a row; of a quarter
counts the median of the memory, and the most of the others.

Not covered: vLLM, DeepSpeed, a GPU's memory.
"""

import json
import os
import statistics
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
RESULTS = Path(__file__).resolve().parents[2] / "results/long"
KINDS = {
    "threads": {
        "method": "sdpo",
        "env": {"id": "opd/Lookup-v0", "max_turns": 3},
        "rollout": {"group_size": 2},
        "sdpo": {"teacher": {"weights": "ema", "rate": 0.2}, "feedback_at": "start"},
    },
    "processes": {
        "method": "opsd",
        "env": {"id": "opd/Lookup-v0", "max_turns": 3, "workers": "processes"},
        "opsd": {"privileged": "plan"},
    },
    "skills": {
        "method": "skill_sd",
        "env": {"id": "opd/Lookup-v0", "max_turns": 3},
        "rollout": {"group_size": 2},
        "skill_sd": {
            "distill": 1.0,
            "skills": {"min_support": 0.0, "min_lift": -100.0, "min_pdi": -100.0, "trials": 2, "min_likeness": 0.0},
        },
    },
}


@dataclass(frozen=True)
class Sight:
    """What a process holds at one moment."""

    step: int
    rss: int
    """Resident memory of the process itself, in kB."""
    anonymous: int
    """The part of it that no file stands behind."""
    below: int
    """Resident memory of the processes below it, in kB."""
    files: int
    threads: int
    processes: int
    """Those below it."""


def look(number, out):
    """See a process now; None where it has ended meanwhile."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{number}/status").read_text().splitlines())
        children = descendants(number)
        rows = (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0
        return Sight(
            step=rows,
            rss=int(status["VmRSS"].split()[0]),
            anonymous=int(status["RssAnon"].split()[0]),
            below=sum(map(resident, children)),
            files=len(os.listdir(f"/proc/{number}/fd")),
            threads=int(status["Threads"]),
            processes=len(children),
        )
    except (OSError, KeyError, ValueError):
        return None


def descendants(number):
    found = []
    for task in Path(f"/proc/{number}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def resident(number):
    try:
        return int(Path(f"/proc/{number}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    except OSError:
        return 0


def quarters(sights, steps):
    """What is seen in each quarter of the steps after the warm-up: the median of the memory, the most of the rest."""
    warm = steps // 10
    size = (steps - warm) / 4
    parts = [[s for s in sights if warm + n * size <= s.step < warm + (n + 1) * size] for n in range(4)]
    found = []
    for part in parts:
        assert part, "a quarter of the steps was not seen once"
        row = {}
        for field in fields(Sight)[1:]:
            values = [getattr(sight, field.name) for sight in part]
            memory = field.name in ("rss", "anonymous", "below")
            row[field.name] = round(statistics.median(values)) if memory else max(values)
        found.append(row)
    return found


def soak(hospital, kind, model, out, steps):
    """Train so many steps, with evaluations and checkpoints on the way; return what was seen."""
    often = max(2, steps // 40)
    data = {
        "out": str(out),
        "model": str(model),
        "train": {
            "steps": steps,
            "tasks_per_step": 2,
            "lr": 1e-4,
            "tokens_per_microbatch": 512,
            "threads": 1,
            "save_every": often,
            "keep_last": 2,
        },
        "eval": {"tasks": 2, "every": often},
        "tracking": {"wandb": "disabled", "plot": False},
    }
    own = json.loads(json.dumps(KINDS[kind]))
    own["rollout"] = {"max_tokens": 8, "max_length": 384} | own.get("rollout", {})
    seen = []
    since = time.monotonic()

    def watch(number):
        if (sight := look(number, out)) is not None:
            seen.append(sight)

    ended = hospital.run(data | own, watch=watch)
    assert ended.code == 0, ended.said[-4000:]
    return seen, time.monotonic() - since


def check_flat(rows):
    first, last = rows[0], rows[-1]
    for name in ("files", "threads", "processes"):
        assert last[name] <= first[name], (name, rows)
    return first, last


@pytest.mark.parametrize("kind", ["threads"])
def test_a_run_of_30_steps_holds_no_more_files_threads_and_processes_at_its_end(hospital, tiny_model, tmp_path, kind):
    seen, _ = soak(hospital, kind, tiny_model(), tmp_path / "run", 30)
    first, last = check_flat(quarters(seen, 30))
    assert last["rss"] <= 1.05 * first["rss"]


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_1000_steps_holds_no_more_of_anything_at_its_end(hospital, tiny_model, tmp_path, kind):
    seen, took = soak(hospital, kind, tiny_model(), tmp_path / "run", 1000)
    rows = quarters(seen, 1000)
    told = {"steps": 1000, "seconds": round(took), "quarters": rows, "last": asdict(seen[-1])}
    (RESULTS / f"soak-{kind}.json").write_text(json.dumps(told, indent=1) + "\n")
    first, last = check_flat(rows)
    for name in ("rss", "anonymous"):
        assert last[name] <= 1.03 * first[name], (name, rows)
    if first["below"]:
        assert last["below"] <= 1.03 * first["below"], rows
