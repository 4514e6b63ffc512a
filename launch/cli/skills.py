"""`opd skills`: read the skills of a run, change one by hand, hand them on.

A change is kept beside where the skill came from, and the run takes it up when it goes on, or after its next step.
"""

from __future__ import annotations

import datetime
import getpass
import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd.errors import ConfigError
from opd.json_text import parse_json
from opd.trainers.skill_sd import file
from opd.trainers.skill_sd.skill import Lesson, Skill
from opd.trainers.skill_sd.text import one_line

PARTS = tuple(asdict(Lesson()))
_SUFFIXES = (".jsonl", ".md")


def bank_file(target: Path) -> Path:
    """Return the file of skills in a run's folder, or the file itself. Raises ConfigError if there is none."""
    path = target / "data" / file.NAME if target.is_dir() else target
    if not path.is_file():
        raise ConfigError(
            f"{target} holds no skills ({path} is not there). Give the folder of a run of method skill_sd that has "
            "made its first step, or a skills.jsonl"
        )
    return path


def find(skills: Sequence[Skill], id: str) -> Skill:
    """Return the skill of this id. Raises ConfigError with the ids that exist."""
    for skill in skills:
        if skill.id == id:
            return skill
    known = ", ".join(skill.id for skill in skills[:12])
    raise ConfigError(
        f"there is no skill {id!r}; there are {len(skills)}: {known}{', ...' if len(skills) > 12 else ''}"
    )


def show_all(target: Path, console: Console) -> None:
    """Print a line for each skill, those that lift most first."""
    skills = file.read(bank_file(target))
    table = Table("id", "version", "task", "lift", "PDI", "shown", "text", box=None)
    for skill in sorted(skills, key=lambda s: (-(s.lift if s.lift is not None else -1e9), s.id)):
        notes = "".join(mark for mark, holds in ((" *", skill.edited), (" retired", skill.retired)) if holds)
        table.add_row(
            skill.id,
            f"{skill.version}{notes}",
            skill.source.task,
            "not tried" if skill.lift is None else f"{skill.lift:+.3f}",
            f"{skill.pdi:+.2f}",
            str(skill.shown),
            Text(one_line(skill.lesson.text, 90)),  # what an episode said is no markup of the terminal
        )
    console.print(table)
    tried = sum(skill.lift is not None for skill in skills)
    console.print(
        f"{len(skills)} skills, {tried} tried; lift: nats a token of right episodes above wrong ones; * changed by hand"
    )


def show_one(target: Path, id: str) -> str:
    """Return all that is known of one skill, as Markdown."""
    return file.markdown([find(file.read(bank_file(target)), id)])


def change(target: Path, id: str, parts: dict[str, str], *, retire: bool) -> Skill:
    """Write down a person's change, the parts given or what an editor makes of all, and return the changed skill.

    Raises DataError, and ConfigError also if nothing would change: whoever takes that for a change would wait for what
    never comes.
    """
    path = bank_file(target)
    skills = file.read(path)
    skill = find(skills, id)
    who = f"{_user()}, {datetime.date.today().isoformat()}"
    if retire:
        changed = skill if skill.retired else file.retire(skill, who=who)
    else:
        lesson = Lesson(**{**asdict(skill.lesson), **parts}) if parts else _in_editor(skill.lesson)
        changed = file.edit(skill, lesson, who=who)
    if changed is skill:
        state = "is retired already" if retire else "says this already"
        raise ConfigError(f"skill {id} {state}; nothing was changed, it is still version {skill.version}")
    now = file.read(path)  # an editor may stay open while the run goes on
    if find(now, id).version != skill.version:
        raise ConfigError(f"skill {id} was changed by the run meanwhile; look at it and edit it again")
    file.write(path, [changed if other.id == id else other for other in now])
    return changed


def export(target: Path, to: Path, *, usable: bool) -> int:
    """Write the skills to a page (`.md`) or as rows (`.jsonl`), and return how many. Raises ConfigError if it cannot.

    `usable`: only those that may be shown: changed by a person, or lifted, or all where the run shows them untried
    (`trials: 0`). Of a file without its run's `config.yaml` nobody knows that.
    """
    if to.suffix not in _SUFFIXES:
        raise ConfigError(f"--to {to}: its name must end in {' or '.join(_SUFFIXES)}")
    path = bank_file(target)
    skills = file.read(path)
    if usable:
        untried = _shows_untried(path)
        skills = [s for s in skills if not s.retired and (untried or s.edited or s.lift is not None)]
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        if to.suffix == ".md":
            to.write_text(file.markdown(skills), encoding="utf-8", errors="replace")
        else:
            file.write(to, skills)
    except OSError as error:
        raise ConfigError(f"--to {to} cannot be written: {error}") from error
    return len(skills)


def _shows_untried(path: Path) -> bool:
    """True: the run that a skills.jsonl lies in shows skills untried. False: it does not, or there is no such run."""
    settings = path.resolve().parent.parent / "config.yaml"
    try:
        return bool(yaml.safe_load(settings.read_text(encoding="utf-8"))["skill_sd"]["skills"]["trials"] == 0)
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):  # no run's folder
        return False


def _in_editor(lesson: Lesson) -> Lesson:
    """Return the lesson as `$EDITOR` leaves it. Raises ConfigError if there is no editor, or no lesson afterwards."""
    editor = os.environ.get("VISUAL", "").strip() or os.environ.get("EDITOR", "").strip()
    if not editor:
        raise ConfigError(f"set $EDITOR, or give {', '.join(f'--{part} TEXT' for part in PARTS)}, or --retire")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "skill.json"
        path.write_text(json.dumps(asdict(lesson), indent=2, ensure_ascii=False), encoding="utf-8")
        _open_editor(editor, path)
        try:
            data = parse_json(path.read_text(encoding="utf-8-sig"))  # some editors leave a byte order mark
            if set(data) != set(PARTS) or not all(isinstance(text, str) for text in data.values()):
                raise ValueError(f"it needs {', '.join(PARTS)}, each a text")
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"what the editor left is no skill: {error}; nothing was changed") from None
    return Lesson(**data)


def _open_editor(editor: str, path: Path) -> None:
    """Open a file in the editor. Raises ConfigError if the editor cannot be started, or fails."""
    try:
        subprocess.run([*shlex.split(editor), str(path)], check=True)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"the editor {editor!r} (from $VISUAL or $EDITOR) failed: {error}; nothing was changed. Name one "
            f"that runs, or give {', '.join(f'--{part} TEXT' for part in PARTS)}"
        ) from error


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "somebody"
