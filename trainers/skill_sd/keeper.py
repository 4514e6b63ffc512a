"""The life of a run's skills: made of episodes, checked, tried, shown, forgotten. For `trainers/skill_sd/method.py`.

After each step the keeper asks a summariser for lessons, refuses what the episodes do not support, tries what is new on
right and wrong episodes that it was not made of, and writes the bank where a person can read it. Every rank does the
same with the same episodes, but for what a summariser or a teacher has to be asked.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from opd.errors import DataError
from opd.secrets import redact
from opd.trainers.skill_sd import file
from opd.trainers.skill_sd.bank import SkillBank
from opd.trainers.skill_sd.config import SkillsConfig
from opd.trainers.skill_sd.finding import Finder, teacher_text
from opd.trainers.skill_sd.grounding import Index, proxies
from opd.trainers.skill_sd.makers import Case, case_of, make_summariser, task_text
from opd.trainers.skill_sd.skill import Skill, Source, episode_name
from opd.trainers.skill_sd.text import neutral, structural_tokens
from opd.trainers.skill_sd.trials import Trials, View
from opd.types import TrajectoryGroup

if TYPE_CHECKING:
    from opd.models.chat import ChatFormat
    from opd.trainers.loop.play import Player

logger = logging.getLogger(__name__)


class SkillKeeper:
    """Keeps a bank of skills: fills it after each step, and words its skills for a teacher."""

    def __init__(self, config: SkillsConfig, chat: ChatFormat, *, right_from: float | None) -> None:
        self.config = config
        self.chat = chat
        self.right_from = right_from
        self.bank = SkillBank(
            capacity=config.capacity, per_task=config.per_task, max_age=config.max_age, min_lift=config.min_lift
        )
        self.finder = Finder(
            bank=self.bank, explore=config.explore, min_likeness=config.min_likeness, untried=not config.trials
        )
        self.trials = Trials(finder=self.finder, right_from=right_from, shown=config.shown, most=config.trials)
        self.index = Index()
        self.numbers: dict[str, float] = {}
        """The metrics of the last step."""
        self._found: dict[tuple[str, str], list[Skill]] = {}
        """The skills for a task and its prompt, as found first in this step."""
        self._player: Player | None = None
        self._path = Path()

    def open(self, player: Player, folder: Path) -> None:
        """Begin, before the first step or after a restart: take up what a person changed in the file in `folder`."""
        self._player, self._path = player, folder / file.NAME
        self._structure = structural_tokens(self.chat.tokenizer)
        self._summariser = make_summariser(self.config, player, self.chat)
        self._take_edits()

    def text_for(self, task: str, prompt: str) -> str | None:
        """Return a task's skills as its teacher reads them, the same all through a step; None if there are none."""
        if (task, prompt) not in self._found:
            self._found[task, prompt] = self.finder.find(task, prompt, self.config.shown)
        return "\n".join(teacher_text(skill, task) for skill in self._found[task, prompt]) or None

    def learn(self, groups: Sequence[TrajectoryGroup], view: View) -> None:
        """Make skills of a step's episodes, try them, and write the bank down."""
        assert self._player is not None, "open() comes before learn()"
        step = self._player.standing.steps
        self._credit(groups, step)
        self._take_edits()
        made = self._make(groups, step)
        tried = self.trials.run(self._player, groups, view) if self.config.trials else {}
        self._take_edits()  # also those made while the above took its time: the file is about to be written over
        forgotten = self.bank.forget(step)
        self._found.clear()
        usable = [
            s for s in self.bank.skills.values() if any(self.finder.usable(s, where) for where in ("own", "like"))
        ]
        counts = made | tried | {"known": len(self.bank.skills), "usable": len(usable), "forgotten": forgotten}
        self.numbers = {f"skills/{name}": float(value) for name, value in counts.items()}
        self._player.ranks.from_first(lambda: file.write(self._path, self.bank.skills.values()))

    def _take_edits(self) -> None:
        """Take up what a person changed in the file, on all ranks."""
        assert self._player is not None
        for skill in self._player.ranks.from_first(self._read_edits):
            taken = self.bank.take(replace(skill, lesson=skill.lesson.map(self._neutral)))
            logger.info("skill %s was changed by hand: version %d", taken.id, taken.version)

    def _read_edits(self) -> list[Skill]:
        """Read what a person changed. A file that cannot be read is put aside: a slip of the pen must not end a run."""
        try:
            return file.read_edits(self._path, self.bank)
        except DataError as error:
            aside = self._path.with_suffix(".unreadable")
            self._path.replace(aside)
            logger.warning("%s; nothing is taken from it, and it is now %s", error, aside)
            return []

    def _credit(self, groups: Sequence[TrajectoryGroup], step: int) -> None:
        """Count for each skill the episodes whose teacher was shown it, and their rewards."""
        for group in groups:
            if group.usable:
                task, prompt = group.task.id, task_text(group)
                if self.text_for(task, prompt) is not None:
                    shown = [skill.id for skill in self._found[task, prompt] if skill.id in self.bank.skills]
                    self.bank.credit(shown, [t.reward for t in group.usable if not t.unscored], step=step)

    def _make(self, groups: Sequence[TrajectoryGroup], step: int) -> dict[str, float]:
        """Add new skills to the bank. Return how many were made, were refused, or had no answer."""
        found = [case for group in groups if (case := case_of(group, self.right_from))]
        cases = sorted(found, key=lambda case: not case.mixed)[: self.config.per_step]
        lessons = self._summariser.summarise(cases)
        made = refused = 0
        for case, lesson in zip(cases, lessons, strict=True):
            if lesson is None:
                continue
            lesson = lesson.map(self._neutral)
            last = self.bank.newest(case.task.id)
            support = proxies(lesson, case.evidence, last.lesson if last else None)
            pdi = self.index.add(support, last.version + 1 if last else 1)
            if not lesson.text or support.exec < self.config.min_support or pdi < self.config.min_pdi:
                refused += 1
                continue
            made += self.bank.add(lesson, self._source(case, step), pdi=pdi) is not None
        return {"made": made, "refused": refused, "unanswered": lessons.count(None)}

    def _neutral(self, text: str) -> str:
        """Return a stranger's text as it may stand in a prompt, and in the files that keep the bank."""
        return neutral(redact(text), self._structure, most=self.config.max_characters)

    def _source(self, case: Case, step: int) -> Source:
        return Source(
            task=case.task.id,
            prompt=self._neutral(case.prompt),
            episodes=tuple(episode_name(step, episode) for episode in case.episodes),
            step=step,
            policy_version=max(episode.policy_version for episode in case.episodes),
            summariser=self._summariser.name,
        )

    def state_dict(self) -> dict[str, object]:
        """Return what `load_state_dict` reads, JSON-serialisable."""
        return {"bank": self.bank.state_dict(), "index": self.index.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        """Take up a saved state. Raises DataError for a skill that is not of a training task."""
        self.bank.load_state_dict(state["bank"])
        self.index.load_state_dict(state["index"])
