"""The shape of the repository: which folder may import which, and that nothing is left out of the wheel.

Not covered: imports by name at run time, such as the entry points of environments.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from opd.trainers.loop.method import METHODS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "opd": "opd",
    "envs": "opd.envs",
    "rewards": "opd.rewards",
    "trainers": "opd.trainers",
    "launch": "opd.launch",
}
MAY_IMPORT = {
    "opd": {"opd"},
    "rewards": {"opd", "rewards"},
    "envs": {"opd", "rewards", "envs"},
    "trainers": {"opd", "rewards", "envs", "trainers"},
    "launch": {"opd", "rewards", "envs", "trainers", "launch"},
}
LAUNCH = ("tiny", "settings", "checks", "plan", "run", "cli")
"""The rooms of `launch/`: each may import itself and those before it. `launch/train.py` stands above them all."""
PLAIN = {"opd.types", "opd.errors", "opd.teachers.privileged", "opd.sandbox", "opd.background", "opd.grading"}
"""What environments and rewards may use of the core: data, errors, the words of privileged prompts, the sandbox, limits
of time and clocks."""


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES[folder], *(part for part in rest if part != "__init__")])


MODULES = {module_of(path) for folder in PACKAGES for path in sources(folder)}


def imports(path: Path) -> Iterator[str]:
    """The modules of this project that a file imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "opd")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import leads elsewhere in a wheel"
            if node.module and node.module.split(".")[0] == "opd":
                deeper = {f"{node.module}.{alias.name}" for alias in node.names}
                yield from (deeper & MODULES) or {node.module}


def folder_of(module: str) -> str:
    part = module.split(".")[1] if "." in module else ""
    return part if part in PACKAGES else "opd"


def test_imports_point_one_way():
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for folder, allowed in MAY_IMPORT.items()
        for path in sources(folder)
        if path != ROOT / "opd" / "__init__.py"  # resolves opd.train and opd.Config when they are first used
        for module in imports(path)
        if folder_of(module) not in allowed
    ]
    assert wrong == []


def test_environments_and_rewards_import_only_plain_data_of_the_core():
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for folder in ("envs", "rewards")
        for path in sources(folder)
        for module in imports(path)
        if folder_of(module) == "opd" and module not in PLAIN
    ]
    assert wrong == []


def test_every_imported_module_of_the_project_exists():
    missing = {m for folder in PACKAGES for path in sources(folder) for m in imports(path)} - MODULES
    assert missing == set()


def test_the_wheel_is_told_of_every_package():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {module_of(path) for folder in PACKAGES for path in sources(folder) if path.name == "__init__.py"}
    assert set(declared["packages"]) == on_disk
    assert declared["package-dir"] == {name: folder for folder, name in PACKAGES.items()}
    assert all((path.parent / "__init__.py").is_file() for folder in PACKAGES for path in sources(folder))


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


def test_the_shared_machinery_names_no_method():
    shared = [
        *sources("trainers/loop"),
        ROOT / "opd" / "objective" / "objective.py",
        *sources("opd/engines"),
        *sources("opd/backends"),
    ]
    names = re.compile(rf"\b({'|'.join(name for name in METHODS if name != 'opd')})\b")
    assert [path.name for path in shared if names.search(path.read_text())] == []


def test_a_method_can_be_read_in_one_sitting():
    files = {name: ROOT / "trainers" / f"{name}.py" for name in METHODS}
    files = {name: path if path.is_file() else ROOT / "trainers" / name / "method.py" for name, path in files.items()}
    long = {name: len(path.read_text().splitlines()) for name, path in files.items()}
    assert {name: lines for name, lines in long.items() if lines >= 150} == {}


def test_a_room_of_launch_imports_none_that_stands_above_it():
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for number, room in enumerate(LAUNCH)
        for path in sources(f"launch/{room}")
        for module in imports(path)
        if module.startswith("opd.launch.") and module.split(".")[2] not in LAUNCH[: number + 1]
    ]
    assert wrong == []
    assert {path.name for path in (ROOT / "launch").iterdir() if path.is_dir()} - {"__pycache__"} == set(LAUNCH)


def test_settings_checks_plans_methods_environments_and_commands_are_known_without_torch():
    quick = {module_of(path) for folder in PACKAGES for path in sources(folder) if path.name == "config.py"}
    quick |= {module_of(path) for room in ("settings", "checks", "plan") for path in sources(f"launch/{room}")}
    quick |= {
        "opd",
        "opd.envs",
        "opd.launch.tiny.names",
        "opd.launch.cli",
        "opd.launch.cli.looks",
        "opd.launch.cli.runs",
    }
    quick -= {"opd.launch.checks.deepspeed"}  # it asks DeepSpeed, which is torch
    program = f"""if True:
        import sys, {", ".join(sorted(quick))}
        from opd.trainers.loop.method import methods
        methods()
        sys.exit('torch' in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or "torch was imported"
