"""The plain data that flows through a step: tasks, turns, trajectories, teacher views, samples.

Token ids are lists of int until `opd.objective.collate` pads them into tensors; nothing here imports torch. A
trajectory is a fact (what was sampled, under which policy); a sample is a plan (which of its tokens
train, with which weight). Only a method turns one into the other.

The examples follow one episode of two turns through the file, each going on from those above it. The student
reads "Where is it?" (ids 1 2), says "look" (7) and ends its turn (9), is told "a box" (3), says "box" (8) and ends its
turn (9).

Long because the examples go on from one another, and half of the lines are theirs and the fields' docstrings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from opd.errors import DataError

Message = dict[str, Any]
"""A chat message: `role`, `content`, and what the template of the model knows besides."""

MEDIA = re.compile(r"image|video|audio|sound|speech")
ONLY_TEXT = "images, video and sound are not trained here, only text"


def medium_in(content: Any) -> str | None:
    """Return what names an image, a video or sound in a content or in a part of it; None where there is only text.

    >>> medium_in([{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "..."}}])
    'image_url'
    """
    for part in content if isinstance(content, list | tuple) else [content]:
        if isinstance(part, Mapping):
            kinds = [part.get("type"), *(key for key, value in part.items() if key != "text" and value is not None)]
            if found := next((str(kind) for kind in kinds if MEDIA.search(str(kind))), None):
                return found
    return None


class StopReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """The model sampled an end-of-turn token (it is the completion's last id, and is trained)."""
    LENGTH = "length"
    """The token limit cut the completion; the chat format closes the turn with untrained ids."""


class Fault(StrEnum):
    """What kind of failure ended an episode: the infrastructure's, or the environment's own."""

    TIMEOUT = "timeout"
    """A reset, a step or a grading overran its limit, or something that the environment asked did."""
    CONNECTION = "connection"
    """A server or a pipe could not be reached."""
    DIED = "died"
    """The environment's process ended: killed, out of memory, a crash in native code."""
    RAISED = "raised"
    """The environment raised something else."""
    INVALID = "invalid"
    """It answered what the contract does not allow: a wrong type, nan, megabytes."""

    @property
    def of_infrastructure(self) -> bool:
        return self in (Fault.TIMEOUT, Fault.CONNECTION, Fault.DIED)


class End(StrEnum):
    """Why an episode ended. An environment ends it, a limit of ours does, or something breaks."""

    FINISHED = "finished"
    """The environment ended it, and the last completion is whole."""
    UNREADABLE = "unreadable"
    """The environment ended it because it could not read the action, and said so: no call in the tool format, no move
    of the game."""
    COMPLETION_CUT = "completion_cut"
    """The environment ended it on a completion that `rollout.max_tokens` had cut."""
    CONTEXT_CUT = "context_cut"
    """The environment ended it on a completion that `rollout.max_length` had cut."""
    ENVIRONMENT_LIMIT = "environment_limit"
    """A limit of the environment's own ended it: the `truncated` of its step."""
    MAX_TURNS = "max_turns"
    """`env.max_turns` turns were played, and the environment would have gone on."""
    CONTEXT_FULL = "context_full"
    """The next prompt leaves no room for a completion within `rollout.max_length`."""
    TIME = "time"
    """`rollout.episode_timeout` was over."""
    BROKEN = "broken"
    """The environment broke, or what it stands on; `Trajectory.failed` says how."""

    @property
    def terminated(self) -> bool:
        """The environment ended the episode, as gymnasium means it: the task is over."""
        return self in (End.FINISHED, End.UNREADABLE, End.COMPLETION_CUT, End.CONTEXT_CUT)

    @property
    def truncated(self) -> bool:
        """A limit on turns, tokens or time ended the episode: neither a success nor a fault of the environment."""
        return self in (End.ENVIRONMENT_LIMIT, End.MAX_TURNS, End.CONTEXT_FULL, End.TIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task of an environment, addressed by number: the same task always has the same seed.

    >>> task = Task(index=3, seed=5)
    >>> task.id
    'train/3'
    """

    index: int
    seed: int
    split: str = "train"

    @property
    def id(self) -> str:
        return f"{self.split}/{self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What the environment said since the last turn, and what the policy sampled in answer.

    `prompt_ids` are the ids *added* since the last completion (the whole prompt at turn 0); `messages`
    are the messages they render. If `forked`, the chat template rewrote the past: the turn starts a new
    sequence, `prompt_ids` is a whole prompt, and `messages` the whole conversation.

    >>> first = Turn(
    ...     prompt_ids=[1, 2], completion_ids=[7, 9], logprobs=[-0.5, -0.1], stop_reason=StopReason.STOP,
    ...     messages=[{"role": "user", "content": "Where is it?"}], text="look",
    ... )
    >>> second = Turn(
    ...     prompt_ids=[3], completion_ids=[8, 9], logprobs=[-1.0, -0.25], stop_reason=StopReason.STOP,
    ...     messages=[{"role": "tool", "content": "a box"}], text="box", reward=1.0,
    ... )

    Had the template written "look" anew once the answer is there (as 6), the second turn would fork:

    >>> forked = Turn(
    ...     prompt_ids=[1, 2, 6, 9, 3], completion_ids=[8, 9], logprobs=[-1.0, -0.25], stop_reason=StopReason.STOP,
    ...     messages=[*first.messages, {"role": "assistant", "content": "look"}, *second.messages], text="box",
    ...     forked=True,
    ... )
    >>> forked.added
    [{'role': 'tool', 'content': 'a box'}]
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    """[len(completion_ids)] natural log, under the distribution that was sampled from."""
    stop_reason: StopReason
    messages: list[Message]
    text: str
    """The decoded completion without its end-of-turn token. The environment got it, or of a format that wraps its
    answers in markup too (gpt-oss) the answer alone."""
    reward: float = 0.0
    feedback: str | None = None
    """What the environment said about this action's failure, if it did. For a teacher's eyes only."""
    rewards: dict[str, float | None] = field(default_factory=dict)
    """The parts of the reward by name, where the environment says; None where a part abstained. For the logs only."""
    unreadable: bool = False
    """The environment could not read the completion: no call in the tool format, no move of the game. For the logs."""
    forked: bool = False

    @property
    def added(self) -> list[Message]:
        """What the environment said since the last turn; `messages` of a forked one repeat the whole conversation."""
        if not self.forked:
            return self.messages
        last = max((i for i, m in enumerate(self.messages) if m.get("role") == "assistant"), default=-1)
        return self.messages[last + 1 :]

    def __post_init__(self) -> None:
        if len(self.logprobs) != len(self.completion_ids):
            raise DataError(f"a turn has {len(self.completion_ids)} completion ids but {len(self.logprobs)} log-probs")


class Segment(NamedTuple):
    """Consecutive turns that make one sequence: the first turn's prompt is whole, the others add to it.

    >>> segment = Segment(start=0, turns=[first, second])
    >>> [turn.prompt_ids + turn.completion_ids for turn in segment.turns]
    [[1, 2, 7, 9], [3, 8, 9]]
    """

    start: int
    """The number of the first of these turns in its trajectory."""
    turns: list[Turn]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """A finished episode: its turns, and why it ended.

    Raises DataError where `end` and the rest contradict each other.

    >>> trajectory = Trajectory(task=task, member=0, turns=[first, second], end=End.FINISHED, success=True)
    >>> trajectory.reward, trajectory.completion_tokens, trajectory.terminated, trajectory.truncated
    (1.0, 4, True, False)
    >>> trajectory.segments() == [segment]
    True
    >>> rewritten = Trajectory(task=task, member=1, turns=[first, forked], end=End.MAX_TURNS)
    >>> rewritten.segments() == [Segment(start=0, turns=[first]), Segment(start=1, turns=[forked])]
    True
    """

    task: Task
    member: int
    """Which of its group this is, 0 to G-1."""
    turns: list[Turn]
    end: End
    """Why it ended; `terminated` and `truncated` follow from it."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools that the prompt offers."""
    privileged: dict[str, str] = field(default_factory=dict)
    """What only a teacher may see, by name (`solution`, `plan`, ...)."""
    success: bool = False
    unscored: bool = False
    """Nothing could tell what it is worth: its reward stands for nothing, and it is compared with no other."""
    ungraded: list[str] = field(default_factory=list)
    """Why graders had no result for what it said: they hung, died, raised. It scored 0, or was over."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers that reward functions logged."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Plain data that they logged beside it."""
    failed: str | None = None
    """What broke, in words, where `end` is BROKEN; such a trajectory is counted and never trained."""
    fault: Fault | None = None
    """Which kind of failure that was."""
    policy_version: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by part: `env`, `engine`."""

    def __post_init__(self) -> None:
        if (self.end is End.BROKEN) != (self.failed is not None):
            raise DataError(f"a trajectory that ended by {self.end} has failed = {self.failed!r}")
        if self.failed is None and self.fault is not None:
            raise DataError(f"a trajectory that did not fail has fault = {self.fault}")
        if self.end is End.BROKEN and self.success:
            raise DataError("a trajectory that broke cannot have solved its task")
        if not self.turns and self.end not in (End.CONTEXT_FULL, End.TIME, End.BROKEN):
            raise DataError(f"a trajectory without turns cannot have ended by {self.end}")
        if self.end.terminated:
            cut, says_cut = self.turns[-1].stop_reason, self.end in (End.COMPLETION_CUT, End.CONTEXT_CUT)
            if (cut is StopReason.LENGTH) != says_cut:
                raise DataError(f"a trajectory ended by {self.end}, but its last completion by {cut}")

    @property
    def terminated(self) -> bool:
        return self.end.terminated

    @property
    def truncated(self) -> bool:
        return self.end.truncated

    @property
    def reward(self) -> float:
        """The sum of the rewards of the steps."""
        return math.fsum(turn.reward for turn in self.turns)

    @property
    def reward_parts(self) -> dict[str, float | None]:
        """Each named part of the reward, summed over the turns like the reward; None if it abstained throughout."""
        parts: dict[str, float | None] = {}
        for name, value in (item for turn in self.turns for item in turn.rewards.items()):
            parts[name] = parts.get(name) if value is None else (parts.get(name) or 0.0) + value
        return parts

    @property
    def completion_ids(self) -> list[int]:
        """All tokens after the first prompt: what was sampled, and what the environment said in between.

        Where the template rewrote the past (a forked turn), the prompt that was told anew is left out.
        """
        told = [[] if number == 0 or turn.forked else turn.prompt_ids for number, turn in enumerate(self.turns)]
        return [one for ids, turn in zip(told, self.turns, strict=True) for one in (*ids, *turn.completion_ids)]

    @property
    def completion_tokens(self) -> int:
        return sum(len(turn.completion_ids) for turn in self.turns)

    @property
    def messages(self) -> list[Message]:
        """The conversation up to the last completion, each message once."""
        return [m for turn in self.turns for m in (*turn.added, {"role": "assistant", "content": turn.text})]

    def segments(self) -> list[Segment]:
        """The turns, cut where the template rewrote the past; one training sequence each."""
        starts = [n for n, turn in enumerate(self.turns) if n == 0 or turn.forked]
        ends = [*starts[1:], len(self.turns)]
        return [Segment(start, self.turns[start:end]) for start, end in zip(starts, ends, strict=bool(starts))]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryGroup:
    """The trajectories of one task, in the order of their `member` number.

    >>> broken = Trajectory(
    ...     task=task, member=2, turns=[first], end=End.BROKEN, failed="step 1: OSError: no box", fault=Fault.RAISED
    ... )
    >>> group = TrajectoryGroup(task=task, trajectories=[trajectory, rewritten, broken])
    >>> [t.member for t in group.usable]
    [0, 1]
    """

    task: Task
    trajectories: list[Trajectory]
    replaced: list[Trajectory] = field(default_factory=list)
    """Attempts that failed and were played again: counted, never trained."""
    dropped: bool = False
    """Too few members survived for the others to train (`rollout.on_failure`)."""

    @property
    def attempts(self) -> list[Trajectory]:
        """Everything that was played."""
        return [*self.trajectories, *self.replaced]

    @property
    def usable(self) -> list[Trajectory]:
        """Those that may train: the environment did not break, and something was sampled."""
        if self.dropped:
            return []
        return [t for t in self.trajectories if t.failed is None and t.completion_tokens > 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherView:
    """The teacher's own sequence, which holds the student's sampled ids, and where each of them is.

    `rows[j]` is the row of the teacher's logits that predicts the j-th completion token of the sample:
    one less than the position of that token in `token_ids`.

    A teacher who also reads the solution (5), at the end of the first prompt:

    >>> view = TeacherView(token_ids=[1, 2, 5, 7, 9, 3, 8, 9], rows=[2, 3, 5, 6], shows=("solution",))
    >>> view.targets
    [7, 9, 8, 9]
    """

    token_ids: list[int]
    rows: list[int]
    shows: tuple[str, ...] = ()
    """What is in it that the student does not see, by name, for metrics."""

    def __post_init__(self) -> None:
        last = len(self.token_ids) - 2
        if any(row < 0 or row > last for row in self.rows):
            raise DataError(f"a teacher row lies outside 0..{last}: {[r for r in self.rows if not 0 <= r <= last]}")
        if any(b <= a for a, b in zip(self.rows, self.rows[1:], strict=False)):
            raise DataError("the teacher's rows must increase strictly")

    @property
    def targets(self) -> list[int]:
        """The ids that the rows predict; must equal the sample's completion ids."""
        return [self.token_ids[row + 1] for row in self.rows]


WEIGHTS = ("policy_weight", "distill_weight", "ce_weight")
"""The weight streams of a sample, one a component of the loss."""
STREAMS = (
    *("completion_mask", "turn", *WEIGHTS, "advantage"),
    *("sampler_logprobs", "old_logprobs", "teacher_logprobs", "teacher_entropy"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sequence, ready to train: ids, which of them were sampled, and what each of those costs.

    Streams are `[T]`, one value a token; outside the mask a weight must be 0 and a log-prob is nan, so
    that a placeholder read as a value poisons the loss where a test sees it.

    >>> sample = to_sample(trajectory, segment, view=view, distill=0.5)
    >>> sample.token_ids
    [1, 2, 7, 9, 3, 8, 9]
    >>> sample.completion_mask
    [0, 0, 1, 1, 0, 1, 1]
    >>> sample.turn
    [0, 0, 0, 0, 1, 1, 1]
    >>> sample.sampler_logprobs
    [nan, nan, -0.5, -0.1, nan, -1.0, -0.25]
    >>> sample.distill_weight
    [0.0, 0.0, 0.5, 0.5, 0.0, 0.5, 0.5]
    >>> sample.completion_ids == view.targets
    True
    >>> sample.rows  # the student's, beside the teacher's [2, 3, 5, 6]
    [1, 2, 4, 5]
    """

    token_ids: list[int]
    completion_mask: list[int]
    turn: list[int]
    sampler_logprobs: list[float]
    policy_weight: list[float]
    distill_weight: list[float]
    ce_weight: list[float]
    advantage: list[float]
    """What `policy_weight` multiplies the log-prob's gradient by; read where that is not 0."""
    old_logprobs: list[float] | None = None
    """The trainer's own log-probs before the first update of the step; None where there is but one."""
    teacher_logprobs: list[float] | None = None
    """The teacher's, at the sampled ids, where they were scored before training."""
    teacher_entropy: list[float] | None = None
    """Nats of the teacher's whole distribution, where it was scored before training."""
    teacher_top_ids: list[list[int]] | None = None
    """[N, k] the teacher's likeliest ids at each of the N sampled tokens, where they were stored."""
    teacher_top_logprobs: list[list[float]] | None = None
    """[N, k] nats of these."""
    teacher_view: TeacherView | None = None
    task: Task | None = None
    member: int = 0
    success: bool = False
    """Whether the episode solved its task, for metrics and weightings."""
    route: str = ""
    """The component that this sample feeds, for metrics."""
    policy_version: int = 0

    def __post_init__(self) -> None:
        size = len(self.token_ids)
        for name in STREAMS:
            stream = getattr(self, name)
            if stream is not None and len(stream) != size:
                raise DataError(f"sample.{name} has {len(stream)} entries for {size} tokens")
        for top in (self.teacher_top_ids, self.teacher_top_logprobs):
            if top is not None and len(top) != sum(self.completion_mask):
                raise DataError(f"a teacher's top k of {len(top)} tokens, but {sum(self.completion_mask)} were sampled")
        if self.completion_mask and self.completion_mask[0]:
            raise DataError("the first token of a sample cannot be trained: no row predicts it")
        for name in WEIGHTS:
            weights = getattr(self, name)
            if any(w != 0 and not m for w, m in zip(weights, self.completion_mask, strict=True)):
                raise DataError(f"sample.{name} is non-zero on a token that was not sampled")
        if self.teacher_view is not None and self.teacher_view.targets != self.completion_ids:
            raise DataError("the teacher's view does not hold the sampled ids, in order, at its rows")

    @property
    def zero_signal(self) -> bool:
        """True: nothing can be learned from it. It has no weight, or no advantage where it has some."""
        if any(self.distill_weight) or any(self.ce_weight):
            return False
        return not any(w * a for w, a in zip(self.policy_weight, self.advantage, strict=True) if w)

    def spread(self, values: Sequence[float]) -> list[float]:
        """One value for each sampled token, laid out as a stream: [T], nan elsewhere."""
        rest = iter(values)
        return [next(rest) if sampled else math.nan for sampled in self.completion_mask]

    @property
    def completion_ids(self) -> list[int]:
        return [t for t, m in zip(self.token_ids, self.completion_mask, strict=True) if m]

    @property
    def rows(self) -> list[int]:
        """The student's rows that predict the completion ids: their positions, less one."""
        return [i - 1 for i, m in enumerate(self.completion_mask) if m]


def to_sample(
    trajectory: Trajectory,
    segment: Segment,
    *,
    view: TeacherView | None = None,
    policy: float = 0.0,
    advantage: float = 0.0,
    distill: float = 0.0,
    ce: float = 0.0,
    route: str = "",
) -> Sample:
    """Make a sample of one segment of a trajectory, weights and advantage the same on every sampled token."""
    ids, mask, turn_of, logprobs = _end_to_end(segment)

    def stream(value: float) -> list[float]:
        return [value if sampled else 0.0 for sampled in mask]

    return Sample(
        token_ids=ids,
        completion_mask=mask,
        turn=turn_of,
        sampler_logprobs=logprobs,
        policy_weight=stream(policy),
        distill_weight=stream(distill),
        ce_weight=stream(ce),
        advantage=stream(advantage),
        teacher_view=view,
        task=trajectory.task,
        member=trajectory.member,
        success=trajectory.success,
        route=route,
        policy_version=trajectory.policy_version,
    )


def _end_to_end(segment: Segment) -> tuple[list[int], list[int], list[int], list[float]]:
    """Lay the turns of a segment end to end: ids, mask, the turns' numbers and the sampler's log-probs, [T] each."""
    ids: list[int] = []
    mask: list[int] = []
    turn_of: list[int] = []
    logprobs: list[float] = []
    for number, turn in enumerate(segment.turns, start=segment.start):
        ids += turn.prompt_ids + turn.completion_ids
        mask += [0] * len(turn.prompt_ids) + [1] * len(turn.completion_ids)
        turn_of += [number] * (len(turn.prompt_ids) + len(turn.completion_ids))
        logprobs += [math.nan] * len(turn.prompt_ids) + turn.logprobs
    return ids, mask, turn_of, logprobs
