"""The `opd` command: reads the command line, prints errors as a person wants them, and hands over.

Nothing heavy is imported before it is needed: `opd --help` and every wrong setting answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd import __version__
from opd.errors import ConfigError, OpdError
from opd.ranks.join import join
from opd.ranks.ranks import Ranks, SharedError, started_ranks

if TYPE_CHECKING:
    from opd.launch.settings.config import Config

UNMEASURED, USAGE_ERROR, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0, 1 for a run that cannot learn, 2 for a mistake in what was asked, 130 after
    Ctrl-C."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `my_module:MyEnv` lies beside the settings; last, so that it shadows nothing
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except OpdError as error:
        _print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone; Python must not try to flush it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return code


def _print_error(error: OpdError) -> None:
    """Of several processes, whoever has an error prints it with its number; what all have, the first prints."""
    rank = int(os.environ.get("RANK") or 0)
    if rank and isinstance(error, SharedError):
        return
    prefix = f"error: rank {rank}: " if rank else "error: "
    print(textwrap.indent(str(error), prefix), file=sys.stderr)


@dataclass(frozen=True, slots=True)
class _Command:
    """A subcommand: what it takes, what it does, and whether it accepts `--key.sub value`."""

    name: str
    summary: str
    example: str
    run: Callable[[argparse.Namespace, dict[str, Any]], int]
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    takes_settings: bool = False


def _run(argv: list[str]) -> int:
    parser, parsers = _parsers()
    argv = _with_auto(argv)
    command = next((c for c in _COMMANDS if argv and argv[0] == c.name), None)
    overrides: dict[str, Any] = {}
    if command is not None and command.takes_settings:
        from opd.launch.settings.config import all_settings
        from opd.launch.settings.overrides import split

        options = [option for action in parsers[command.name]._actions for option in action.option_strings]
        argv, overrides = split(argv, options=options, settings=all_settings())
    arguments = parser.parse_args(argv)
    if command is None:
        parser.print_help()
        return USAGE_ERROR
    return command.run(arguments, overrides)


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="opd",
        description="Train LLM agents by on-policy self-distillation.",
        epilog="`opd COMMAND --help` tells more. Start with `opd demo`.",
        formatter_class=shape,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"opd {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    parsers = {}
    for command in _COMMANDS:
        tail = "\nAny setting of the file can be given as --key.sub VALUE." if command.takes_settings else ""
        parsers[command.name] = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog=f"example: {command.example}{tail}",
            formatter_class=shape,
            allow_abbrev=False,
        )
        command.arguments(parsers[command.name])
    return parser, parsers


def _resume_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in the folder; `--resume auto`: or begin one there"
    )
    parser.add_argument("--resume=auto", dest="resume", action="store_const", const="auto", help=argparse.SUPPRESS)
    parser.add_argument("--overwrite", action="store_true", help="delete the run in the folder first")


def _with_auto(argv: list[str]) -> list[str]:
    """`--resume auto` as one argument: `--resume FILE` is a flag and a file."""
    joined: list[str] = []
    for argument in argv:
        if argument == "auto" and joined[-1:] == ["--resume"]:
            joined[-1] = "--resume=auto"
        else:
            joined.append(argument)
    return joined


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a YAML file, or the folder of a run")
    parser.add_argument("--steps", metavar="N", help="short for --train.steps N")
    parser.add_argument("--out", metavar="DIR", help="the run's folder")
    _resume_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--ranks", metavar="N", type=_positive, help="with --dry-run: plan for so many processes")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # what the deepspeed launcher adds; LOCAL_RANK says it


def _train(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from rich.console import Console

    from opd.launch.checks.loading import load_config
    from opd.launch.plan.plan import plan
    from opd.launch.run.out import choose_out

    _short(overrides, "train.steps", arguments.steps)
    _short(overrides, "out", arguments.out)
    if arguments.ranks and not arguments.dry_run:
        raise ConfigError("--ranks plans for so many processes: give it with --dry-run (a launcher starts them)")
    ranks = join() if started_ranks() > 1 else Ranks()
    config = ranks.agree(lambda: _startable(load_config(arguments.file, overrides), arguments.file))
    out = ranks.from_first(lambda: choose_out(config, resume=arguments.resume, overwrite=arguments.overwrite))
    if ranks.first and (arguments.dry_run or config.tracking.console):
        Console().print(plan(config, out, ranks=arguments.ranks or ranks.world_size).table())
    if arguments.dry_run:
        return 0
    from opd.launch.train import train

    result = train(config.at(out), resume=arguments.resume, overwrite=arguments.overwrite)
    if result.interrupted:
        if ranks.first:
            print(f"stopped after step {result.steps}; go on with: opd train {out} --resume", file=sys.stderr)
        return INTERRUPTED
    return 0


def _startable(config: Config, source: str) -> Config:
    from opd.launch.checks.starting import check_started

    check_started(config)
    if config.deepspeed is not None:
        from opd.launch.checks.deepspeed import check_deepspeed

        check_deepspeed(config, source=source)
    return config


def _precompute_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a YAML file, or the folder of a run")
    parser.add_argument("--steps", metavar="N", help="short for --train.steps N")
    parser.add_argument("--out", metavar="DIR", help="the run's folder")
    _resume_arguments(parser)


def _precompute(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from opd.launch.checks.loading import load_config
    from opd.launch.run.out import choose_out

    _short(overrides, "train.steps", arguments.steps)
    _short(overrides, "out", arguments.out)
    ranks = join() if started_ranks() > 1 else Ranks()
    config = ranks.agree(lambda: _startable(load_config(arguments.file, overrides), arguments.file))
    if all(stage.trains for stage in config.stages):
        why = "with data: it trains on what an earlier run prepared" if config.inputs.folders else ""
        raise ConfigError(f"method = {config.method} prepares nothing ahead of training{why and ', '}{why}")
    out = ranks.from_first(lambda: choose_out(config, resume=arguments.resume, overwrite=arguments.overwrite))
    from opd.launch.train import train

    result = train(config.at(out), resume=arguments.resume, overwrite=arguments.overwrite, only_prepare=True)
    if ranks.first:
        done = "stopped; go on with: opd precompute" if result.interrupted else "prepared; train with: opd train"
        print(f"{done} {out} --resume", file=sys.stderr)
    return INTERRUPTED if result.interrupted else 0


def _store_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, summary in (("inspect", "what it holds, and by whom"), ("verify", "whether it is whole, byte by byte")):
        action = actions.add_parser(name, help=summary)
        action.add_argument("folder", metavar="FOLDER", type=Path, help="a store, or the folder of a run that has one")


def _store(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from opd.launch.plan.stored import inspect, problems

    if arguments.action == "inspect":
        lines = inspect(arguments.folder)
        width = max(len(name) for name, _ in lines)
        print("\n".join(f"{name:{width}}  {value}" for name, value in lines))
        return 0
    found = problems(arguments.folder)
    print("\n".join(found) or f"{arguments.folder} is whole")
    return int(bool(found))


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", metavar="RUN_OR_FILE", help="the folder of a run, or a YAML file (its model as it is)"
    )
    parser.add_argument("--tasks", metavar="N", help="short for --eval.tasks N")


def _eval(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from opd.launch.checks.loading import load_config
    from opd.launch.settings.reader import holds_run

    _short(overrides, "eval.tasks", arguments.tasks)
    target = Path(arguments.target)
    config = load_config(target, overrides)
    if not config.eval.tasks:
        raise ConfigError(f"{target}: eval.tasks = 0, so there is nothing to evaluate. Give --tasks N.")
    from opd.launch.run.evaluate import evaluate_run

    score = evaluate_run(config, run=target if holds_run(target) else None)
    return 0 if score.played else UNMEASURED


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", metavar="MODEL_OR_FILE", help="a model (a teacher to be asked), or the YAML file of a run"
    )
    parser.add_argument("--host", metavar="HOST", default="127.0.0.1", help="default: 127.0.0.1; else a key is needed")
    parser.add_argument("--port", metavar="PORT", type=_positive, default=8000, help="default: 8000")


def _serve(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from opd.launch.checks.loading import model_to_serve
    from opd.launch.run.servers import serve

    model, rollout = model_to_serve(arguments.target, overrides)
    serve(model, rollout, host=arguments.host, port=arguments.port)


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", metavar="N", type=_positive, default=1, help="how many runs to make (default: 1)")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/demo"), help="default: runs/demo")


def _demo(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from opd.launch.cli.demo import demo

    demo(seeds=arguments.seeds, out=arguments.out)
    return 0


def _envs_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="the registered environments (the default)")
    check = actions.add_parser("check", help="whether an environment keeps its contract")
    check.add_argument("id", metavar="ID", help="a registered id, my_package.my_module:MyEnv, or LIBRARY:NAME")
    check.add_argument("--kwargs", metavar="YAML", default="{}", help="arguments of its constructor: '{digits: 3}'")


def _envs(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    import opd.envs

    if arguments.action != "check":
        print("\n".join([*opd.envs.list_envs(), *opd.envs.adapters.forms()]))
        return 0
    findings = opd.envs.check(arguments.id, _mapping(arguments.kwargs, flag="--kwargs"))
    for finding in findings:
        print(f"{finding.severity}: {finding.message}")
    broken = any(finding.severity == "error" for finding in findings)
    print(f"{arguments.id} {'breaks' if broken else 'keeps'} the contract of an environment")
    return int(broken)


def _mapping(text: str, *, flag: str) -> dict[str, Any]:
    """The settings in a piece of YAML. Raises ConfigError when it holds something else."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{flag}: {text!r} is no YAML: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{flag}: {text!r} must be settings, such as '{{digits: 3}}'")
    return value


def _methods(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from opd.trainers.loop.registry import methods

    width = max(map(len, methods()))
    for name, spec in methods().items():
        print(f"{name:{width}}  {spec.summary}")
    return 0


def _skills_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    summaries = {
        "list": "a line a skill, those that lift the teacher most first",
        "show": "one skill, and where it comes from",
        "edit": "change a skill, or retire it; the run takes that up",
        "export": "write them to a file, to read or to keep",
    }
    for name, summary in summaries.items():
        action = actions.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        action.add_argument("target", metavar="RUN_OR_FILE", type=Path, help="the folder of a run, or a skills.jsonl")
        if name in ("show", "edit"):
            action.add_argument("id", metavar="ID", help="a skill's, from `opd skills list`")
        if name == "edit":
            action.add_argument("--retire", action="store_true", help="never show it again, nor make it anew")
            for part in ("workflow", "success", "mistakes"):
                action.add_argument(f"--{part}", metavar="TEXT", help="its new text; none given: $EDITOR opens all")
        if name == "export":
            action.add_argument("--to", metavar="FILE", type=Path, required=True, help="FILE.md or FILE.jsonl")
            action.add_argument("--usable", action="store_true", help="only those that may be shown")


def _skills(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from rich.console import Console

    from opd.launch.cli import skills

    if arguments.action == "list":
        skills.show_all(arguments.target, Console())
    elif arguments.action == "show":
        print(skills.show_one(arguments.target, arguments.id), end="")
    elif arguments.action == "edit":
        given = {part: text for part in skills.PARTS if (text := getattr(arguments, part)) is not None}
        if given and arguments.retire:
            raise ConfigError("--retire takes no new text: give the one or the other")
        changed = skills.change(arguments.target, arguments.id, given, retire=arguments.retire)
        print(f"{changed.id} is now version {changed.version}{', retired' if changed.retired else ''}")
    else:
        print(f"{skills.export(arguments.target, arguments.to, usable=arguments.usable)} skills in {arguments.to}")
    return 0


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", help="print its settings, defaults and all")
    parser.add_argument(
        "--explain", metavar="KEY", nargs="?", const="", help="what a setting is for; none: all of them"
    )


def _config(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from opd.launch.checks.loading import load_config
    from opd.launch.settings.config import all_settings, explain

    if (arguments.explain is None) == (arguments.file is None):
        raise ConfigError("opd config takes a FILE or --explain KEY, one of them")
    if arguments.explain is not None:
        settings = explain(arguments.explain) if arguments.explain else list(all_settings().values())
        print("\n".join(setting.explanation() for setting in settings))
    else:
        print(load_config(arguments.file, overrides, check_machine=False).to_yaml(), end="")
    return 0


def _short(overrides: dict[str, Any], key: str, value: str | None) -> None:
    """An option that stands for a setting."""
    if value is not None:
        from opd.launch.settings.overrides import put
        from opd.launch.settings.reader import parse_yaml

        put(overrides, key, value if key == "out" else parse_yaml(value, f"command line: {key}"))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


_COMMANDS = (
    _Command("train", "train by a file of settings", "opd train examples/opsd.yaml --steps 20 --train.lr 1e-4",
             _train, _train_arguments, takes_settings=True),
    _Command("precompute", "make a run's stored episodes and scores, without the training on them",
             "opd precompute examples/lightning_opd.yaml", _precompute, _precompute_arguments, takes_settings=True),
    _Command("store", "look into a store of a teacher's scores", "opd store verify runs/lightning-opd-lookup-tiny",
             _store, _store_arguments),
    _Command("eval", "play held-out tasks with a trained run", "opd eval runs/opsd-lookup-tiny --tasks 300",
             _eval, _eval_arguments, takes_settings=True),
    _Command("serve", "serve a model with vLLM, for rollouts or as a teacher", "opd serve examples/opsd_vllm.yaml",
             _serve, _serve_arguments, takes_settings=True),
    _Command("demo", "watch a small agent get better, no download", "opd demo --seeds 3", _demo, _demo_arguments),
    _Command("envs", "list environments, or check one", "opd envs check opd/Lookup-v0", _envs, _envs_arguments),
    _Command("skills", "read and change the skills of a run", "opd skills list runs/skill-sd-lookup-tiny",
             _skills, _skills_arguments),
    _Command("methods", "list the methods that can train", "opd methods", _methods),
    _Command("config", "print resolved settings, or explain one", "opd config --explain rollout.temperature",
             _config, _config_arguments, takes_settings=True),
)  # fmt: skip
