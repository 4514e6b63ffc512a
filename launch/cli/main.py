"""The `opd` command: reads the command line, prints errors as a person wants them, and hands over.

Nothing heavy is imported before it is needed: `opd --help` and every wrong setting answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from opd import __version__
from opd.errors import ConfigError, OpdError
from opd.launch.cli import looks, runs
from opd.launch.cli.command import Command
from opd.launch.cli.streams import lasting_console
from opd.plain_text import LastingStream
from opd.ranks.ranks import SharedError, is_number
from opd.secrets import know_environment, redact_console

USAGE_ERROR, UNPRINTED = 2, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 1 for a run that cannot learn, 2 for a mistake in what was asked,
    130 after Ctrl-C. A console that goes away changes nothing of that, but for a command that is asked for its text."""
    redact_console()
    know_environment()
    with lasting_console() as console:
        return _main(list(sys.argv[1:] if argv is None else argv), console)


def _main(argv: list[str], console: LastingStream) -> int:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `my_module:MyEnv` lies beside the settings; last, so that it shadows nothing
    command = next((c for c in _COMMANDS if argv and argv[0] == c.name), None)
    if command is not None and command.runs:
        console.say = _say_that_it_is_gone
    try:
        _check_arguments(argv)
        code = _run(argv, command)
        console.flush()
    except OpdError as error:
        _print_error(error)
        return error.exit_code
    except UnicodeEncodeError as error:
        print(f"error: {_not_in_this_locale(ascii(error.object))}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return runs.INTERRUPTED
    if console.lost is None or isinstance(console.lost, BrokenPipeError) or command is None or command.runs:
        return code  # whoever read our output and left has what he wanted
    print(f"error: not all could be printed: {console.lost}", file=sys.stderr)
    return code or UNPRINTED


def _check_arguments(argv: Sequence[str]) -> None:
    """Raise ConfigError for an argument that is no text: bytes that the locale has no characters for."""
    for argument in argv:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise ConfigError(_not_in_this_locale(ascii(argument)))


def _not_in_this_locale(text: str) -> str:
    encoding = sys.getfilesystemencoding()
    return (
        f"{text} is no text to this locale, whose names of files are in {encoding}: set LC_ALL=C.UTF-8, or PYTHONUTF8=1"
    )


def _say_that_it_is_gone(why: str) -> None:
    print(f"nothing more can be printed ({why}); the command goes on without its console", file=sys.stderr, flush=True)


def _print_error(error: OpdError) -> None:
    """Print an error with the number of its process; an error that all processes have, the first alone prints."""
    told = os.environ.get("RANK") or "0"
    rank = int(told) if is_number(told) else 0
    if rank and isinstance(error, SharedError):
        return
    prefix = f"error: rank {rank}: " if rank else "error: "
    print(textwrap.indent(str(error), prefix), file=sys.stderr)


def _run(argv: list[str], command: Command | None) -> int:
    parser, parsers = _make_parsers()
    argv = _join_auto(argv)
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


def _make_parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
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


def _join_auto(argv: list[str]) -> list[str]:
    """Join `--resume auto` into one argument: `--resume FILE` is a flag and a file."""
    joined: list[str] = []
    for argument in argv:
        if argument == "auto" and joined[-1:] == ["--resume"]:
            joined[-1] = "--resume=auto"
        else:
            joined.append(argument)
    return joined


_COMMANDS = (
    Command("train", "train by a file of settings", "opd train examples/opsd.yaml --steps 20 --train.lr 1e-4",
            runs.train_run, runs.add_train_arguments, takes_settings=True, runs=True),
    Command("precompute", "make a run's stored episodes and scores, without the training on them",
            "opd precompute examples/lightning_opd.yaml",
            runs.precompute, runs.add_precompute_arguments, takes_settings=True, runs=True),
    Command("store", "look into a store of a teacher's scores", "opd store verify runs/lightning-opd-lookup-tiny",
            looks.look_into_store, looks.add_store_arguments),
    Command("eval", "play held-out tasks with a trained run", "opd eval runs/opsd-lookup-tiny --tasks 300",
            runs.evaluate, runs.add_eval_arguments, takes_settings=True, runs=True),
    Command("serve", "serve a model with vLLM, for rollouts or as a teacher", "opd serve examples/opsd_vllm.yaml",
            runs.serve, runs.add_serve_arguments, takes_settings=True, runs=True),
    Command("check", "see how a model's turns are written, read and ended, before anything is loaded",
            "opd check Qwen/Qwen3-0.6B --env opd/Lookup-v0",
            looks.check_text_of_model, looks.add_check_arguments, takes_settings=True, runs=True),
    Command("demo", "watch a small agent get better, no download", "opd demo --seeds 3",
            runs.show_demo, runs.add_demo_arguments, runs=True),
    Command("envs", "list environments, or check one", "opd envs check opd/Lookup-v0",
            looks.list_or_check_envs, looks.add_envs_arguments),
    Command("skills", "read and change the skills of a run", "opd skills list runs/skill-sd-lookup-tiny",
            looks.work_on_skills, looks.add_skills_arguments),
    Command("methods", "list the methods that can train", "opd methods",
            looks.list_methods, looks.add_methods_arguments),
    Command("config", "print resolved settings, or explain one", "opd config --explain rollout.temperature",
            looks.print_config, looks.add_config_arguments, takes_settings=True),
)  # fmt: skip
