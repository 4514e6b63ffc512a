"""Compares Lightning OPD with online OPD: wall time by what takes it, distance from the teacher, success, two teachers.

    python benchmarks/lightning.py                                   # tiny:lookup from tiny:lookup-expert, three seeds
    python benchmarks/lightning.py --seeds 0 --sft-steps 100         # one start, one seed
    python benchmarks/lightning.py --other tiny:lookup               # also with another model's episodes for the SFT
    python benchmarks/lightning.py --memory MODEL                    # only the memory, with MODEL as both sides

All runs of a seed and a length of the SFT start from the same student and make as many updates of as many sequences:
online on fresh episodes with the teacher in memory, offline on episodes that were played and scored once. Each uses two
losses: the policy gradient of the sampled token, as in the paper, and the divergence over the teacher's top k. The
distance is the exact KL(student || teacher) a token, on the student's own held-out episodes at temperature 1. A run
that has finished is kept in the folder of results and not run again.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from opd.episodes.tasks import derive_seed, task
from opd.launch.checks.loading import config_from
from opd.launch.run.build import build
from opd.launch.run.out import remove_run
from opd.launch.train import train
from opd.tracking import read_rows

PARTS = ("rollout", "teacher", "train")
TOP_K = 20
WHOLE = {"kind": "reverse_kl", "top_k": None}
SMALL = 1.0
"""A bound on the advantage, far below the paper's 10; offline with the ratio of now to then, at most 2."""
QUIET = {"wandb": "disabled", "console": False, "plot": False}


def settings(arguments: argparse.Namespace, name: str, model: str, seed: int, **sections: Any) -> dict[str, Any]:
    """Return the settings of one run, as `opd train` would read them."""
    train_settings = {"steps": arguments.steps, "tasks_per_step": 32, "lr": arguments.lr, "threads": 1}
    return {
        "out": str(arguments.out / name),
        "seed": seed,
        "model": model,
        "env": "opd/Lookup-v0",
        "rollout": {"max_tokens": 48, "max_length": 512, "concurrency": 200},
        "train": train_settings | {"lr_schedule": "linear"},
        "tracking": QUIET,
        **sections,
    }


def run(arguments: argparse.Namespace, data: dict[str, Any]) -> dict[str, Any]:
    """Train, unless it was done before, and measure: seconds by part, the distance, success."""
    out = Path(data["out"])
    kept = out.with_suffix(".json")
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["settings"] == data and found["eval"] == arguments.eval:
            return found
    if out.exists():
        remove_run(out)
    train(config_from(data))
    rows = read_rows(out / "metrics.jsonl")
    last = [row for row in rows if row.get("stage") == rows[-1].get("stage")]
    found = {part: sum(row.get(f"time/{part}", 0.0) for row in last) for part in PARTS}
    last_stage = len(config_from(data).stages)
    for number, name in enumerate(("scores", "plays"), start=1):  # the stages before the last, if there are any
        found[name] = sum(row.get(f"time/stage_{last_stage - number}", 0.0) for row in last)
    found |= measure(arguments, out / "export", data["seed"])
    gaps = [row["sampler/gap"] for row in last[-5:] if "sampler/gap" in row]  # online both are one network
    found |= {"moved": fmean(gaps) if gaps else None, "settings": data, "eval": arguments.eval}
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def measure(arguments: argparse.Namespace, model: Path, seed: int) -> dict[str, float]:
    """Measure KL(student || teacher) in nats a token on the student's own held-out episodes, and its success."""
    own = {"teacher": {"weights": "external", "model": arguments.teacher}, "form": "exact", "divergence": WHOLE}
    built = build(config_from(settings(arguments, "measure", str(model), seed, method="opd", opd=own)))
    try:
        built.loop.player.sync()
        groups = built.held_out.run(
            [task(number, split="eval") for number in range(arguments.eval)],
            group_size=1,
            sampling=built.loop.player.sampling,
            seed=derive_seed("distance", 0),
        )
        samples = [sample for group in groups for sample in built.method.annotate(group)]
        nats = [value for values in built.loop.player.divergences(samples) for value in values.tolist()]
        solved = sum(t.success for group in groups for t in group.trajectories) / arguments.eval
    finally:
        built.close()
        gc.collect()
    return {"nats": fmean(nats), "success": solved}


def arms(arguments: argparse.Namespace, seed: int, sft_steps: int, other: str | None) -> Iterator[tuple[str, Any]]:
    """Train and measure each run from one start."""
    mark = f"{sft_steps}{'-other' if other else ''}-{seed}"

    def runs(name: str, model: str, method: str, **own: Any) -> dict[str, Any]:
        own = {"teacher": {"weights": "external", "model": arguments.teacher}} | own
        data = settings(arguments, f"{name}-{mark}".replace(" ", "-"), model, seed, method=method) | {method: own}
        if own.get("max_advantage") == SMALL and method == "lightning_opd":
            data["rollout"] = data["rollout"] | {"correction": {"mode": "truncate", "high": 2.0}}
        data["train"]["steps"] = max(arguments.steps, own.get("imitating", {}).get("steps", 0))  # a stage has no more
        return run(arguments, data)

    sft: dict[str, Any] = {"sft_tasks": arguments.sft_tasks, "imitating": {"steps": sft_steps, "lr": arguments.sft_lr}}
    allowed: dict[str, Any] = {"mismatch": "allow"} if other else {}
    sft |= allowed | ({"sft_teacher": other} if other else {})
    own = {"tasks": arguments.tasks, "distilling": {"steps": arguments.steps}}
    whole = runs("whole", arguments.student, "lightning_opd", **sft, **own)
    folder = Path(whole["settings"]["out"])
    start = str(folder / "export-stage-2")
    yield "after the SFT", measure(arguments, Path(start), seed)
    for name, bound in {"sampled token": 10.0, f"at most {SMALL:g} nat": SMALL}.items():
        yield f"online, {name}", runs(f"online {name}", start, "opd", max_advantage=bound, max_ratio=None)
        again = runs(
            f"lightning {name}", start, "lightning_opd", max_advantage=bound, data=str(folder / "data"), **allowed
        )
        yield f"Lightning, {name}", again | {"plays": whole["plays"], "scores": whole["scores"]}
    top: dict[str, Any] = {"form": "exact", "divergence": {"top_k": TOP_K}}
    yield f"online, top {TOP_K}", runs("online top k", start, "opd", **top)
    yield f"Lightning, top {TOP_K}", runs("lightning top k", start, "lightning_opd", sft_tasks=0, **top, **own)


def report(title: str, found: Sequence[dict[str, Any]]) -> None:
    """Print a table of all seeds' means; `found` holds the arms of one seed each."""
    print(f"\n{title}\n")
    print(
        "| run | rollout s | teacher s | train s | all s | once: plays s | scores s | KL | by seed | success | moved |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |")
    for label in found[0]:
        results = [arms[label] for arms in found]
        nats = [r["nats"] for r in results]
        seconds, moved = [""] * 6, ""
        if "train" in results[0]:
            parts = [fmean(r[part] for r in results) for part in (*PARTS, "plays", "scores")]
            seconds = [f"{value:.1f}" for value in (*parts[:3], sum(parts[:3]), *parts[3:])]
            far = [r["moved"] for r in results if r["moved"]]
            moved = f"{fmean(far):.3f}" if far else ""
        print(
            f"| {label} | {' | '.join(seconds)} | {fmean(nats):.4f} | {', '.join(f'{n:.4f}' for n in nats)} | "
            f"{fmean(r['success'] for r in results):.1%} | {moved} |"
        )


WORKER = """
import json, resource, sys
from opd.launch.checks.loading import config_from
from opd.launch.train import train
train(config_from(json.loads(sys.argv[1])))
print("\\npeak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def memory(arguments: argparse.Namespace) -> None:
    """Print the most that a process holds: online, and in a second run on the store; with one model as both sides."""
    model = arguments.memory
    little = {"steps": 2, "tasks_per_step": 2, "lr": 1e-6, "threads": 1, "tokens_per_microbatch": 1024}
    common = {"train": little, "rollout": {"max_tokens": 8, "max_length": 512}}
    common |= {"env": {"id": "opd/Lookup-v0", "max_turns": 1}}
    by = {"weights": "external", "model": model}
    own = {"teacher": by, "sft_tasks": 0, "tasks": 4}

    def spent(name: str, **sections: Any) -> float:
        data = settings(arguments, name, model, 0, **sections) | common
        if Path(data["out"]).exists():
            remove_run(Path(data["out"]))
        process = subprocess.run([sys.executable, "-c", WORKER, json.dumps(data)], capture_output=True, text=True)
        if process.returncode:
            raise SystemExit(process.stderr)
        return int(process.stdout.rsplit("peak", 1)[1]) / 2**20

    online = spent("memory-online", method="opd", opd={"teacher": by})
    first = spent("memory-first", method="lightning_opd", lightning_opd=own)
    data = str(arguments.out / "memory-first" / "data")
    again = spent("memory-again", method="lightning_opd", lightning_opd=own | {"data": data})
    print(f"most memory with {model} as both sides, in GiB:")
    print(f"online {online:.2f}, all stages of Lightning OPD {first:.2f}, a second run on the store {again:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="tiny:lookup")
    parser.add_argument("--teacher", default="tiny:lookup-expert")
    parser.add_argument("--other", help="another model, which plays for the SFT in a second set of runs")
    parser.add_argument("--steps", type=int, default=60, help="updates of each run after the SFT")
    parser.add_argument("--sft-steps", type=int, nargs="+", default=[40, 70, 100])
    parser.add_argument("--sft-lr", type=float, default=1e-3)
    parser.add_argument("--sft-tasks", type=int, default=1024)
    parser.add_argument("--tasks", type=int, default=1920, help="episodes that are played and scored once")
    parser.add_argument("--eval", type=int, default=1000, help="held-out episodes")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--memory", help="a model")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-lightning"))
    arguments = parser.parse_args()
    if arguments.memory:
        memory(arguments)
        return
    for other in [None, arguments.other] if arguments.other else [None]:
        for sft_steps in arguments.sft_steps:
            found = [dict(arms(arguments, seed, sft_steps, other)) for seed in arguments.seeds]
            report(f"SFT of {sft_steps} updates{f' on episodes of {other}' if other else ''}", found)


if __name__ == "__main__":
    main()
