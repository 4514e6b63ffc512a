"""`data/skills.jsonl`: the bank as a person may read it and change it, a skill a line.

The run writes it after every step, and reads from it only what a person changed (`edited`, `retired`). So a file that
is ahead of the checkpoint that a run goes on from changes nothing by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from opd.disk import write_whole
from opd.errors import DataError
from opd.rows import numbered_lines, parse_row
from opd.trainers.skill_sd.bank import SkillBank
from opd.trainers.skill_sd.skill import Lesson, Skill, from_row, to_row

NAME = "skills.jsonl"
_PLACES = {"own": "its task", "like": "like tasks"}


def read(path: Path) -> list[Skill]:
    """Read the skills of a file. Raises DataError, with the line's number, for a line that holds none."""
    skills = []
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        try:
            skills.append(from_row(parse_row(line)))
        except (ValueError, DataError) as error:
            raise DataError(f"{path}, line {number}: {error}") from error
    return skills


def write(path: Path, skills: Iterable[Skill]) -> None:
    """Write all skills anew. Whoever reads the file meanwhile finds it whole, the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(f"{json.dumps(to_row(skill), ensure_ascii=False)}\n" for skill in skills))


def read_edits(path: Path, bank: SkillBank) -> list[Skill]:
    """Read the skills that a person changed in the file and the bank has not taken up; none where there is no file.

    A change counts also where the run has renewed the skill meanwhile. Raises DataError as `read` does.
    """
    if not path.is_file():
        return []
    changed = ((skill, bank.skills.get(skill.id)) for skill in read(path) if skill.by_hand)
    return [s for s, known in changed if known is None or not known.by_hand or s.version > known.version]


def edit(skill: Skill, lesson: Lesson, *, who: str) -> Skill:
    """Return the skill's next version with another text, its source untouched; the skill itself for the same text.

    Raises DataError for a lesson without text.
    """
    if not lesson.text:
        raise DataError(f"skill {skill.id}: a skill without text says nothing; retire it instead")
    return skill if lesson == skill.lesson else replace(skill.next_version(lesson), edited=who)


def retire(skill: Skill, *, who: str) -> Skill:
    """Return the skill's next version, which is never shown."""
    return replace(skill, version=skill.version + 1, retired=True, edited=who)


def markdown(skills: Sequence[Skill]) -> str:
    """Write skills as a page to read: of each its text first, then its source, its numbers and its earlier texts."""
    parts = []
    for skill in skills:
        source = skill.source
        lifts = [f"{lift:+.3f} on {_PLACES[where]} ({skill.trials[where]})" for where, lift in skill.lifts.items()]
        lifted = ", ".join(lifts) or "not tried"
        facts = [
            f"- tasks: {', '.join(skill.tasks)}; episodes: {', '.join(source.episodes)}",
            f"- made by {source.summariser} after step {source.step} (weights {source.policy_version})",
            f"- version {skill.version}{f', changed by {skill.edited}' if skill.edited else ''}"
            f"{', retired' if skill.retired else ''}",
            f"- PDI {skill.pdi:+.2f}; shown {skill.shown} times; lift in nats a token: {lifted}",
        ]
        old = [f"- before: {' / '.join(text.splitlines())}" for text in skill.history]
        parts.append("\n".join([f"## {skill.id}", "", skill.lesson.text, "", *facts, *old]))
    return "\n\n".join(parts) + "\n"
