"""The commands that run something: `opd train`, `precompute`, `eval`, `serve` and `demo`.

Each is two functions: one adds its arguments to a parser, the other runs it and returns the exit code.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.errors import ConfigError
from opd.launch.cli.command import add_resume_options, positive, put_option
from opd.ranks.join import join
from opd.ranks.launcher import before_joining, check_launcher
from opd.ranks.ranks import Ranks, started_ranks

if TYPE_CHECKING:
    from opd.launch.settings.config import Config

UNMEASURED, INTERRUPTED = 1, 130


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `opd train`."""
    parser.add_argument("file", metavar="FILE", help="a YAML file, or the folder of a run")
    parser.add_argument("--steps", metavar="N", help="short for --train.steps N")
    parser.add_argument("--out", metavar="DIR", help="the run's folder")
    add_resume_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--ranks", metavar="N", type=positive, help="with --dry-run: plan for so many processes")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # what the deepspeed launcher adds; LOCAL_RANK says it


def train_run(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Print the plan and train by it; return 0, or what says why the run ended early (`opd.launch.run.signals`)."""
    from opd.launch.checks.text import check_model_text, refuse_problems
    from opd.launch.plan.plan import plan
    from opd.launch.plan.storage import check_room_before_loading
    from opd.launch.run.out import choose_out
    from opd.tracking.console import LastingConsole

    put_option(overrides, "train.steps", arguments.steps)
    put_option(overrides, "out", arguments.out)
    if arguments.ranks and not arguments.dry_run:
        raise ConfigError("--ranks plans for so many processes: give it with --dry-run (a launcher starts them)")
    config, ranks = _read_and_join(arguments.file, overrides)
    if (arguments.ranks or 1) > 1 and config.backend == "local":
        raise ConfigError(
            f"--ranks {arguments.ranks} plans for so many processes, and backend = local is one. Leave it out, or give "
            "--backend deepspeed and --deepspeed zero2 (or your JSON)"
        )
    out = ranks.from_first(lambda: choose_out(config, resume=arguments.resume, overwrite=arguments.overwrite))
    report = ranks.from_first(lambda: check_model_text(config))
    if ranks.first and (arguments.dry_run or config.tracking.console):
        made = plan(config, out, ranks=arguments.ranks or ranks.world_size, text=report, disk=True)
        LastingConsole().print(made.table())
    ranks.agree(lambda: refuse_problems(report))
    if not (arguments.resume or arguments.overwrite):
        ranks.from_first(lambda: check_room_before_loading(config, out))
    if arguments.dry_run:
        _show_tasks(config, ranks)
        return 0
    from opd.launch.run.training import train

    result = train(config.at(out), resume=arguments.resume, overwrite=arguments.overwrite)
    if result.interrupted and ranks.first:
        print(f"stopped after step {result.steps}; go on with: opd train {out} --resume", file=sys.stderr)
    return result.exit_code


def _show_tasks(config: Config, ranks: Ranks) -> None:
    """Begin a task of each kind, as the run would before it loads a model, and print what is seen of it."""
    from opd.launch.plan.plan import as_table
    from opd.launch.run.first_look import first_look, rows_of
    from opd.launch.run.out import recommend_variables
    from opd.tracking.console import LastingConsole

    if ranks.first:
        recommend_variables(config)
    seen = ranks.from_first(lambda: first_look(config))
    if ranks.first:
        LastingConsole().print(as_table(rows_of(seen)))


def _read_and_join(file: str, overrides: dict[str, Any]) -> tuple[Config, Ranks]:
    """Read and check the settings, and only then meet the other processes of a launch, if there are any."""
    from opd.launch.checks.loading import load_config
    from opd.launch.checks.starting import startable

    alone = started_ranks() == 1
    if not alone:
        before_joining(check_launcher)
    config = before_joining(lambda: startable(load_config(file, overrides), file))
    return config, Ranks() if alone else before_joining(join)


def add_precompute_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `opd precompute`."""
    parser.add_argument("file", metavar="FILE", help="a YAML file, or the folder of a run")
    parser.add_argument("--steps", metavar="N", help="short for --train.steps N")
    parser.add_argument("--out", metavar="DIR", help="the run's folder")
    add_resume_options(parser)


def precompute(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Run the stages that prepare data, and stop before the first that trains on it."""
    from opd.launch.run.out import choose_out

    put_option(overrides, "train.steps", arguments.steps)
    put_option(overrides, "out", arguments.out)
    config, ranks = _read_and_join(arguments.file, overrides)
    if all(stage.trains for stage in config.stages):
        why = "with data: it trains on what an earlier run prepared" if config.inputs.folders else ""
        raise ConfigError(f"method = {config.method} prepares nothing ahead of training{why and ', '}{why}")
    out = ranks.from_first(lambda: choose_out(config, resume=arguments.resume, overwrite=arguments.overwrite))
    from opd.launch.run.training import train

    result = train(config.at(out), resume=arguments.resume, overwrite=arguments.overwrite, only_prepare=True)
    if ranks.first:
        done = "stopped; go on with: opd precompute" if result.interrupted else "prepared; train with: opd train"
        print(f"{done} {out} --resume", file=sys.stderr)
    return result.exit_code


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `opd eval`."""
    parser.add_argument(
        "target", metavar="RUN_OR_FILE", help="the folder of a run, or a YAML file (its model as it is)"
    )
    parser.add_argument("--tasks", metavar="N", help="short for --eval.tasks N")


def evaluate(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Play held-out tasks; return 1 if the environment broke in every episode."""
    from opd.launch.checks.loading import load_config
    from opd.launch.settings.reader import holds_run

    put_option(overrides, "eval.tasks", arguments.tasks)
    target = Path(arguments.target)
    config = load_config(target, overrides)
    if not config.eval.tasks:
        raise ConfigError(f"{target}: eval.tasks = 0, so there is nothing to evaluate. Give --tasks N.")
    from opd.launch.run.evaluate import evaluate_run

    score = evaluate_run(config, run=target if holds_run(target) else None)
    return 0 if score.played else UNMEASURED


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `opd serve`."""
    parser.add_argument(
        "target", metavar="MODEL_OR_FILE", help="a model (a teacher to be asked), or the YAML file of a run"
    )
    parser.add_argument("--host", metavar="HOST", default="127.0.0.1", help="default: 127.0.0.1; else a key is needed")
    parser.add_argument("--port", metavar="PORT", type=positive, default=8000, help="default: 8000")


def serve(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Become a vLLM server; this does not return."""
    from opd.launch.checks.loading import model_to_serve
    from opd.launch.run import servers

    model, rollout = model_to_serve(arguments.target, overrides)
    servers.serve(model, rollout, host=arguments.host, port=arguments.port)


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `opd demo`."""
    parser.add_argument("--seeds", metavar="N", type=positive, default=1, help="how many runs to make (default: 1)")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/demo"), help="default: runs/demo")


def show_demo(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Train the agents of the demo and show what they learned."""
    from opd.launch.cli.demo import demo

    demo(seeds=arguments.seeds, out=arguments.out)
    return 0
