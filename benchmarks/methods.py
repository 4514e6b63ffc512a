"""Compares methods at equal sampled tokens: one picture, one table.

    python benchmarks/methods.py                            # benchmarks/methods.yaml
    python benchmarks/methods.py FILE.yaml --seeds 0 1      # another comparison, some of its seeds
    python benchmarks/methods.py FILE.yaml --table          # only what has finished, without running anything

A file holds `base` (settings of every run, as `opd train` reads them), `methods` (a label, and the settings that differ
by dotted key), `seeds`, `tokens` (sampled by each run) and `points` (evaluations on the way). The tokens that a
stage collects before its first step count; a stage on stored samples takes `train.steps`. A run that has finished is
kept in the folder of results and not run again. Each run is one process's work, on as many threads as `train.threads`
says; parts of a comparison can run beside each other with `--methods` and `--seeds`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from pydantic import Field, ValidationError

from opd.config import Strict
from opd.errors import ConfigError, OpdError
from opd.launch.checks.loading import config_from
from opd.launch.run.build import Run, build
from opd.launch.run.score import Score
from opd.launch.settings.config import Config
from opd.launch.settings.overrides import merge
from opd.launch.settings.reader import read_settings
from opd.tracking.intervals import paired_difference, wilson
from opd.tracking.plots import COLORS, curves, success_curve

HERE = Path(__file__).resolve().parent


class Comparison(Strict):
    """Says what is compared."""

    title: str = ""
    base: dict[str, Any]
    methods: dict[str, dict[str, Any]] = Field(min_length=1, max_length=len(COLORS))
    """At most as many as one picture can tell apart."""
    seeds: list[int] = Field(min_length=1)
    tokens: int = Field(ge=1)
    points: int = Field(10, ge=1)

    def config(self, label: str, seed: int) -> Config:
        """Return the settings of one run. Raises ConfigError."""
        return config_from(merge(self.base, {**self.methods[label], "seed": seed}), source=label)


class Point(Strict):
    """Records an evaluation: the held-out tasks that were solved, after so many sampled tokens."""

    tokens: int
    """The planned tokens: the evaluation is the first one after a step that reaches them."""
    sampled: int
    """The tokens that were really sampled."""
    steps: int
    outcomes: list[bool]

    @property
    def solved(self) -> int:
        return sum(self.outcomes)


class Result(Strict):
    """Records one finished run."""

    settings: dict[str, Any]
    tokens: int
    points: list[Point]
    seconds: float


class Moment(NamedTuple):
    """Holds a run on its way."""

    run: Run
    sampled: int
    """Tokens, of all stages so far."""
    steps: int
    over: bool = False


def play(config: Config, comparison: Comparison, tell: Callable[[Point], None] = lambda _: None) -> Result:
    """Train until the tokens are sampled, with evaluations on the way, each of which is told of."""
    since = time.perf_counter()
    points = []
    with TemporaryDirectory() as folder:
        for point in _points(config, comparison, Path(folder)):
            points.append(point)
            tell(point)
    return Result(settings=config.shown(), tokens=comparison.tokens, points=points, seconds=time.perf_counter() - since)


def _points(config: Config, comparison: Comparison, folder: Path) -> Iterator[Point]:
    """Yield the evaluations. Those that were due while a stage collected are of the weights before its first step."""
    tokens, count = comparison.tokens, comparison.points
    waiting = [tokens * number // count for number in range(count + 1)]
    known: dict[int, list[bool]] = {}
    for run, sampled, steps, over in _moments(config, tokens, folder):
        while waiting and (over or waiting[0] < min(max(sampled, 1), tokens)):
            if steps not in known:
                known = {steps: _outcomes(run.evaluate()[0])}
            yield Point(tokens=waiting.pop(0), sampled=sampled, steps=steps, outcomes=known[steps])


def _outcomes(score: Score) -> list[bool]:
    """Return for each task whether it was solved.

    Raises RuntimeError where an environment broke: such a figure would mislead.
    """
    outcomes = [outcome for outcome in score.outcomes if outcome is not None]
    if len(outcomes) < len(score.outcomes):
        raise RuntimeError(f"{score.broken} of {len(score.outcomes)} held-out tasks were not measured")
    return outcomes


def _moments(config: Config, tokens: int, folder: Path) -> Iterator[Moment]:
    """Yield the run before anything, after what each stage collects, after each step, and once it is over."""
    sampled = steps = 0
    model: Path | None = None
    for stage in range(len(config.stages)):
        last = stage + 1 == len(config.stages)
        with closing(build(config, stage=stage, model=model)) as run:
            yield Moment(run, sampled, steps)
            sampled += int(run.loop.prepare(folder).get("tokens/collected", 0))
            yield Moment(run, sampled, steps)
            first = steps
            plays = last and run.loop.dataset is None
            while sampled < tokens if plays else steps - first < run.loop.player.train.steps:
                row, _ = run.loop.step(steps - first)
                steps += 1
                sampled += int(row.get("tokens/sampled", 0))
                yield Moment(run, sampled, steps)
            if last:
                yield Moment(run, sampled, steps, over=True)
            else:
                model = folder / f"export-stage-{stage + 1}"
                run.export(model)


def finished(path: Path, config: Config, comparison: Comparison) -> Result | None:
    """Read the result in a file, if there is one. Raises ConfigError for one of other settings."""
    if not path.exists():
        return None
    result = Result.model_validate_json(path.read_text(encoding="utf-8"))
    if (result.settings, result.tokens, len(result.points)) != (
        config.shown(),
        comparison.tokens,
        comparison.points + 1,
    ):
        raise ConfigError(f"{path} was made with other settings; delete it, or choose another --out")
    return result


def pooled(results: Sequence[Result]) -> list[tuple[int, int, int]]:
    """Add up the seeds: (tokens, solved, played) at each point."""
    columns = zip(*(result.points for result in results), strict=True)
    return [(c[0].tokens, sum(p.solved for p in c), sum(len(p.outcomes) for p in c)) for c in columns]


def table(results: Mapping[str, Sequence[Result]]) -> str:
    """Write the table in Markdown. Intervals are of 95%, over all seeds' tasks."""
    first = next(iter(results))
    lines = [
        f"| method | seeds | before | after | by seed | best point | mean of the curve | after, less {first} | steps | "
        "minutes a run |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    reference = _last_outcomes(results[first])
    for label, runs in results.items():
        points = pooled(runs)
        rates = [solved / played for _, solved, played in points]
        _, solved, played = points[-1]
        low, high = wilson(solved, played)
        own = _last_outcomes(runs)
        shared = [key for key in own if key in reference]
        change = ""
        if label != first and shared:
            pairs = [(reference[key], own[key]) for key in shared]
            change = "{:+.1%} ({:+.1%} to {:+.1%})".format(*paired_difference(*zip(*pairs, strict=True)))
        last = [run.points[-1] for run in runs]
        steps = sorted(point.steps for point in last)
        lines.append(
            f"| {label} | {len(runs)} | {rates[0]:.1%} | {rates[-1]:.1%} ({low:.1%} to {high:.1%}) | "
            f"{', '.join(f'{p.solved / len(p.outcomes):.1%}' for p in last)} | {max(rates):.1%} | "
            f"{sum(rates) / len(rates):.1%} | {change} | {steps[0]} to {steps[-1]} | "
            f"{sum(run.seconds for run in runs) / len(runs) / 60:.1f} |"
        )
    return "\n".join(lines)


def _last_outcomes(runs: Sequence[Result]) -> dict[tuple[int, int], bool]:
    """Return for each task, by seed and task, whether it was solved at the end."""
    return {
        (int(run.settings["seed"]), task): solved for run in runs for task, solved in enumerate(run.points[-1].outcomes)
    }


def picture(path: Path, results: Mapping[str, Sequence[Result]], comparison: Comparison) -> None:
    lines = []
    for label, runs in results.items():
        tokens, solved, played = zip(*pooled(runs), strict=True)
        lines.append(success_curve(label, tokens, solved, played))
    seeds = max(len(runs) for runs in results.values())
    curves(
        path,
        lines,
        ylabel="Solved held-out tasks",
        xlabel="Sampled tokens",
        title=comparison.title,
        note=f"{seeds} seeds together, 95% intervals" if seeds != 1 else "1 seed, 95% intervals",
        percent=True,
    )


def tell(name: str, point: Point) -> None:
    """Print a line for whoever watches: a run that has collapsed can be stopped."""
    outcome = f"{point.solved} of {len(point.outcomes)} solved"
    print(f"{name}: {outcome} after {point.steps} steps, {point.sampled:,} tokens", flush=True)


def read(path: Path) -> Comparison:
    """Read a comparison. Raises ConfigError where the file holds none."""
    try:
        return Comparison.model_validate(read_settings(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {error}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=HERE / "methods.yaml")
    parser.add_argument("--out", type=Path, help="folder of results; by default runs/NAME of the file")
    parser.add_argument("--methods", nargs="+", help="labels to run; by default all")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds to run; by default all")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    comparison = read(options.file)
    out = options.out or Path("runs") / options.file.stem
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Result]] = {}
    chosen = [(label, seed) for label in comparison.methods for seed in comparison.seeds]
    configs = {key: comparison.config(*key) for key in chosen}  # every mistake before anything runs
    for (label, seed), config in configs.items():
        path = out / f"{label.replace('/', '_')}-seed-{seed}.json"
        result = finished(path, config, comparison)
        wanted = label in (options.methods or [label]) and seed in (options.seeds or [seed])
        if result is None and wanted and not options.table:
            result = play(config, comparison, partial(tell, f"{label}, seed {seed}"))
            aside = path.with_suffix(".tmp")
            aside.write_text(result.model_dump_json(), encoding="utf-8")
            aside.rename(path)
        if result is not None:
            results.setdefault(label, []).append(result)
    if not results:
        raise ConfigError(f"nothing has finished in {out}")
    print(f"\n{table(results)}\n")
    picture(out / "success.png", results, comparison)
    (out / "table.md").write_text(table(results) + "\n", encoding="utf-8")
    print(f"{out / 'success.png'}, {out / 'table.md'}")


if __name__ == "__main__":
    try:
        main()
    except OpdError as problem:
        raise SystemExit(str(problem)) from None
