"""The life of a run's skills: made of episodes, checked, tried, shown, forgotten. For `trainers/skill_sd/method.py`.

After each step the keeper asks a summariser for lessons, refuses what the episodes do not support, tries what is new on
right and wrong episodes that it was not made of, and writes the bank where a person can read it. Every rank does the
same with the same episodes, but for what a summariser or a teacher has to be asked.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from opd.config import Strict, setting
from opd.errors import DataError
from opd.teachers.privileged import of_like_task
from opd.trainers.skill_sd import file
from opd.trainers.skill_sd.bank import Skill, SkillBank, Source, Where
from opd.trainers.skill_sd.grounding import Index, proxies
from opd.trainers.skill_sd.makers import Case, Policy, Rules, Server, Summariser, case_of, is_right, task_text
from opd.trainers.skill_sd.server import ChatServer, checked_url
from opd.trainers.skill_sd.text import neutral, one_line, structural_tokens
from opd.types import Sample, Segment, TeacherView, Trajectory, TrajectoryGroup, to_sample

if TYPE_CHECKING:
    from torch import Tensor

    from opd.models.chat import ChatFormat
    from opd.trainers.loop.play import Player

logger = logging.getLogger(__name__)

View = Callable[[Trajectory, Segment, str | None], TeacherView | None]
"""How the teacher sees an episode with a text of skills in its prompt, or without; None where it would be too long."""
_TASK_CHARACTERS = 160
EPISODES_EACH = 2
"""Right and wrong episodes of a trial at most."""


class ServerConfig(Strict):
    """Where `summariser: server` asks: any OpenAI-compatible endpoint."""

    url: Annotated[str, AfterValidator(checked_url)] | None = Field(
        None, description="Its address as far as /v1, such as http://127.0.0.1:8000/v1."
    )
    model: str | None = Field(None, description="The model's name there.")
    api_key_env: str = Field("OPENAI_API_KEY", min_length=1, description="The environment variable with the key.")
    timeout: float = Field(60.0, gt=0, description="Seconds that one answer may take.")
    retries: int = Field(2, ge=0, description="How often a question without a good answer is asked again.")


class SkillsConfig(Strict):
    """How skills are made, checked, kept and found."""

    summariser: Literal["rules", "policy", "server"] = Field(
        "rules",
        description="Who makes a skill of a task's episodes. rules: no model, the best actions and the feedback on "
        "failures, word for word; policy: the trained model itself; server: another one (`server`).",
    )
    server: ServerConfig = setting(ServerConfig(), when={"summariser": ["server"]})
    max_tokens: int = setting(
        256, when={"summariser": ["policy", "server"]}, ge=16, description="Most tokens of an answer."
    )
    max_characters: int = Field(600, ge=40, description="Most characters of each part of a skill.")
    per_step: int = Field(16, ge=1, description="Skills made in a step at most; tasks of mixed outcome first.")
    shown: int = Field(3, ge=1, description="Skills that a teacher is shown at once at most.")
    capacity: int = Field(512, ge=1, description="Skills in the bank at most; what lifts least goes first.")
    per_task: int = Field(4, ge=1, description="Skills of one task at most.")
    max_age: int = Field(100, ge=1, description="Steps after which a skill not shown and not renewed is forgotten.")
    explore: float = Field(1.0, ge=0, description="UCB's bonus for a task's skills that were seldom shown.")
    min_likeness: float = Field(
        0.2, ge=0, le=1, description="Cosine of rare words from which another task's skill is shown too; 1: never."
    )
    min_support: float = Field(
        0.3, ge=0, le=1, description="Least share of what was done and said in its episodes that a skill must cover."
    )
    min_pdi: float = Field(
        -0.5, description="Least Posterior Distillation Index: below, a skill repeats the last one and adds nothing."
    )
    trials: int = Field(
        16,
        ge=0,
        description="Trials a step, each of a new skill on right and wrong episodes of one task, none of which it was "
        f"made of: at most {EPISODES_EACH} of either, read by the teacher with it and without; 0: shown untried.",
    )
    min_lift: float = setting(
        0.0,
        when={"trials": True},
        description="Nats a token by which a skill must lift right episodes above wrong ones of the same task.",
    )

    @model_validator(mode="after")
    def _the_server_can_be_asked(self) -> SkillsConfig:
        if self.summariser == "server" and not (self.server.url and self.server.model):
            raise ValueError("summariser = server needs server.url (as far as /v1) and server.model")
        return self


class _Trial(NamedTuple):
    """A skill, and a task's episodes that it should tell apart."""

    id: str
    text: str
    where: Where
    right: Sequence[Trajectory]
    wrong: Sequence[Trajectory]


class SkillKeeper:
    """A bank, and what fills it."""

    def __init__(self, config: SkillsConfig, chat: ChatFormat, *, right_from: float | None) -> None:
        self.config = config
        self.chat = chat
        self.right_from = right_from
        self.bank = SkillBank(
            capacity=config.capacity,
            per_task=config.per_task,
            max_age=config.max_age,
            explore=config.explore,
            min_likeness=config.min_likeness,
            min_lift=config.min_lift,
            untried=not config.trials,
        )
        self.index = Index()
        self.numbers: dict[str, float] = {}
        """About the last step."""
        self._warned = False
        """Whether it was said that no trial fits."""
        self._found: dict[tuple[str, str], list[Skill]] = {}
        self._player: Player | None = None
        self._path = Path()

    def open(self, player: Player, folder: Path) -> None:
        """Where the run is, before its first step or after a restart; takes up what a person changed meanwhile."""
        self._player, self._path = player, folder / file.NAME
        self._structure = structural_tokens(self.chat.tokenizer)
        self._summariser = self._make_summariser(player)
        self._take_edits()

    def _make_summariser(self, player: Player) -> Summariser:
        config = self.config
        if config.summariser == "rules":
            return Rules()
        if config.summariser == "policy":
            return Policy(player, self.chat, max_tokens=config.max_tokens)
        server = config.server
        assert server.url
        assert server.model
        chat_server = ChatServer(
            url=server.url,
            model=server.model,
            key=os.environ.get(server.api_key_env),
            timeout=server.timeout,
            retries=server.retries,
            max_tokens=config.max_tokens,
        )
        return Server(player, chat_server)

    # -- for a teacher ----------------------------------------------------------------------------------

    def text_for(self, task: str, prompt: str) -> str | None:
        """What a task's teacher is shown; None where there is no skill for it. The same all through a step."""
        if (task, prompt) not in self._found:
            self._found[task, prompt] = self.bank.find(task, prompt, self.config.shown)
        return "\n".join(told(skill, task) for skill in self._found[task, prompt]) or None

    # -- after a step -----------------------------------------------------------------------------------

    def learn(self, groups: Sequence[TrajectoryGroup], view: View) -> None:
        """Make skills of a step's episodes, try them, and write the bank down."""
        assert self._player is not None, "open() comes before learn()"
        step = self._player.standing.steps
        self._credit(groups, step)
        self._take_edits()
        made = self._make(groups, step)
        tried = self._try(groups, view) if self.config.trials else {}
        self._take_edits()  # also those made while the above took its time: the file is about to be written over
        forgotten = self.bank.forget(step)
        self._found.clear()
        usable = [s for s in self.bank.skills.values() if self.bank.usable(s, "own") or self.bank.usable(s, "like")]
        counts = made | tried | {"known": len(self.bank.skills), "usable": len(usable), "forgotten": forgotten}
        self.numbers = {f"skills/{name}": float(value) for name, value in counts.items()}
        self._player.ranks.from_first(lambda: file.write(self._path, self.bank.skills.values()))

    def _take_edits(self) -> None:
        assert self._player is not None
        for skill in self._player.ranks.from_first(self._by_hand):
            taken = self.bank.take(replace(skill, lesson=skill.lesson.map(self._clean)))
            logger.info("skill %s was changed by hand: version %d", taken.id, taken.version)

    def _by_hand(self) -> list[Skill]:
        """What a person changed. A file that cannot be read is put aside: a slip of the pen must not end a run."""
        try:
            return file.by_hand(self._path, self.bank)
        except DataError as error:
            aside = self._path.with_suffix(".unreadable")
            self._path.replace(aside)
            logger.warning("%s; nothing is taken from it, and it is now %s", error, aside)
            return []

    def _credit(self, groups: Sequence[TrajectoryGroup], step: int) -> None:
        for group in groups:
            if group.usable:
                task, prompt = group.task.id, task_text(group)
                if self.text_for(task, prompt) is not None:
                    shown = [skill.id for skill in self._found[task, prompt] if skill.id in self.bank.skills]
                    self.bank.credit(shown, [t.reward for t in group.usable], step=step)

    def _make(self, groups: Sequence[TrajectoryGroup], step: int) -> dict[str, float]:
        """New skills in the bank; how many, and what became of the others."""
        found = [case for group in groups if (case := case_of(group, self.right_from))]
        cases = sorted(found, key=lambda case: not case.mixed)[: self.config.per_step]
        lessons = self._summariser.summarise(cases)
        made = refused = 0
        for case, lesson in zip(cases, lessons, strict=True):
            if lesson is None:
                continue
            lesson = lesson.map(self._clean)
            last = self.bank.last(case.task.id)
            support = proxies(lesson, case.evidence, last.lesson if last else None)
            pdi = self.index.of(support, last.version + 1 if last else 1)
            if not lesson.text or support.exec < self.config.min_support or pdi < self.config.min_pdi:
                refused += 1
                continue
            made += self.bank.add(lesson, self._source(case, step), pdi=pdi) is not None
        return {"made": made, "refused": refused, "unanswered": lessons.count(None)}

    def _clean(self, text: str) -> str:
        """What a stranger said, as it may stand in a prompt."""
        return neutral(text, self._structure, most=self.config.max_characters)

    def _source(self, case: Case, step: int) -> Source:
        return Source(
            task=case.task.id,
            prompt=self._clean(case.prompt),
            episodes=tuple(_name(step, episode) for episode in case.episodes),
            step=step,
            policy_version=max(episode.policy_version for episode in case.episodes),
            summariser=self._summariser.name,
        )

    def _try(self, groups: Sequence[TrajectoryGroup], view: View) -> dict[str, float]:
        """Try untried skills on this step's episodes; what tells right from wrong nowhere is dropped."""
        assert self._player is not None
        ranks = self._player.ranks
        trials = self._trials(groups, self._player.standing.steps)
        lifts = ranks.deal(ranks.gather(self._lifts(ranks.share(trials), view)))
        if trials and lifts.count(None) == len(lifts):
            self._warn(len(trials))
        found: dict[str, dict[Where, list[float]]] = {}
        for trial, lift in zip(trials, lifts, strict=True):
            if lift is not None:
                found.setdefault(trial.id, {}).setdefault(trial.where, []).append(lift)
        dropped = [id for id, places in found.items() if self.bank.tried(id, places) is None]
        numbers: dict[str, float] = {"tried": len(found), "dropped": len(dropped)}
        for where in ("own", "like"):
            means = [fmean(places[where]) for places in found.values() if where in places]
            numbers |= {f"lift_{where}": fmean(means)} if means else {}
        return numbers

    def _warn(self, trials: int) -> None:
        """Once a run, that no trial of a step fits: so nothing that was made is ever shown."""
        if not self._warned:
            logger.warning(
                "none of %d trials of skills fits skill_sd.max_teacher_tokens, and what is not tried is not shown; "
                "raise it, or lower skill_sd.skills.max_characters",
                trials,
            )
        self._warned = True

    def _trials(self, groups: Sequence[TrajectoryGroup], step: int) -> list[_Trial]:
        """For each task that went right and wrong, the untried skills that would be for it, on episodes not theirs."""
        trials: list[_Trial] = []
        for group in groups:
            task = group.task.id
            for skill, where in self.bank.waiting(task, task_text(group), self.config.shown):
                others = [e for e in group.usable if e.turns and _name(step, e) not in skill.source.episodes]
                right, wrong = ([e for e in others if is_right(e, self.right_from) is kind] for kind in (True, False))
                if right and wrong:
                    text = told(skill, task)
                    trials.append(_Trial(skill.id, text, where, right[:EPISODES_EACH], wrong[:EPISODES_EACH]))
        return _spread(trials, self.config.trials)

    def _lifts(self, trials: Sequence[_Trial], view: View) -> list[float | None]:
        """Nats a token that each skill adds to right episodes, less what it adds to wrong ones; None: all too long.

        In expectation, and but for the mean over tokens, this is the covariance of success with log teacher(skill) /
        teacher, over the variance of success: the slope of the success rate where the policy starts to move from the
        teacher without the skill to the one with it. A skill that makes all likelier, or only its own way, has none.
        """
        assert self._player is not None
        found = iter(gains([(e, t.text) for t in trials for e in (*t.right, *t.wrong)], view, self._player.divergences))
        lifts: list[float | None] = []
        for trial in trials:
            right, wrong = ([g for _ in kind if (g := next(found)) is not None] for kind in (trial.right, trial.wrong))
            lifts.append(fmean(right) - fmean(wrong) if right and wrong else None)
        return lifts

    # -- what survives ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, object]:
        return {"bank": self.bank.state_dict(), "index": self.index.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        self.bank.load_state_dict(state["bank"])
        self.index.load_state_dict(state["index"])


def gains(
    readings: Sequence[tuple[Trajectory, str]], view: View, nats: Callable[[list[Sample]], list[Tensor]]
) -> list[float | None]:
    """Nats a token by which the teacher finds each episode likelier with its text than without; None: too long.

    `nats` is `Player.divergences`. An episode is read once without, however many texts it is read with.
    """
    scored = {(id(e), said): _scored(e, said, view) for e, text in readings for said in (text, None)}
    gaps = iter(nats([sample for samples in scored.values() for sample in samples]))
    # A gap is the student's log-prob less the teacher's: in the difference of two the student's cancels.
    gap = {key: fmean(x for _ in samples for x in next(gaps).tolist()) for key, samples in scored.items() if samples}
    pairs = [((id(episode), None), (id(episode), text)) for episode, text in readings]
    return [gap[plain] - gap[said] if plain in gap and said in gap else None for plain, said in pairs]


def told(skill: Skill, task: str) -> str:
    """A skill as a teacher of this task reads it."""
    if task in skill.tasks:
        return skill.lesson.text
    return of_like_task(skill.lesson.text, one_line(skill.source.prompt, _TASK_CHARACTERS))


def _scored(episode: Trajectory, text: str | None, view: View) -> list[Sample]:
    """An episode's samples as its teacher sees them; none where one would be too long."""
    viewed = [(segment, view(episode, segment, text)) for segment in episode.segments()]
    if any(seen is None for _, seen in viewed):
        return []
    return [to_sample(episode, segment, view=seen, distill=1.0) for segment, seen in viewed]


def _name(step: int, episode: Trajectory) -> str:
    return f"step-{step}/{episode.task.id}/{episode.member}"


def _spread(trials: Iterable[_Trial], count: int) -> list[_Trial]:
    """At most `count` trials, of as many skills and places as can be: the first of each before any second one."""
    rounds: dict[tuple[str, Where], int] = {}
    ordered: list[tuple[int, int, _Trial]] = []
    for number, trial in enumerate(trials):
        key = (trial.id, trial.where)
        rounds[key] = rounds.get(key, -1) + 1
        ordered.append((rounds[key], number, trial))
    return [trial for _, _, trial in sorted(ordered, key=lambda entry: entry[:2])[:count]]
