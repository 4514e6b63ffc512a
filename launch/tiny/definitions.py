"""A digest of the code that a result depends on: the definitions of this package that some first ones reach.

For caches whose content is made by code. The digest changes with whatever that code can run, and with nothing else: not
with a comment, a docstring or the layout of a file, and not with other definitions that stand in it. What is reached is
read from the sources as they are on the disk: every name that a definition mentions, wherever in the package it is
defined. That is too much where a name is mentioned and not used. It is too little only for code that looks a name up by
its text in a module, or that is replaced while it runs. Versions of other packages are the caller's to add.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.util import find_spec, resolve_name
from itertools import chain
from pathlib import Path
from typing import Any

Name = tuple[str, str]
"""A module, and a name in it."""

_PACKAGE = __name__.partition(".")[0]
_ALL = "*"
"""In place of a name: whatever the module defines."""


@dataclass(frozen=True, slots=True)
class _Source:
    """A module, by the statements at its top level."""

    definitions: dict[str, list[ast.stmt]] = field(default_factory=lambda: defaultdict(list))
    """Those that give a name what it stands for."""
    rest: list[ast.stmt] = field(default_factory=list)
    """Others, such as a loop that fills a table: they belong to every definition of the module."""
    imports: dict[str, set[Name]] = field(default_factory=lambda: defaultdict(set))
    """What a name stands for that was imported at the top level."""


def digest(roots: Iterable[Name]) -> str:
    """Return the SHA-256, in hex, of all definitions that the roots reach. Raises ValueError for an undefined root."""
    sources: dict[str, _Source] = {}
    reached: dict[Name, str] = {}
    todo = [*roots]
    for module, name in todo:
        _check_root(module, name, _load(sources, module))
    while todo:
        module, name = todo.pop()
        if (module, name) in reached or module.partition(".")[0] != _PACKAGE:
            continue
        source = _load(sources, module)
        tree: list[str] = []
        naming: list[ast.AST] = []
        _write(_statements(source, name), tree, naming)
        reached[module, name] = " ".join(tree)
        todo += source.imports.get(name, ())
        todo += _names_mentioned(module, source, naming)
    text = "\0".join(f"{module} {name}\0{tree}" for (module, name), tree in sorted(reached.items()))
    return sha256(text.encode()).hexdigest()


def _check_root(module: str, name: str, source: _Source) -> None:
    if module.partition(".")[0] != _PACKAGE:
        raise ValueError(f"{module}.{name} is not of {_PACKAGE}: its definitions cannot be followed from here")
    if source.definitions and name not in source.definitions:
        raise ValueError(f"{module} does not define {name!r} at its top level: there is nothing to digest")


def _load(sources: dict[str, _Source], module: str) -> _Source:
    if module not in sources:
        sources[module] = _read(module)
    return sources[module]


def _read(module: str) -> _Source:
    """Read a module's source; a file that is no Python, or no longer, is one statement."""
    file = _file(module)
    text = file.read_text("utf-8") if file else ""
    source = _Source()
    try:
        body = ast.parse(text).body
    except SyntaxError:
        body = [ast.Assert(ast.Constant(text))]
    for statement in chain.from_iterable(map(_without_type_checking, body)):
        names = _names_defined(statement)
        for name in names:
            source.definitions[name].append(statement)
        if names:
            continue
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            source.rest.append(statement)
        for node in ast.walk(statement):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for name, target in _names_imported(module, node):
                    source.imports[name].add(target)
    return source


def _without_type_checking(statement: ast.stmt) -> list[ast.stmt]:
    """Return the statement, without what is for type checkers alone."""
    if isinstance(statement, ast.If) and ast.unparse(statement.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        return statement.orelse
    return [statement]


def _statements(source: _Source, name: str) -> list[ast.stmt]:
    own = [name] if name != _ALL else sorted(source.definitions)
    return [*source.rest, *(statement for each in own for statement in source.definitions.get(each, ()))]


def _write(code: Any, tree: list[str], naming: list[ast.AST]) -> None:
    """Append a syntax tree as text, without docstrings, and those of its nodes that name something.

    `ast.dump`, and a walk for the names, take twice as long.
    """
    if isinstance(code, list):
        tree.append("[")
        for each in code:
            _write(each, tree, naming)
        tree.append("]")
    elif not isinstance(code, ast.AST):
        tree.append(repr(code))
    elif not _is_docstring(code):
        tree.append(type(code).__name__)
        if isinstance(code, ast.Name | ast.Attribute | ast.Import | ast.ImportFrom):
            naming.append(code)
        for name in code._fields:
            _write(getattr(code, name, None), tree, naming)


def _is_docstring(code: ast.AST) -> bool:
    """True: it is a string that stands by itself, below what it describes. False: it is code."""
    return isinstance(code, ast.Expr) and isinstance(code.value, ast.Constant) and isinstance(code.value.value, str)


def _names_mentioned(module: str, source: _Source, naming: list[ast.AST]) -> Iterator[Name]:
    """Yield what these nodes of a module name, here and in the modules that it imports."""
    seen = set[ast.AST]()
    for node in naming:  # a node comes before those within it
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            modules = [there for there, name in source.imports.get(node.value.id, ()) if name == _ALL]
            yield from ((there, node.attr) for there in modules)
            seen |= {node.value} if modules else set()
        elif isinstance(node, ast.Import | ast.ImportFrom):  # within a function
            yield from (target for _, target in _names_imported(module, node))
        elif isinstance(node, ast.Name) and node not in seen:
            yield module, node.id


def _file(module: str) -> Path | None:
    """Return the file of a module's source, for a loaded module the one it says; None if there is none."""
    loaded = sys.modules.get(module)
    if loaded is not None:
        return Path(loaded.__file__) if loaded.__file__ else None
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin else None


def _names_defined(statement: ast.stmt) -> list[str]:
    """Return the names to which a top-level statement of a module gives a value; none if it does more than that."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    targets: list[ast.expr] = []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    elif isinstance(statement, ast.Assign):
        targets = [part for t in statement.targets for part in (t.elts if isinstance(t, ast.Tuple | ast.List) else [t])]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    return names if len(names) == len(targets) else []


def _names_imported(module: str, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, Name]]:
    """Yield the names that an import statement of a module makes, and what they stand for, of this package alone."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            name = alias.name if alias.asname else alias.name.partition(".")[0]
            yield alias.asname or name, (name, _ALL)
        return
    there = node.module or ""
    if node.level:
        package = module if _is_package(module) else module.rpartition(".")[0]
        there = resolve_name("." * node.level + there, package)
    for alias in node.names:
        whole = f"{there}.{alias.name}"
        is_module = there.partition(".")[0] == _PACKAGE and _is_package(there) and _file(whole) is not None
        yield alias.asname or alias.name, (whole, _ALL) if is_module else (there, alias.name)


def _is_package(module: str) -> bool:
    file = _file(module)
    return file is not None and file.name == "__init__.py"
