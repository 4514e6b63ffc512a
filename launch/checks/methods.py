"""Problems of what a method's section names: other models, files and folders that are not there."""

from __future__ import annotations

from pathlib import Path

from opd.launch.checks.models import model_problem
from opd.launch.settings.config import Config
from opd.launch.settings.problems import Problem


def check_teachers(config: Config) -> list[Problem]:
    """Return a problem for each model beside the student that does not exist."""
    named = (name for stage in config.stages for name in (stage.teacher.model, stage.borrowed) if name)
    other = getattr(config.section, "sft_teacher", None)
    problems = []
    for name in dict.fromkeys(named):
        key = f"{config.method}.{'sft_teacher' if name == other else 'teacher.model'}"
        if problem := model_problem(name):
            problems.append(Problem((key,), f'{key} = "{name}" {problem}'))
    return problems


def check_files(config: Config) -> list[Problem]:
    """Return a problem for each file and folder that the method reads before training and that does not exist."""
    problems = []
    for name, kind in (("file", "file"), ("data", "folder")):
        value = getattr(config.section, name, None)
        if value is None:
            continue
        path, key = Path(value).expanduser(), f"{config.method}.{name}"
        if not (path.is_file() if kind == "file" else path.is_dir()):
            problems.append(Problem((key,), f'{key} = "{value}": there is no such {kind}'))
    return problems
