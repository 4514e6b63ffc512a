"""The commands that look at something: `opd store`, `envs`, `methods`, `skills` and `config`.

Each is two functions: one adds its arguments to a parser, the other runs it and returns the exit code.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from opd.addressing import is_address
from opd.errors import ConfigError
from opd.plain_text import printable
from opd.secrets import redact


def add_store_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `opd store`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, summary in (("inspect", "what it holds, and by whom"), ("verify", "whether it is whole, byte by byte")):
        action = actions.add_parser(name, help=summary)
        action.add_argument("folder", metavar="FOLDER", type=Path, help="a store, or the folder of a run that has one")


def look_into_store(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Print what a store holds, or what is wrong with it; return 1 if something is."""
    from opd.launch.plan.stored import inspect, problems

    if arguments.action == "inspect":
        lines = inspect(arguments.folder)
        width = max(len(name) for name, _ in lines)
        print(printable("\n".join(f"{name:{width}}  {value}" for name, value in lines)))
        return 0
    found = problems(arguments.folder)
    print(printable("\n".join(found) or f"{arguments.folder} is whole"))
    return int(bool(found))


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `opd check`."""
    parser.add_argument("target", metavar="MODEL_OR_FILE", help="a model's name or folder, or a YAML file")
    parser.add_argument("--env", metavar="ID", help="an environment: its first prompt is shown as the model reads it")


def check_text_of_model(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Print what a model's tokenizer and chat template do; return 1 if a run could not go on with it."""
    from rich.markup import escape
    from rich.table import Table

    from opd.launch.checks.text import first_prompt, report_of
    from opd.tracking.console import LastingConsole

    report, chat, env = report_of(arguments.target, arguments.env, overrides)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in [*report.rows, *(("note", note) for note in report.notes)]:
        table.add_row(name, escape(redact(text)))
    for problem in report.problems:
        table.add_row("[red]problem[/]", escape(redact(problem)))
    LastingConsole().print(table)
    if arguments.env and chat is not None and env is not None:
        text, size = first_prompt(chat, env)
        print(f"\nthe first prompt of {arguments.env}, {size:,} tokens:\n{printable(text)}")
    return int(bool(report.problems))


def add_envs_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `opd envs`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="the registered environments (the default)")
    check = actions.add_parser("check", help="whether an environment keeps its contract")
    check.add_argument("id", metavar="ID", help="a registered id, my_package.my_module:MyEnv, or LIBRARY:NAME")
    check.add_argument(
        "--time-limit", metavar="SECONDS", type=float, default=120.0, help="for the whole check; then it is killed"
    )
    check.add_argument("--kwargs", metavar="YAML", default="{}", help="arguments of its constructor: '{digits: 3}'")


def list_or_check_envs(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """List the environments, or check one; return 1 if it breaks its contract."""
    import opd.envs

    if arguments.action != "check":
        print("\n".join([*opd.envs.list_envs(), *opd.envs.adapters.forms()]))
        return 0
    from opd.envs.checker_process import check_within

    report = check_within(arguments.id, _mapping(arguments.kwargs, flag="--kwargs"), time_limit=arguments.time_limit)
    lines = [*report.episode, *(f"{finding.severity}: {finding.message}" for finding in report.findings)]
    print(printable("\n".join(lines)))
    print(f"{arguments.id} {'breaks' if report.broken else 'keeps'} the contract of an environment")
    return int(report.broken)


def _mapping(text: str, *, flag: str) -> dict[str, Any]:
    """Return the settings in a piece of YAML. Raises ConfigError if it holds something else."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{flag}: {text!r} is no YAML: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{flag}: {text!r} must be settings, such as '{{digits: 3}}'")
    return value


def add_methods_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "addresses", metavar="ADDRESS", nargs="*", help="list this too: my_package.my_module:MyMethod, not installed"
    )


def list_methods(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Print a line for each method."""
    from opd.trainers.loop.registry import METHODS, find_method, methods

    for address in arguments.addresses:
        find_method(address)
    width = max(map(len, methods()))
    for name, spec in methods().items():
        print(f"{name:{width}}  {spec.summary}{'' if name in METHODS else f' [{spec.address}]'}")
    return 0


def add_skills_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `opd skills`."""
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


def work_on_skills(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """List, show, edit or export the skills of a run."""
    from opd.launch.cli import skills
    from opd.tracking.console import LastingConsole

    if arguments.action == "list":
        skills.show_all(arguments.target, LastingConsole())
    elif arguments.action == "show":
        print(printable(skills.show_one(arguments.target, arguments.id)), end="")
    elif arguments.action == "edit":
        given = {part: text for part in skills.PARTS if (text := getattr(arguments, part)) is not None}
        if given and arguments.retire:
            raise ConfigError("--retire takes no new text: give the one or the other")
        changed = skills.change(arguments.target, arguments.id, given, retire=arguments.retire)
        print(f"{changed.id} is now version {changed.version}{', retired' if changed.retired else ''}")
    else:
        print(f"{skills.export(arguments.target, arguments.to, usable=arguments.usable)} skills in {arguments.to}")
    return 0


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `opd config`."""
    parser.add_argument("file", metavar="FILE", nargs="?", help="print its settings, defaults and all")
    parser.add_argument(
        "--explain",
        metavar="KEY",
        nargs="?",
        const="",
        help="what a setting is for; none: all of them; with a FILE, also those of the method that it names; KEY may "
        "begin with a method's address, my_package.my_module:MyMethod.divergence",
    )


def print_config(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Print the resolved settings of a file, or what a setting is for."""
    from opd.launch.checks.loading import load_config
    from opd.launch.settings.config import all_settings, explain
    from opd.launch.settings.reader import file_of, read_settings, to_yaml
    from opd.trainers.loop.registry import find_method

    if arguments.explain is None and arguments.file is None:
        raise ConfigError("opd config takes a FILE, or --explain KEY")
    if arguments.explain is not None:
        key = arguments.explain
        if arguments.file is not None:
            find_method(str(read_settings(file_of(arguments.file)).get("method")))
        module, _, rest = key.partition(":")
        name, dot, below = rest.partition(".")
        if is_address(f"{module}:{name}"):
            key = f"{find_method(f'{module}:{name}').name}{dot}{below}"
        settings = explain(key) if key else list(all_settings().values())
        print("\n".join(setting.explanation() for setting in settings))
    else:
        print(to_yaml(load_config(arguments.file, overrides, check_machine=False).shown()), end="")
    return 0
