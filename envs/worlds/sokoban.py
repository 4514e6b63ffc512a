"""Puts Sokoban into text: push every box onto a goal. A wrong push can lose the game for good.

The agent sees the board, acts, and sees the board again. In `SokobanEnv` it walks, one or several moves in a call;
in `SokobanPushEnv` it names a push, and the way behind the box is found for it. The solver behind both
(`sokoban_board`) knows the best solution of every state, so it tells at once when a push was one too many.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np

from opd.envs.text_env import Reply, Start, task_split
from opd.envs.tool_env import ToolEnv, ToolError, tool
from opd.envs.worlds.sokoban_board import (
    DIRECTIONS,
    MOST_STATES,
    Cost,
    Room,
    State,
    best_moves,
    can_be_lost,
    count_states,
    distances,
    same_under_symmetry,
)
from opd.errors import ConfigError, EnvError
from opd.tool_calls import format_call

RULES = (
    "Push every box onto a goal. The board: # wall, _ floor, . goal, $ box, * box on a goal, @ you, + you on a goal. "
    "A box can be pushed, if the cell behind it is free, but not pulled, so one in a corner with no goal is lost. "
    "Rows and columns count from 1 at the top left."
)

_DRAWS = 2_000
_TRIES = 24  # states of one room that are looked at for one in the right split
_MOST_MOVES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Says how hard the puzzles are."""

    size: int
    """Rows and columns, with the walls around."""
    boxes: int
    walls: int
    """Cells of wall inside."""
    pushes: tuple[int, int]
    """Least and most pushes of the shortest solution; evenly mixed, by the task's index where there is one."""

    def __post_init__(self) -> None:
        low, high = self.pushes
        inside = (self.size - 2) ** 2 if self.size > 3 else 0
        cells = inside - self.walls
        if self.walls < 0 or self.boxes < 1 or cells < 2 * self.boxes + 1:
            raise ConfigError(
                f"a Sokoban level of size = {self.size}, walls = {self.walls} has no room for boxes = {self.boxes}"
            )
        if not 1 <= low <= high:
            raise ConfigError(f"a Sokoban level's pushes = {[low, high]} must be two numbers, 1 or more, in order")
        if (states := count_states(cells, self.boxes)) > MOST_STATES:
            raise ConfigError(
                f"a Sokoban level of size = {self.size}, boxes = {self.boxes} has {states:,} states; "
                f"at most {MOST_STATES:,} can be solved: take a smaller size or fewer boxes"
            )


LEVELS = {
    1: Level(size=6, boxes=1, walls=2, pushes=(1, 3)),
    2: Level(size=7, boxes=1, walls=4, pushes=(3, 6)),
    3: Level(size=6, boxes=2, walls=1, pushes=(2, 4)),
    4: Level(size=6, boxes=2, walls=2, pushes=(4, 7)),
}


class Push(NamedTuple):
    """Moves one box by one cell."""

    box: int
    direction: str


class _Puzzle(ToolEnv):
    """Holds what both worlds share: the puzzles, the rewards, and the end of an episode."""

    metadata: dict[str, Any] = {  # noqa: RUF012  (gymnasium's own declaration)
        "render_modes": [],
        "tasks": {"train": None, "eval": None, "warm": None},
    }
    acting: ClassVar[str]
    """How to act, for the system message."""

    def __init__(
        self, *, level: int | Mapping[str, Any] = 1, partial: float = 0.0, max_steps: int | None = None
    ) -> None:
        self.level = _level(level)
        super().__init__(max_steps=self.level.pushes[1] + 2 if max_steps is None else max_steps)
        if not 0 <= partial <= 1:
            raise ConfigError(f"partial = {partial} must be from 0 to 1, of which 1 is the reward for solving")
        self.partial = partial
        self.room = Room(0, 0, frozenset(), frozenset())
        self.state = State(0, frozenset())
        self.costs: dict[State, Cost] = {}

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        low, high = self.level.pushes
        number = int(rng.integers(high - low + 1)) if index is None else index
        self.room, self.state, self.costs = _draw(rng, self.level, low + number % (high - low + 1), split)
        return Start(
            prompt=f"Solve this puzzle:\n{self.board}",
            system=f"{RULES} {self.acting}",
            privileged={"plan": self._plan(), "solution": "\n".join(self.solution())},
        )

    @abstractmethod
    def solution(self) -> list[str]:
        """Say what to do from here on, a line for each push."""

    @abstractmethod
    def oracle(self) -> list[str]:
        """Return the actions of a perfect episode from here on, one for each push."""

    @property
    def board(self) -> str:
        return self.room.draw(self.state)

    def respond(self, action: str) -> Reply:
        before = self._value()
        reply = super().respond(action)
        return replace(reply, reward=self._value() - before)

    def _value(self) -> float:
        if self.state.boxes == self.room.goals:
            return 1.0
        return self.partial * len(self.state.boxes & self.room.goals) / len(self.room.goals)

    def _go(self, following: State, direction: str) -> bool:
        """Go on to a state one move further. True if that ended the episode."""
        self.state = following
        if following.boxes == self.room.goals:
            self.finish(0.0, success=True)  # `respond` knows the reward
            return True
        if following in self.costs:
            return False
        where = self.room.place(following.player)  # the player now stands where the box was
        self.finish(0.0, success=False, feedback=f"Lost: the box at {where} must not be pushed {direction}.")
        return True

    def by_push(self, state: State) -> list[list[str]]:
        """Return the best moves from a state, cut after each push. Raises EnvError when it cannot be solved."""
        moves = best_moves(self.room, state, self.costs)
        if moves is None:
            raise EnvError("this state cannot be solved")
        cut: list[list[str]] = []
        pushed = True
        for direction in moves:
            if pushed:
                cut.append([])
            cut[-1].append(direction)
            before, state = state, self.room.after(state, direction)
            pushed = state.boxes != before.boxes
        return cut

    def pushes(self, state: State) -> list[Push]:
        """Return the pushes of the best solution from a state."""
        found = []
        for moves in self.by_push(state):
            for direction in moves:
                state = self.room.after(state, direction)
            found.append(Push(state.player, moves[-1]))
        return found

    def _plan(self) -> str:
        """Put the pushes into words, a line for each box that is pushed without a break."""
        lines: list[str] = []
        at: int | None = None
        for box, direction in self.pushes(self.state):
            if box == at:
                lines[-1] += f", {direction}"
            else:
                lines.append(f"push the box at {self.room.place(box)} {direction}")
            at = self.room.ahead(box, direction)
        return "\n".join(lines)


class SokobanEnv(_Puzzle):
    """Walk, and push every box onto a goal. Reward 1 when solved, else 0, or a part of `partial`.

    A push after which nothing can be solved any more ends the episode, and the feedback names it. Privileged
    are `solution` (the moves, a line for each push) and `plan` (the pushes alone). No board is in two splits,
    nor is one a rotation or a mirror image of one in another.

    Args:
        level: 1 to 4 (`LEVELS`), or the fields of a `Level`, such as `{size: 7, boxes: 2, walls: 2, pushes: [3, 6]}`.
        partial: reward for all boxes on goals, but for one: an unsolved episode ends with `partial` times the
            share of boxes on goals; as they come and go, so do their rewards, step by step.
        max_steps: truncate after this many turns; by default two more than the most pushes of the level.
    """

    acting = "Walk up, down, left or right; walking into a box pushes it."

    @tool
    def move(self, directions: str) -> str:
        """Make one or several moves, in order, and see the board.

        Args:
            directions: up, down, left or right, or several of them with commas between
        """
        moves = _read_directions(directions)
        for number, direction in enumerate(moves):
            following = self.room.move(self.state, direction)
            if following is None:
                made = f"; of {len(moves)} moves {number} {'was' if number == 1 else 'were'} made"
                raise ToolError(f"the way {direction} is blocked{made if len(moves) > 1 else ''}\n{self.board}")
            if self._go(following, direction):
                break
        return self.board

    def solution(self) -> list[str]:
        return [f"move {', '.join(moves)}" for moves in self.by_push(self.state)]

    def oracle(self) -> list[str]:
        return [format_call("move", {"directions": ", ".join(moves)}) for moves in self.by_push(self.state)]


class SokobanPushEnv(_Puzzle):
    """Name a box and a direction to push it; the way behind it is found. All else is as in `SokobanEnv`.

    Planning without walking: episodes are short, and each turn decides something. `solution` has a line for each
    push.
    """

    acting = "Name the box to push by its row and column, and a direction."

    @tool
    def push(self, row: int, column: int, direction: str) -> str:
        """Walk behind a box, push it one cell, and see the board.

        Args:
            row: the row of the box
            column: the column of the box
            direction: up, down, left or right
        """
        [direction, *more] = _read_directions(direction)
        if more:
            raise ToolError("one direction at a time")
        box = (row - 1) * self.room.width + column - 1
        inside = 1 <= row <= self.room.height and 1 <= column <= self.room.width
        if not inside or box not in self.state.boxes:
            raise ToolError(f"there is no box at row {row}, column {column}\n{self.board}")
        behind = self.room.walk(self.state, 2 * box - self.room.ahead(box, direction))
        if behind is None:
            raise ToolError(f"no way leads behind that box\n{self.board}")
        following = self.room.move(behind, direction)
        if following is None:
            raise ToolError(f"the way {direction} is blocked\n{self.board}")
        self._go(following, direction)
        return self.board

    def solution(self) -> list[str]:
        return [f"push {self.room.place(box)} {direction}" for box, direction in self.pushes(self.state)]

    def oracle(self) -> list[str]:
        return [self.call(push) for push in self.pushes(self.state)]

    def call(self, push: Push) -> str:
        """Write the action that makes a push."""
        row, column = divmod(push.box, self.room.width)
        return format_call("push", {"row": str(row + 1), "column": str(column + 1), "direction": push.direction})


def offset(room: Room, state: State) -> tuple[int, int]:
    """Return how far below and to the right of its one box the goal of a room lies.

    Raises ValueError where there are more.
    """
    [box], [goal] = state.boxes, room.goals
    return goal // room.width - box // room.width, goal % room.width - box % room.width


def note(down: int, right: int, pushes: Sequence[str]) -> str:
    """Write what to remember of a puzzle with one box: where the goal lay as seen from the box, and what solved it.

    >>> note(-1, 2, ["right", "right", "up"])
    'Goal 1 up, 2 right of the box: push right, right, up.'
    """
    vertical, sideways = "up" if down < 0 else "down", "left" if right < 0 else "right"
    where = [f"{abs(n)} {word}" for n, word in ((down, vertical), (right, sideways)) if n]
    return f"Goal {', '.join(where)} of the box: push {', '.join(pushes)}."


def _level(level: int | Mapping[str, Any]) -> Level:
    if isinstance(level, int):
        if level not in LEVELS:
            known = ", ".join(map(str, LEVELS))
            raise ConfigError(f"level = {level} is unknown. Allowed: {known}, or the fields of a level")
        return LEVELS[level]
    names = [field.name for field in fields(Level)]
    if set(level) != set(names):
        raise ConfigError(f"level = {dict(level)} must be a number, or have these fields: {', '.join(names)}")
    numbers = [level["size"], level["boxes"], level["walls"], *_pair(level["pushes"])]
    if not all(isinstance(n, int) for n in numbers):
        raise ConfigError(f"level = {dict(level)} must hold whole numbers, and pushes two of them")
    return Level(**{**level, "pushes": tuple(level["pushes"])})


def _pair(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) and len(value) == 2 else [None]


def _read_directions(text: str) -> list[str]:
    """Read the moves that a text names. Raises ToolError for anything else in it, for none, and for too many."""
    words = re.findall(r"[^\s,]+", text.lower())
    unknown = [word for word in words if word not in DIRECTIONS]
    if unknown or not words:
        named = f"{unknown[0][:80]!r} is no direction" if unknown else "there is no direction"
        raise ToolError(f"{named}; the directions are {', '.join(DIRECTIONS)}")
    if len(words) > _MOST_MOVES:
        raise ToolError(f"{len(words)} moves are too many for one call; at most {_MOST_MOVES} are made")
    return words


def _draw(rng: np.random.Generator, level: Level, pushes: int, split: str) -> tuple[Room, State, dict[State, Cost]]:
    """Draw a room, and a state in it that takes this many pushes, can be lost, and whose board is of this split."""
    for _ in range(_DRAWS):
        room = _draw_room(rng, level)
        if room is None:
            continue
        costs = distances(room)
        states = [s for s, cost in costs.items() if cost.pushes == pushes and not s.boxes & room.goals]
        for n in rng.permutation(len(states))[:_TRIES].tolist():
            asked = task_split(same_under_symmetry(room.draw(states[n]))) == split
            if asked and can_be_lost(room, states[n], costs):
                return room, states[n], costs
    raise EnvError(f"no puzzle of {pushes} pushes was found in split {split!r} for {level}; take fewer pushes")


def _draw_room(rng: np.random.Generator, level: Level) -> Room | None:
    """Draw random walls and goals; None when the walls cut the floor in two."""
    inside = range(1, level.size - 1)
    cells = [row * level.size + column for row in inside for column in inside]
    order = rng.permutation(cells).tolist()
    floor = frozenset(order[level.walls :])
    room = Room(level.size, level.size, floor, frozenset(order[level.walls : level.walls + level.boxes]))
    return room if _is_connected(room) else None


def _is_connected(room: Room) -> bool:
    seen, edge = set[int](), {min(room.floor)}
    while edge:
        seen |= edge
        edge = {room.ahead(cell, direction) for cell in edge for direction in DIRECTIONS} & room.floor - seen
    return seen == room.floor
