"""Summarisers, which make lessons of finished episodes: rules, the policy itself, or a model behind a server.

A case holds what can be learned from one task's episodes; a summariser makes a lesson of each, or none. A lesson is a
stranger's text: `trainers/skill_sd/keeper.py` bounds it, makes it harmless, and checks it against the episodes.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from opd.background import map_until
from opd.teachers.privileged import episode_text, without_thinking
from opd.tool_calls import ToolCall, parse_tool_calls
from opd.trainers.skill_sd.config import SkillsConfig
from opd.trainers.skill_sd.server import ChatServer
from opd.trainers.skill_sd.skill import Lesson
from opd.trainers.skill_sd.text import neutral, one_line, shorten, structural_tokens
from opd.types import Message, Task, Trajectory, TrajectoryGroup

if TYPE_CHECKING:
    from opd.models.chat import ChatFormat
    from opd.trainers.loop.play import Player

logger = logging.getLogger(__name__)

MOST_WRONG = 3
"""The most failed episodes in a case; no two of them have the same feedback."""
_ACTION_CHARACTERS = 200
_EPISODE_CHARACTERS = 4000
_PROMPT_CHARACTERS = 6 * _EPISODE_CHARACTERS
_MOST_OBJECTS = 16
"""The most places in an answer at which its JSON is looked for."""
_ASKED_AT_ONCE = 8
_KEYS = {"golden_workflow": "workflow", "success_analysis": "success", "mistake_analysis": "mistakes"}
"""The paper's names of a lesson's parts, and ours."""

PROMPT = """\
An agent tried a task several times. Write down what it should know the next time it meets this task or one like it.

The task:
{task}

{episodes}

Answer with one JSON object and nothing else: {{"success_analysis": "what made attempts succeed", "mistake_analysis": \
"what went wrong and how to avoid it", "golden_workflow": "the steps to take, in order"}}. A sentence or two each. Say \
only what the attempts above show; leave a text empty if they show nothing about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The episodes of one task from which a lesson is made."""

    task: Task
    prompt: str
    right: Trajectory | None
    """The best episode that solved it; None: none did."""
    wrong: tuple[Trajectory, ...]
    """At most `MOST_WRONG` episodes that did not."""
    mixed: bool
    """True: some episodes solved it and some did not, so that there is most to learn."""

    @property
    def episodes(self) -> list[Trajectory]:
        """The episode that solved it, if any, then the others."""
        return [*([self.right] if self.right else []), *self.wrong]

    @property
    def evidence(self) -> list[str]:
        """The actions of the right episode, then the environment's feedback on the wrong ones."""
        done = [action(turn.text) for turn in self.right.turns] if self.right else []
        return [*done, *self.feedback]

    @property
    def feedback(self) -> list[str]:
        """The environment's feedback on the wrong episodes."""
        return [text for episode in self.wrong for text in feedback_on(episode)]


def case_of(group: TrajectoryGroup, right_from: float | None) -> Case | None:
    """Return a group's case; None where no episode solved the task and the environment gave no feedback.

    `right_from` is the reward from which an episode is right; None: the environment says so.
    """
    solved = [t for t in group.usable if is_right(t, right_from)]
    failed = [t for t in group.usable if not (t.unscored or is_right(t, right_from))]
    best = min(solved, key=lambda t: (-t.reward, len(t.turns), t.completion_tokens, t.member), default=None)
    wrong: dict[str, Trajectory] = {}
    for trajectory in failed:
        if feedback := feedback_on(trajectory):
            wrong.setdefault(" ".join(feedback), trajectory)
    if best is None and not wrong:
        return None
    few = tuple(wrong.values())[:MOST_WRONG] or tuple(failed[:1])
    return Case(
        task=group.task, prompt=task_text(group), right=best, wrong=few, mixed=best is not None and bool(failed)
    )  # fmt: skip


def is_right(trajectory: Trajectory, right_from: float | None) -> bool:
    """True if the episode earned at least `right_from`; if that is None, if the environment calls it solved."""
    if trajectory.unscored:
        return False
    return trajectory.success if right_from is None else trajectory.reward >= right_from


def task_text(group: TrajectoryGroup) -> str:
    """Return the first user message of a group's task; '' where no episode got as far as a turn."""
    first = next((t.turns[0].messages for t in group.trajectories if t.turns), [])
    return prompt_text(first)


def prompt_text(messages: Sequence[Message]) -> str:
    """Return the first user message; '' where there is none."""
    return next((str(m["content"]) for m in messages if m["role"] == "user"), "")


def feedback_on(trajectory: Trajectory) -> list[str]:
    """Return the environment's feedback on an episode, a line for each turn that has any."""
    return [one_line(turn.feedback, _ACTION_CHARACTERS) for turn in trajectory.turns if turn.feedback]


def action(text: str) -> str:
    """Write an action in few words: its tool calls as in a program, or the beginning of its text.

    >>> action('<tool_call>{"name": "get", "arguments": {"person": "ann", "field": "boss"}}</tool_call>')
    'get(person=ann, field=boss)'
    """
    calls = [call for call in parse_tool_calls(text) if isinstance(call, ToolCall)]
    if not calls:
        return one_line(without_thinking(text), _ACTION_CHARACTERS)
    written = (f"{c.name}({', '.join(f'{key}={value}' for key, value in c.arguments.items())})" for c in calls)
    return one_line("; ".join(written), _ACTION_CHARACTERS)


def by_rules(done: Iterable[str], feedback: Iterable[str]) -> Lesson:
    """Make a lesson of a right episode's actions and of the feedback on wrong ones, the most frequent first."""
    counts = Counter(feedback)
    return Lesson(
        workflow="; ".join(action(text) for text in done),
        mistakes=" ".join(text for text, _ in counts.most_common(MOST_WRONG)),
    )


class Summariser(Protocol):
    """Makes lessons of cases."""

    name: str

    def summarise(self, cases: Sequence[Case]) -> list[Lesson | None]:
        """Return a lesson for each case, the same on all ranks; None where there is none."""


class Rules:
    """Copies the actions of the best right episode, and the feedback on wrong ones. It needs no model.

    It understands nothing: actions stay word for word, names and numbers of the task included.
    """

    name = "rules"

    def summarise(self, cases: Sequence[Case]) -> list[Lesson | None]:
        return [
            by_rules([turn.text for turn in case.right.turns] if case.right else [], case.feedback) for case in cases
        ]


class Policy:
    """Asks the policy itself, with the weights that it has after the step."""

    name = "policy"

    def __init__(self, player: Player, chat: ChatFormat, *, max_tokens: int) -> None:
        self._player, self._chat, self._max_tokens = player, chat, max_tokens
        self._structure = structural_tokens(chat.tokenizer)
        self._warned = False

    def summarise(self, cases: Sequence[Case]) -> list[Lesson | None]:
        prompts = []
        for case in cases:
            question = neutral(prompt_for(case), self._structure, most=_PROMPT_CHARACTERS)
            prompts.append(self._chat.start([{"role": "user", "content": question}]))
        answers = self._player.generate(prompts, max_tokens=self._max_tokens)
        if cases and answers.count(None) == len(cases):
            self._warn()
        return [None if ids is None else parse_lesson(self._chat.text(ids)) for ids in answers]

    def _warn(self) -> None:
        """Warn, once a run, that no case of a step fits: nobody asked for a run without skills."""
        if not self._warned:
            logger.warning(
                "no question about a task's episodes fits: with skill_sd.skills.max_tokens = %d for the answer it is "
                "longer than rollout.max_length = %d, so the policy writes no skills; raise rollout.max_length",
                self._max_tokens,
                self._player.standing.rollout.max_length,
            )
        self._warned = True


class Server:
    """Asks another model behind an OpenAI-compatible server: the first rank asks, for all."""

    name = "server"

    def __init__(self, player: Player, server: ChatServer) -> None:
        self._player, self._server = player, server
        self._silent = False

    def summarise(self, cases: Sequence[Case]) -> list[Lesson | None]:
        answers = self._player.ranks.from_first(lambda: self._ask(cases))
        if cases and not any(answers) and not self._silent:
            logger.warning("%s gives no answer; the run goes on without new skills", self._server.url)
        self._silent = bool(cases) and not any(answers)
        return [None if text is None else parse_lesson(text) for text in answers]

    def _ask(self, cases: Sequence[Case]) -> list[str | None]:
        """Return the answers; none for those that are still to come when the run is told to end."""
        prompts = [prompt_for(case) for case in cases]
        return map_until(self._player.stopped, self._server.ask, prompts, at_once=_ASKED_AT_ONCE)


def make_summariser(config: SkillsConfig, player: Player, chat: ChatFormat) -> Summariser:
    """Return the summariser that the settings name. The server's key is read from the environment."""
    if config.summariser == "rules":
        return Rules()
    if config.summariser == "policy":
        return Policy(player, chat, max_tokens=config.max_tokens)
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


def prompt_for(case: Case) -> str:
    """Write the question that a language model is asked about a case."""
    parts = []
    for number, episode in enumerate(case.episodes, start=1):
        outcome = "succeeded" if episode is case.right else "failed"
        text = shorten(episode_text(_without_thinking(episode.messages)), _EPISODE_CHARACTERS)
        feedback = "".join(f"\nWhat was said about it: {line}" for line in feedback_on(episode))
        parts.append(f"Attempt {number}, which {outcome}:\n{text}{feedback}")
    return PROMPT.format(task=shorten(case.prompt, _EPISODE_CHARACTERS), episodes="\n\n".join(parts))


def parse_lesson(answer: str) -> Lesson | None:
    """Return the lesson of an answer's first JSON object with a part that was asked for; None where there is none."""
    text = without_thinking(answer)
    at = -1
    for _ in range(_MOST_OBJECTS):
        if (at := text.find("{", at + 1)) < 0:
            break
        try:
            data, _ = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError):
            continue
        lesson = Lesson(**{part: _sentence(data.get(key)) for key, part in _KEYS.items()})
        if lesson.text:
            return lesson
    return None


def _sentence(value: Any) -> str:
    """Return a part of an answer as text: a string, the strings of a list, or '' for anything else."""
    if isinstance(value, list):
        return " ".join(item for item in value if isinstance(item, str))
    return value if isinstance(value, str) else ""


def _without_thinking(messages: Iterable[Message]) -> list[Message]:
    return [
        {**m, "content": without_thinking(str(m["content"]))} if m["role"] == "assistant" else m for m in messages
    ]  # fmt: skip
