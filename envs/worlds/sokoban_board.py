"""Knows Sokoban without words: rooms, moves, and a solver that finds the shortest solution from every solvable state.

Cells are numbered row by row. One search, backwards from the solved states, finds every state of a room that can
be solved at all and how far each is from it; what it does not reach is a deadlock. The number of states bounds
it: `Room.states` says it before anything is searched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from math import comb
from typing import Literal, NamedTuple

from opd.errors import DataError

SYMBOLS = WALL, FLOOR, GOAL, BOX, BOX_ON_GOAL, PLAYER, PLAYER_ON_GOAL = tuple("#_.$*@+")
DIRECTIONS = ("up", "down", "left", "right")
_DOWN = {"up": -1, "down": 1, "left": 0, "right": 0}
_RIGHT = {"up": 0, "down": 0, "left": -1, "right": 1}
MOST_STATES = 250_000
"""The most states that a search may visit; that takes a few seconds."""

Shortest = Literal["pushes", "moves"]


class State(NamedTuple):
    """Holds what moves: the cells of the player and of the boxes."""

    player: int
    boxes: frozenset[int]


class Cost(NamedTuple):
    """Says how far a state is from being solved."""

    pushes: int
    moves: int
    """Steps of the player, those that push among them."""


@dataclass(frozen=True, slots=True)
class Room:
    """Holds what stays: the floor and the goals on it. Walls are everywhere else, also along the whole border."""

    width: int
    height: int
    floor: frozenset[int]
    goals: frozenset[int]

    @property
    def states(self) -> int:
        """Return the most states that the room can have."""
        return count_states(len(self.floor), len(self.goals))

    def ahead(self, cell: int, direction: str) -> int:
        return cell + _DOWN[direction] * self.width + _RIGHT[direction]

    def move(self, state: State, direction: str) -> State | None:
        """Return the state after one step of the player; None where a wall or a box that cannot move is in the way."""
        to = self.ahead(state.player, direction)
        if to not in self.floor:
            return None
        if to not in state.boxes:
            return State(to, state.boxes)
        beyond = self.ahead(to, direction)
        if beyond not in self.floor or beyond in state.boxes:
            return None
        return State(to, state.boxes - {to} | {beyond})

    def after(self, state: State, direction: str) -> State:
        """Return the state after a step that is known to be possible."""
        following = self.move(state, direction)
        assert following is not None, f"{direction} is blocked"
        return following

    def walk(self, state: State, to: int) -> State | None:
        """Return the state with the player in another cell; None where no way leads there without a push."""
        seen, edge = set[int](), {state.player}
        while edge:
            seen |= edge
            edge = {self.ahead(cell, direction) for cell in edge for direction in DIRECTIONS}
            edge = (edge & self.floor) - state.boxes - seen
        return State(to, state.boxes) if to in seen else None

    def place(self, cell: int) -> str:
        """Name a cell in words. Rows and columns count from 1 at the top left."""
        return f"row {cell // self.width + 1}, column {cell % self.width + 1}"

    def draw(self, state: State) -> str:
        """Draw the board as text, one line for each row."""
        return "\n".join(
            "".join(self._symbol(row * self.width + column, state) for column in range(self.width))
            for row in range(self.height)
        )

    def _symbol(self, cell: int, state: State) -> str:
        if cell not in self.floor:
            return WALL
        on_goal = cell in self.goals
        if cell == state.player:
            return PLAYER_ON_GOAL if on_goal else PLAYER
        if cell in state.boxes:
            return BOX_ON_GOAL if on_goal else BOX
        return GOAL if on_goal else FLOOR


def count_states(cells: int, boxes: int) -> int:
    """Count the ways to place boxes and a player on so many cells."""
    return comb(cells, boxes) * max(0, cells - boxes)


def read(text: str) -> tuple[Room, State]:
    """Read a board from text; the reverse of `Room.draw`. A space is floor as well.

    Raises DataError when rows differ in length, the border is open, there is not one player, or there are not as
    many boxes as goals.
    """
    rows = text.strip("\n").split("\n")
    width = len(rows[0])
    symbols = "".join(rows).replace(" ", FLOOR)
    if len(symbols) != width * len(rows) or set(symbols) - set(SYMBOLS):
        raise DataError(f"a board has rows of one length, of the symbols # _ . $ * @ +; got {text!r:.200}")
    border = rows[0] + rows[-1] + "".join(row[:1] + row[-1:] for row in rows)
    where = {s: frozenset(n for n, symbol in enumerate(symbols) if symbol == s) for s in SYMBOLS}
    goals, boxes = where[GOAL] | where[BOX_ON_GOAL] | where[PLAYER_ON_GOAL], where[BOX] | where[BOX_ON_GOAL]
    players = where[PLAYER] | where[PLAYER_ON_GOAL]
    if set(border) != {WALL} or len(players) != 1 or len(boxes) != len(goals) or not boxes:
        raise DataError(f"a board has walls all around, one player, and as many boxes as goals; got {text!r:.200}")
    floor = frozenset(range(len(symbols))) - where[WALL]
    return Room(width, len(rows), floor, goals), State(min(players), boxes)


def distances(room: Room, *, shortest: Shortest = "pushes") -> dict[State, Cost]:
    """Find the cost of the best solution from every state that has one, in order of cost.

    `shortest` says what is best: the fewest pushes and of these the fewest moves, or the reverse. Raises
    DataError when the room may have more than `MOST_STATES` states.
    """
    if room.states > MOST_STATES:
        raise DataError(f"a room of {room.states:,} states is too large to search; at most {MOST_STATES:,} are")
    found: dict[State, Cost] = {}
    queue: list[tuple[tuple[int, int], int, Cost, State]] = []  # the number makes equal costs come in order
    for player in sorted(room.floor - room.goals):
        heappush(queue, ((0, 0), len(queue), Cost(0, 0), State(player, room.goals)))
    number = len(queue)
    while queue:
        _, _, cost, state = heappop(queue)
        if state in found:
            continue
        found[state] = cost
        for previous, pushes in _states_before(room, state):
            if previous not in found:
                longer = Cost(cost.pushes + pushes, cost.moves + 1)
                key = (longer.pushes, longer.moves) if shortest == "pushes" else (longer.moves, longer.pushes)
                heappush(queue, (key, number, longer, previous))
                number += 1
    return found


def _states_before(room: Room, state: State) -> Iterator[tuple[State, int]]:
    """Yield the states from which one step leads here, and whether that step pushes (1) or not (0)."""
    for direction in DIRECTIONS:
        ahead = room.ahead(state.player, direction)
        behind = 2 * state.player - ahead
        if behind not in room.floor or behind in state.boxes:
            continue
        yield State(behind, state.boxes), 0
        if ahead in state.boxes:
            yield State(behind, state.boxes - {ahead} | {state.player}), 1


def best_moves(room: Room, state: State, costs: dict[State, Cost]) -> list[str] | None:
    """Return the moves that solve a state at the cost that `distances` found; None when nothing does.

    Of equally good moves the first of up, down, left, right is taken: like states have like solutions.
    """
    if state not in costs:
        return None
    moves: list[str] = []
    while costs[state].moves:
        moves.append(next(d for d in DIRECTIONS if _is_on_the_way(room, state, d, costs)))
        state = room.after(state, moves[-1])
    return moves


def _is_on_the_way(room: Room, state: State, direction: str, costs: dict[State, Cost]) -> bool:
    following = room.move(state, direction)
    if following is None or following not in costs:
        return False
    now, then = costs[state], costs[following]
    pushed = following.boxes != state.boxes
    return (then.pushes + pushed, then.moves + 1) == (now.pushes, now.moves)


def can_be_lost(room: Room, state: State, costs: dict[State, Cost]) -> bool:
    """True if some moves from here lead to a state that cannot be solved, and not through a solved one."""
    seen, queue = {state}, [state]
    for here in queue:
        for direction in DIRECTIONS:
            there = room.move(here, direction)
            if there is not None and there not in costs:
                return True
            if there is not None and there not in seen and there.boxes != room.goals:
                seen.add(there)
                queue.append(there)
    return False


def solve(board: str, *, shortest: Shortest = "pushes") -> list[str] | None:
    """Return the best moves for a board in text; None when it cannot be solved.

    Raises DataError like `read` and `distances`.
    """
    room, state = read(board)
    return best_moves(room, state, distances(room, shortest=shortest))


def same_under_symmetry(board: str) -> str:
    """Return one of a board's eight images under rotation and reflection, the same one for all of them."""
    rows = board.split("\n")
    images = []
    for _ in range(4):
        rows = ["".join(column) for column in zip(*reversed(rows), strict=True)]
        images += ["\n".join(rows), "\n".join(reversed(rows))]
    return min(images)
