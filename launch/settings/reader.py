"""Reads and writes YAML as people mean it.

PyYAML follows YAML 1.1, where `1e-4` is text, `12:30` is 750, `no` is false, and the second of two equal
keys wins in silence. This reader follows YAML 1.2's core schema and refuses equal keys.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from opd.errors import ConfigError
from opd.launch.settings.problems import did_you_mean, nearest

RUN_MARK = "# Settings of an opd run"
"""How the `config.yaml` of a run begins."""

_MOST_BYTES, _MOST_LEVELS, _MOST_NUMBER, _MOST_DIGITS = 1_000_000, 64, 2**63 - 1, 200
_MOST_VALUES = 50_000
_HALF = re.compile("[\ud800-\udfff]")
_RARE_BREAKS = frozenset("\x85\u2028\u2029")


class _Loader(yaml.SafeLoader):
    """A safe loader with the scalars of YAML 1.2 and without duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is not text; put it in quotes", key_node.start_mark
                )
            if key in lines:
                problem = f"{key} is given twice (lines {lines[key]} and {line}); remove one"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key == "<<" and key_node.style is None:
                problem = "the merge key << is not read; write the settings out"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            lines[key] = line
        return super().construct_mapping(node, deep=deep)


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = _text_of(loader, node, "int")
    value = int(text, 0) if text[:2] in ("0x", "0o") else int(text) if len(text) < _MOST_DIGITS else _MOST_NUMBER + 1
    if abs(value) > _MOST_NUMBER:
        problem = f"{text[:40]} is too large a number (allowed: 64 bits)"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return value


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node))
    if not _PATTERNS["int"].match(text):  # `!!float 3` is a number too
        text = _text_of(loader, node, "float")
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _bool(loader: _Loader, node: yaml.ScalarNode) -> bool:
    return _text_of(loader, node, "bool").lower() == "true"


def _null(loader: _Loader, node: yaml.ScalarNode) -> None:
    _text_of(loader, node, "null")


def _text_of(loader: _Loader, node: yaml.ScalarNode, kind: str) -> str:
    """The text of a scalar, which a tag (`!!int abc`) may have called what it is not."""
    text = str(loader.construct_scalar(node))
    if not _PATTERNS[kind].match(text):
        raise yaml.constructor.ConstructorError(None, None, f"{text[:40]!r} is no {kind}", node.start_mark)
    return text


# YAML 1.2.2, section 10.3.2 (core schema), in the order in which they are tried.
_SCALARS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)

_PATTERNS = {name: re.compile(rf"^(?:{pattern})\Z") for name, pattern, _ in _SCALARS}


def _refuse(loader: yaml.SafeLoader, node: yaml.Node) -> None:
    """Raise ConstructorError, as for a tag that nobody knows."""
    loader.construct_undefined(node)


def _teach(loader: type[yaml.SafeLoader], dumper: type[yaml.SafeDumper]) -> None:
    """Give reader and writer the same scalars, so that what is written is quoted where it must be."""
    for name, pattern, first in _SCALARS:
        regexp = re.compile(f"^(?:{pattern})$")
        firsts = [c if c != "\0" else "" for c in first]
        for target in (loader, dumper):
            target.add_implicit_resolver(f"tag:yaml.org,2002:{name}", regexp, firsts)
    loader.add_constructor("tag:yaml.org,2002:int", _int)
    loader.add_constructor("tag:yaml.org,2002:float", _float)
    loader.add_constructor("tag:yaml.org,2002:bool", _bool)
    loader.add_constructor("tag:yaml.org,2002:null", _null)
    for name in ("timestamp", "binary", "set", "omap", "pairs"):  # of YAML 1.1: no setting is one
        loader.add_constructor(f"tag:yaml.org,2002:{name}", _refuse)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Write lines as a block; put rare line breaks of YAML 1.1, which PyYAML would fold, in double quotes."""
        style = '"' if _RARE_BREAKS.intersection(text) else "|" if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
_teach(_Loader, _Dumper)


def parse_yaml(text: str, source: str) -> Any:
    """Return the value that a YAML text holds. Raises ConfigError naming source, line and what is wrong there."""
    if len(text) > _MOST_BYTES:
        raise ConfigError(f"{source} has {len(text):,} characters, more than settings have ({_MOST_BYTES:,})")
    try:
        _check_size(text)
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        where = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise ConfigError(f"{source}:{where} {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML does not allow, a number too long to read
        raise ConfigError(f"{source}: {error}") from None


def _check_size(text: str) -> None:
    """Raise ValueError for more values than any settings have, or deeper in each other; a few aliases of aliases make
    more than memory holds."""
    whole, open_sizes, anchors = 0, [0], dict[str, int]()
    open_names: list[str | None] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"line {event.start_mark.line + 1}: " if event.start_mark else ""
        size = 1
        if isinstance(event, yaml.CollectionStartEvent):
            open_sizes.append(0)
            open_names.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size = open_sizes.pop() + 1
            if name := open_names.pop():
                anchors[name] = size
        elif isinstance(event, yaml.AliasEvent):
            size = anchors.get(event.anchor or "", 1)
            if event.anchor in open_names:
                raise ValueError(f"{where}*{event.anchor} stands within what it repeats; write the settings out")
        elif isinstance(event, yaml.ScalarEvent):
            anchors |= {event.anchor: 1} if event.anchor else {}
            if half := _HALF.search(event.value):
                raise ValueError(f"{where}{half[0]!a} is half of a character, which no file can hold")
        if not isinstance(event, yaml.CollectionStartEvent):
            open_sizes[-1] += size
            whole += size if isinstance(event, yaml.AliasEvent) else 1
        if len(open_names) > _MOST_LEVELS:
            raise ValueError(f"{where}more than {_MOST_LEVELS} levels of brackets or indentation")
        if whole > _MOST_VALUES:
            raise ValueError(f"{where}more than {_MOST_VALUES:,} values, those counted that aliases (*) repeat")


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file. Raises ConfigError if there is no such file, or it holds no mapping."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        siblings = sorted(str(p) for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise ConfigError(f"{path} {what}.{did_you_mean(nearest(str(path), siblings))}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        held = "is empty" if data is None else f"holds a {type(data).__name__}"
        raise ConfigError(f"{path} {held}, but must hold settings such as `method: opsd`, a line each.")
    return data


def to_yaml(data: Any) -> str:
    """Write plain data as YAML, keys in the order given."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def file_of(target: str | Path) -> Path:
    """Return the file of settings: the target itself, or the `config.yaml` of a run's folder."""
    path = Path(target)
    return path / "config.yaml" if holds_run(path) else path


def holds_run(folder: Path) -> bool:
    """True: an earlier run wrote its settings into this folder. False: it did not, or they cannot be read."""
    try:
        if not (folder / "config.yaml").is_file():  # to open a pipe would wait for whoever writes to it
            return False
        with (folder / "config.yaml").open(encoding="utf-8") as file:
            return file.readline(1000).startswith(RUN_MARK)
    except (OSError, ValueError):  # not readable, not text, or no name that a file can have
        return False
