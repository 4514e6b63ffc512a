"""Objects that live outside of this repository: named `my_package.my_module:name` in the settings.

Methods, divergences, weightings and environments are found so. A run writes down where each came from, and a resume
looks whether that has changed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from hashlib import sha256
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from opd.errors import ConfigError
from opd.standing import kept_standing

SCRIPT = "__main__"
"""The module of a script that is run, or of a notebook, which has no file."""
_STANDARD = Path(ast.__file__).parent
"""Where Python's own modules lie."""
_ADDRESS = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)")


def is_address(text: str) -> bool:
    """True for `module:name`, dotted before the colon."""
    return _ADDRESS.fullmatch(text) is not None


def load(address: str, *, setting: str) -> Any:
    """Import what an address names; `setting` is the key that it stands under.

    Raises ConfigError where the module is not found or fails while it is imported, or has no such name.
    """
    named = _ADDRESS.fullmatch(address)
    if named is None:
        raise ConfigError(f"{setting} = {address!r} is no address; write my_package.my_module:name")
    if named["module"] not in sys.modules and find_module(named["module"]) is None:
        raise ConfigError(
            f"{setting}: {address!r} names the module {named['module']!r}, which cannot be found. Is its folder on "
            "PYTHONPATH, or the package installed?"
        )
    try:
        with kept_standing(f"the module {named['module']!r}"):
            module = importlib.import_module(named["module"])
    except (Exception, SystemExit) as error:  # a stranger's module may do anything while it is imported
        raise ConfigError(f"{setting}: {address!r} cannot be imported: {_told(error)}") from error
    try:
        return getattr(module, named["name"])
    except AttributeError:
        near = get_close_matches(named["name"], vars(module), n=1)
        hint = f'. Did you mean "{near[0]}"?' if near else ""
        raise ConfigError(
            f"{setting}: {address!r}: the module {named['module']!r} defines no {named['name']!r}{hint}"
        ) from None


def _told(error: BaseException) -> str:
    """Say what went wrong; of a mistake in the writing also where, as Python's own text names the file alone."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    return f"{type(error).__name__}: {' '.join(str(error).split()):.400}"


@cache  # it reads what every installed package says of itself, which takes a while
def installed(group: str) -> dict[str, str]:
    """Return the addresses that installed packages offer under an entry-point group, by their short names.

    A package says so in its pyproject.toml, for a method:

        [project.entry-points."opd.methods"]
        nudge = "my_package.my_module:Nudge"
    """
    return {entry.name: f"{entry.module}:{entry.attr}" for entry in entry_points(group=group)}


def find_module(name: str) -> ModuleSpec | None:
    """Find a module's spec without importing its parents, as `importlib.util.find_spec` would; None: there is none, as
    of a script that is run."""
    parent, _, _ = name.rpartition(".")
    if name in sys.modules and getattr(sys.modules[name], "__spec__", None) is None:
        return None
    if name in sys.modules or not parent:
        return importlib.util.find_spec(name)
    found = find_module(parent)
    if found is None or found.submodule_search_locations is None:
        return None
    specs = (finder.find_spec(name, found.submodule_search_locations) for finder in sys.meta_path)
    return next((spec for spec in specs if spec is not None), None)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the code behind an address stands: the file that defines it, and a digest of it and of its package.

    >>> Origin("shop.methods:Fade", "/home/me/shop/methods.py", "a3f0…")  # doctest: +SKIP
    """

    address: str
    file: str
    sha256: str
    """Hex, over the module's source and every module that it imports, directly or not, from its own top-level package
    or from beside that; not of other installed packages."""


def origin(address: str) -> Origin:
    """Tell where an address leads. Nothing is imported. Raises ConfigError where its module is not found."""
    module = address.partition(":")[0]
    files = dict(_sources(module))
    if module not in files:
        raise ConfigError(
            f"{address!r} names the module {module!r}, which cannot be found. Is its folder on PYTHONPATH, or the "
            "package installed?"
        )
    digest = sha256()
    for name in sorted(files):
        digest.update(f"{name}\0".encode() + files[name].read_bytes() + b"\0")
    return Origin(address, str(files[module]), digest.hexdigest())


def _sources(module: str) -> Iterator[tuple[str, Path]]:
    """Yield the files of a module and of those that it imports from its own top-level package, each once."""
    package, seen, todo = module.partition(".")[0], set[str](), [module]
    beside = _folder_of(package)
    while todo:
        name = todo.pop()
        top = name.partition(".")[0]
        if name in seen or (top != package and (beside is None or _folder_of(top) != beside)):
            continue
        seen.add(name)
        path = _file_of(name)
        if path is None:
            continue
        yield name, path
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        todo += [*_imported(path, inside), *_parents(name)]


def _file_of(module: str) -> Path | None:
    """Return the source file of a module; None where it has none. A script that is run has a file, but no spec."""
    if module == SCRIPT:
        file = getattr(sys.modules[SCRIPT], "__file__", None)
        return Path(file).resolve() if file else None
    spec = find_module(module)
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _folder_of(package: str) -> Path | None:
    """Return the folder that a top-level package or module lies in, if that is somebody's own: files beside it belong
    together. None where packages are installed, of built-in modules, and of those that are not there."""
    path = _file_of(package) if package and package not in sys.builtin_module_names else None
    if path is None:
        return None
    folder = path.parent.parent if path.name == "__init__.py" else path.parent
    return None if {"site-packages", "dist-packages"} & set(folder.parts) or folder == _STANDARD else folder


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _imported(path: Path, package: str) -> Iterator[str]:
    """Yield the modules that a file may import, with relative names resolved against its package."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
