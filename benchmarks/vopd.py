"""Compares vOPD with no baseline and the full vocabulary: variance over training, success, distance, time.

    python benchmarks/vopd.py                        # tiny:lookup from tiny:lookup-expert, three seeds
    python benchmarks/vopd.py --seeds 0 --steps 30   # less

All runs start from one student and make the same number of updates; they differ in the loss alone. The variance is that
of the sampled-token gradient by the logits, exact at every state that the student visits (`opd.maths.variance`): with
no baseline, or with the run's own. A loss over the full vocabulary has none of this kind. Times are of steps that
measure nothing. A run that has finished is kept in the folder of results and not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from lightning import measure, settings

from opd.launch.checks.loading import config_from
from opd.launch.run.out import remove_run
from opd.launch.train import train
from opd.tracking import read_rows
from opd.tracking.plots import Curve, curves

LOSSES: dict[str, dict[str, Any]] = {
    "no baseline": {},
    "top 20 baseline": {"baseline": "top_k", "baseline_top_k": 20},
    "full baseline (vOPD)": {"baseline": "full"},
    "full vocabulary": {"form": "exact", "divergence": {"top_k": None}},
}


def run(arguments: argparse.Namespace, label: str, seed: int) -> dict[str, Any]:
    """Train one run. Returns the variance at each measurement, seconds a step, distance from the teacher, success."""
    method = "opd" if LOSSES[label].get("baseline") is None else "vopd"
    own = {"teacher": {"weights": "external", "model": arguments.teacher}, **LOSSES[label]}
    name = f"{label.replace(' ', '-').strip('()')}-{seed}"
    data = settings(arguments, name, arguments.student, seed, method=method) | {method: own}
    data["train"] |= {"variance_every": arguments.every, "lr_schedule": "constant"}
    out = Path(data["out"])
    kept = out.with_suffix(".json")
    if kept.exists() and json.loads(kept.read_text(encoding="utf-8"))["settings"] == data:
        return json.loads(kept.read_text(encoding="utf-8"))
    if out.exists():
        remove_run(out)
    train(config_from(data))
    rows = read_rows(out / "metrics.jsonl")
    measured = [row for row in rows if "variance/plain" in row]
    factor = "variance/baseline" if method == "vopd" else None
    found = {
        "steps": [row["step"] for row in measured],
        "plain": [row["variance/plain"] for row in measured],
        "own": [row["variance/plain"] * (row[factor] if factor else 1.0) for row in measured],
        "least": [row["variance/plain"] * row["variance/least"] for row in measured],
        "seconds": median(row["time/teacher"] + row["time/train"] for row in rows if "variance/plain" not in row),
        "success_in_training": [row["reward/success"] for row in rows],
        "settings": data,
        **measure(arguments, out / "export", seed),
    }
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def table(results: dict[str, Sequence[dict[str, Any]]]) -> str:
    lines = [
        "| loss | variance: first third | last third | share of plain | success | by seed | KL | by seed | s a step |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | --- | ---: |",
    ]
    for label, runs in results.items():
        third = max(len(runs[0]["steps"]) // 3, 1)
        first, last = (fmean(fmean(r["own"][part]) for r in runs) for part in (slice(third), slice(-third, None)))
        share = sum(sum(r["own"]) for r in runs) / sum(sum(r["plain"]) for r in runs)
        variance = [f"{first:.3f}", f"{last:.3f}", f"{share:.0%}"] if label != "full vocabulary" else ["0"] * 3
        success, nats, seconds = ([r[key] for r in runs] for key in ("success", "nats", "seconds"))
        cells = [
            *(label, *variance, f"{fmean(success):.1%}", ", ".join(f"{value:.1%}" for value in success)),
            *(f"{fmean(nats):.4f}", ", ".join(f"{value:.3f}" for value in nats), f"{fmean(seconds):.3f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(path: Path, results: dict[str, Sequence[dict[str, Any]]]) -> None:
    lines = [
        Curve(
            label=label, steps=runs[0]["steps"], values=[fmean(v) for v in zip(*(r["own"] for r in runs), strict=True)]
        )
        for label, runs in results.items()
        if label != "full vocabulary"
    ]
    note = f"Exact at each state the student visits; mean of {len(next(iter(results.values())))} seeds."
    curves(
        path,
        lines,
        ylabel="Variance a token, nats squared",
        title="The sampled-token gradient, over training",
        note=note,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="tiny:lookup")
    parser.add_argument("--teacher", default="tiny:lookup-expert")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=5, help="steps between measurements of the variance")
    parser.add_argument("--eval", type=int, default=1000, help="held-out episodes")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-vopd"))
    arguments = parser.parse_args()
    results = {label: [run(arguments, label, seed) for seed in arguments.seeds] for label in LOSSES}
    print(f"\n{table(results)}\n")
    picture(arguments.out / "variance.png", results)
    print(arguments.out / "variance.png")


if __name__ == "__main__":
    main()
