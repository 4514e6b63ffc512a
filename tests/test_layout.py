"""The shape of the repository: which room may import which, sizes, and that nothing is left out of the wheel.

Not covered: imports by name at run time, such as the entry points of environments.
"""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from opd.trainers.loop.play import Player

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "opd": "opd",
    "envs": "opd.envs",
    "rewards": "opd.rewards",
    "trainers": "opd.trainers",
    "launch": "opd.launch",
}
GROUND = (
    *("errors", "config", "addressing", "losses", "types", "tool_calls", "json_text", "background", "grading"),
    *("disk", "formats", "ranks", "sandbox"),
)
"""Plain data, text and processes: what every room may use; environments and rewards use `PLAIN` of it."""
PLAIN = {
    *("types", "errors", "tool_calls", "json_text", "addressing", "background", "grading", "sandbox", "formats"),
}
"""What of it environments and rewards import: data, errors, texts, the sandbox, limits of time and clocks."""
STREETS = {
    "ground": {"ground"},
    "tracking": {"ground", "tracking"},
    "checkpoint": {"ground", "checkpoint"},
    "maths": {"ground", "maths"},
    "models": {"ground", "maths", "models"},
    "objective": {"ground", "maths", "models", "objective"},
}
"""What the modules of a room may import. Rooms that are named last come last; none imports a later one."""
CORE = {*STREETS, "objective"}
STREETS |= {room: {*CORE, room} for room in ("engines", "backends")}
STREETS |= {room: {*CORE, "engines", "backends", room} for room in ("teachers", "episodes")}
STREETS |= {
    "rewards": {"ground", "rewards"},
    "envs": {"ground", "rewards", "envs"},
}
LOOP = {*STREETS, "trainers.loop"} - {"envs", "rewards"}
STREETS |= {
    "trainers.loop": LOOP,
    "trainers.parts": {*LOOP, "trainers.parts"},
    "methods": {*LOOP, "trainers.parts", "methods"},
}
LAUNCH = ("tiny", "settings", "checks", "plan", "run", "cli")
"""The rooms of `launch/`: each may import itself and those before it. `launch/train.py` stands above them all."""
STREETS["launch"] = {*STREETS, "launch"}
USES = {
    "opd.trainers.vopd": "opd.trainers.opd",  # it is that method with other settings
    "opd.launch.cli.skills": "opd.trainers.skill_sd",  # the command that reads and changes that method's bank
    "opd.launch.tiny.skills": "opd.trainers.skill_sd",  # small models are warmed up on skills as that method words them
}
"""Modules that import a method's folder, and why."""
LONG = re.compile(r"\bLong because \w+")
MOST = {"file": 400, "class": 150, "function": 40}
"""Lines; what has more says why in its docstring, in a sentence that begins with `Long because`."""


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES[folder], *(part for part in rest if part != "__init__")])


FILES = {module_of(path): path for folder in PACKAGES for path in sources(folder)}
FACADES = {"opd", "opd.trainers"}
"""Packages that resolve their public names when these are first used."""


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """The modules of this project that a file imports, wherever in the file it does so."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "opd")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import leads elsewhere in a wheel"
            if node.module and node.module.split(".")[0] == "opd":
                deeper = {f"{node.module}.{alias.name}" for alias in node.names}
                yield from (deeper & FILES.keys()) or {node.module}


def room_of(module: str) -> str:
    """The room of a module: a folder of `opd/` or of the root, and the ground for what all may use."""
    _, *parts = module.split(".")
    if not parts or parts[0] in GROUND or parts[:2] == ["maths", "formulas"]:
        return "ground"
    if parts == ["trainers"]:
        return "trainers.loop"  # the package itself, in which methods are looked for
    if parts[0] == "trainers":
        return ".".join(parts[:2]) if parts[1:2] in (["loop"], ["parts"]) else "methods"
    return parts[0]


def method_of(module: str) -> str | None:
    """`opd.trainers.sd_zero` for every module of that method; None for what is no method's."""
    return ".".join(module.split(".")[:3]) if room_of(module) == "methods" and module.count(".") >= 2 else None


IMPORTS = {module: sorted(set(imports(path))) for module, path in FILES.items() if module not in FACADES}


def test_every_module_stands_in_a_room_that_has_rules():
    assert {room_of(module) for module in FILES} <= STREETS.keys()


def test_imports_point_one_way():
    wrong = [
        f"{module} ({room_of(module)}) imports {other} ({room_of(other)})"
        for module, found in IMPORTS.items()
        for other in found
        if room_of(other) not in STREETS[room_of(module)]
    ]
    assert wrong == []


def test_methods_ask_a_player_for_what_it_offers_them_and_nothing_else():
    """The rest of `Player` is for the loop: a method that gives the engine weights or lets it sleep would break it."""
    offered = re.search(r"A method uses (.*?); the rest", Player.__doc__, re.DOTALL)
    names = set(re.findall(r"`(\w+)`", offered.group(1)))
    assert all(hasattr(Player, name) for name in names)
    used = {
        (path.name, node.attr)
        for path in sources("trainers")
        if room_of(module_of(path)) != "trainers.loop"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and _is_player(node.value)
    }
    assert {entry for entry in used if entry[1] not in names} == set()
    assert {attribute for _, attribute in used} == names


def _is_player(node: ast.expr) -> bool:
    """True for `player`, and for the `player` or `_player` that something holds."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.removeprefix("_") == "player"


def test_environments_and_rewards_import_plain_data_of_the_core_alone():
    """The ground has more, such as settings and ranks, which an environment must not depend on."""
    wrong = [
        f"{module} imports {other}"
        for module, found in IMPORTS.items()
        for other in found
        if room_of(module) in ("envs", "rewards") and room_of(other) == "ground" and other.split(".")[1] not in PLAIN
    ]
    assert wrong == []


def test_a_methods_folder_is_imported_by_nobody_else():
    wrong = [
        f"{module} imports {other}"
        for module, found in IMPORTS.items()
        for other in found
        if (method := method_of(other)) and method not in (method_of(module), USES.get(module))
    ]
    assert wrong == []


def test_the_rooms_of_launch_import_those_before_them_alone():
    def place(module: str) -> int:
        room = module.split(".")[2] if module.count(".") >= 2 else ""
        return LAUNCH.index(room) if room in LAUNCH else len(LAUNCH)

    wrong = [
        f"{module} imports {other}"
        for module, found in IMPORTS.items()
        for other in found
        if module.startswith("opd.launch.") and other.startswith("opd.launch.") and place(module) < place(other)
    ]
    assert wrong == []


def test_no_module_imports_itself_by_way_of_others():
    """Lazy and type-only imports count. `opd/__init__` and `trainers/__init__` apart, which resolve names late."""

    def reached(module: str) -> set[str]:
        seen, todo = set(), [*IMPORTS[module]]
        while todo:
            if (other := todo.pop()) not in seen:
                seen.add(other)
                todo += IMPORTS.get(other, [])
        return seen

    assert [module for module in IMPORTS if module in reached(module)] == []


def test_every_imported_module_of_the_project_exists():
    assert {other for found in IMPORTS.values() for other in found} - FILES.keys() == set()


def test_the_wheel_is_told_of_every_package():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {module for module, path in FILES.items() if path.name == "__init__.py"}
    assert set(declared["packages"]) == on_disk
    assert declared["package-dir"] == {name: folder for folder, name in PACKAGES.items()}
    assert all((path.parent / "__init__.py").is_file() for path in FILES.values())


def test_an_editor_is_shown_every_folder_that_lies_outside_the_package():
    settings = json.loads((ROOT / ".vscode" / "settings.json").read_text())
    links = Path(settings["python.analysis.stubPath"].replace("${workspaceFolder}", str(ROOT))) / "opd"
    outside = {folder: (ROOT / folder).resolve() for folder in PACKAGES if folder != "opd"}
    assert {link.name: link.resolve() for link in links.iterdir()} == outside


def test_no_other_folder_at_the_root_holds_a_package():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == set(PACKAGES)


def test_tests_are_no_packages_that_could_shadow_the_real_ones():
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_nothing_beside_a_file_that_may_be_run_bears_the_name_of_a_dependency():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *declared["dependencies"],
        *(one for extra in declared["optional-dependencies"].values() for one in extra),
    ]
    names = {re.split(r"[<>=\[ ]", dependency)[0].lower().replace("-", "_") for dependency in wanted}
    beside_what_is_run = [path for folder in ("launch", "benchmarks", "examples") for path in (ROOT / folder).iterdir()]
    assert {path.stem for path in beside_what_is_run} & names == set()


# -- sizes ---------------------------------------------------------------------------------------------


def too_long(module: str) -> Iterator[str]:
    """What of a module is longer than `MOST` allows and does not say why."""
    tree, path = tree_of(FILES[module]), FILES[module]
    if len(path.read_text().splitlines()) > MOST["file"] and not _says_why(tree):
        yield f"{module}: {len(path.read_text().splitlines())} lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            kind, lines = "class" if isinstance(node, ast.ClassDef) else "function", _lines(node)
            if lines > MOST[kind] and not _says_why(node):
                yield f"{module}, {kind} {node.name}: {lines} lines"


def _lines(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def _says_why(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return LONG.search(ast.get_docstring(node) or "") is not None


@pytest.mark.parametrize("folder", PACKAGES)
def test_what_is_long_says_why(folder):
    assert [line for module, path in FILES.items() if path in sources(folder) for line in too_long(module)] == []


# -- what stays apart ----------------------------------------------------------------------------------


def test_the_shared_machinery_names_no_method():
    shared = [
        *sources("trainers/loop"),
        *sources("opd/objective"),
        *sources("opd/engines"),
        *sources("opd/backends"),
        ROOT / "opd" / "teachers" / "teacher.py",
    ]
    names = re.compile(rf"\b({'|'.join(names_of_methods() - {'opd'})})\b")
    assert [path.name for path in shared if names.search(path.read_text())] == []


def names_of_methods() -> set[str]:
    return {method.rpartition(".")[2] for method in map(method_of, FILES) if method is not None}


def test_settings_checks_plans_methods_environments_and_commands_are_known_without_torch():
    quick = {module for module, path in FILES.items() if path.name == "config.py"}
    quick |= {module_of(path) for room in ("settings", "checks", "plan") for path in sources(f"launch/{room}")}
    quick |= {"opd", "opd.envs", "opd.losses", "opd.maths.formulas", "opd.types", "opd.launch.tiny.names"}
    quick |= {"opd.episodes.tasks", "opd.launch.cli", "opd.launch.cli.looks", "opd.launch.cli.runs"}
    quick -= {"opd.launch.checks.deepspeed"}  # it asks DeepSpeed, which is torch
    program = f"""if True:
        import sys, {", ".join(sorted(quick))}
        from opd.trainers.loop.registry import methods
        methods()
        sys.exit("torch" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or "torch was imported"
