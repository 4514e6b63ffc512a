"""Problems of what a method's section names: other models, files and folders that are not there."""

from __future__ import annotations

from pathlib import Path

from opd.errors import OpdError
from opd.launch.checks.models import model_problem
from opd.launch.settings.config import Config
from opd.launch.settings.problems import Problem


def check_teachers(config: Config) -> list[Problem]:
    """Return a problem for each model beside the student that does not exist."""
    named = ((f"{config.spec.name}.{key}", name) for key, name in config.inputs.models.items())
    found = ((key, name, model_problem(name)) for key, name in named)
    return [Problem((key,), f'{key} = "{name}" {problem}') for key, name, problem in found if problem]


def check_files(config: Config) -> list[Problem]:
    """Return a problem for each file and folder that the method reads before training and that it cannot use."""
    inputs = config.inputs
    named = [(key, value, "file", Path.is_file) for key, value in inputs.files.items()]
    named += [(key, value, "folder", Path.is_dir) for key, value in inputs.folders.items()]
    problems = []
    for name, value, kind, is_there in named:
        key = f"{config.spec.name}.{name}"
        path = Path(value).expanduser()
        if not is_there(path):
            what = f"it is no {kind}" if path.exists() else f"there is no such {kind}"
            problems.append(Problem((key,), f'{key} = "{value}": {what}'))
        elif reader := inputs.readers.get(name):
            try:
                reader(path)
            except OpdError as error:
                problems.append(Problem((key,), f"{key}: {error}"))
    return problems
