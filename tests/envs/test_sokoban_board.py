"""The solver against brute force: what it calls shortest is, and what it calls lost is."""

from collections import deque
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.envs.worlds import sokoban_board
from opd.envs.worlds.sokoban import Level, _draw_room
from opd.envs.worlds.sokoban_board import (
    DIRECTIONS,
    State,
    best_moves,
    can_be_lost,
    distances,
    read,
    same_under_symmetry,
    solve,
)
from opd.errors import DataError

STRAIGHT = "######\n#@$_.#\n######"
CORNER = "#####\n#$_.#\n#_@_#\n#####"


def rooms(seed):
    """Draw a random small room with one or two boxes."""
    rng = np.random.default_rng(seed)
    level = Level(size=5, boxes=int(rng.integers(1, 3)), walls=int(rng.integers(0, 4)), pushes=(1, 1))
    while (room := _draw_room(rng, level)) is None:
        pass
    return room


def states(room):
    """Yield every state of a room."""
    for boxes in combinations(sorted(room.floor), len(room.goals)):
        yield from (State(player, frozenset(boxes)) for player in sorted(room.floor - set(boxes)))


def fewest_by_search(room, start, price):
    """Search forwards for the price of the cheapest way to solve a state, or None; `price(pushed)` of each step."""
    best, queue = {start: (0, 0)}, deque([start])
    while queue:
        here = queue.popleft()
        if here.boxes == room.goals:
            continue
        for direction in DIRECTIONS:
            there = room.move(here, direction)
            if there is None:
                continue
            cost = tuple(a + b for a, b in zip(best[here], price(there.boxes != here.boxes), strict=True))
            if there not in best or cost < best[there]:
                best[there] = cost
                queue.append(there)
    return min((cost for state, cost in best.items() if state.boxes == room.goals), default=None)


@pytest.mark.parametrize(
    ("shortest", "price"), [("pushes", lambda pushed: (int(pushed), 1)), ("moves", lambda pushed: (1, int(pushed)))]
)
@settings(max_examples=settings.default.max_examples * 3 // 20)
@given(seed=st.integers(0, 10_000), data=st.data())
def test_costs_are_those_of_a_forward_search_and_lost_states_have_none(shortest, price, seed, data):
    room = rooms(seed)
    costs = distances(room, shortest=shortest)
    everything = list(states(room))
    for n in data.draw(st.lists(st.integers(0, len(everything) - 1), min_size=1, max_size=6)):
        state = everything[n]
        found = costs.get(state)
        key = found and ((found.pushes, found.moves) if shortest == "pushes" else (found.moves, found.pushes))
        assert key == fewest_by_search(room, state, price)


@settings(max_examples=settings.default.max_examples // 4)
@given(seed=st.integers(0, 10_000))
def test_a_solution_solves_with_the_pushes_and_moves_that_it_promises(seed):
    room = rooms(seed)
    costs = distances(room)
    for state, cost in list(costs.items())[::7]:
        moves = best_moves(room, state, costs)
        pushes = 0
        for direction in moves:
            following = room.move(state, direction)
            pushes += following.boxes != state.boxes
            state = following
        assert state.boxes == room.goals
        assert (pushes, len(moves)) == cost


def test_fewest_pushes_and_fewest_moves_can_differ():
    board = "######\n#__$.#\n##___#\n##_*_#\n###@_#\n######"
    assert solve(board) == ["right", "up", "up", "left", "left", "up", "right"]  # 1 push
    assert solve(board, shortest="moves") == ["up", "left", "up", "up", "right", "down"]  # 3 pushes


def test_boards_are_read_as_they_are_drawn():
    board = "######\n#_$*_#\n#+__##\n######"
    room, state = read(board)
    assert room.draw(state) == board
    assert room.place(state.player) == "row 3, column 2"
    assert read(board.replace("_", " ")) == (room, state)


def test_a_box_is_pushed_by_walking_into_it_and_not_into_a_wall_or_another_box():
    room, state = read("#######\n#@$__.#\n#__$_.#\n#######")
    pushed = room.move(state, "right")
    assert room.draw(pushed) == "#######\n#_@$_.#\n#__$_.#\n#######"
    assert room.move(pushed, "up") is None
    assert room.move(room.move(pushed, "right"), "right") is not None
    room, state = read("######\n#@$$_#\n#..__#\n######")
    assert room.move(state, "right") is None


def test_a_box_in_a_corner_is_lost_for_good():
    assert solve(CORNER) is None
    assert solve(STRAIGHT) == ["right", "right"]


def test_walking_goes_around_boxes_and_not_through_them():
    room, state = read("######\n#@$__#\n##_###\n##__.#\n######")
    assert room.walk(state, state.player) == state
    assert room.walk(state, state.player + 2) is None
    room, state = read("######\n#@$__#\n#____#\n#__._#\n######")
    assert room.walk(state, state.player + 2).player == state.player + 2


def test_a_puzzle_that_only_the_right_push_can_touch_cannot_be_lost():
    room, state = read(STRAIGHT)
    assert not can_be_lost(room, state, distances(room))
    room, state = read("#######\n#@$_._#\n#######")  # beyond the goal, but then the game is over
    assert not can_be_lost(room, state, distances(room))
    room, state = read("######\n#@___#\n#_$_.#\n#____#\n######")
    assert can_be_lost(room, state, distances(room))


@pytest.mark.parametrize(
    "board",
    [
        "#####\n#@$#\n#####",  # rows of two lengths
        "#####\n#@$.\n#####",  # an open border
        "#####\n#_$.#\n#####",  # nobody
        "#####\n#@@.#\n#$__#\n#####",  # two players
        "#####\n#@$_#\n#####",  # no goal
        "#####\n#@x.#\n#####",  # an unknown symbol
        "",
    ],
)
def test_a_board_that_is_none_is_refused(board):
    with pytest.raises(DataError, match="a board has"):
        read(board)


def test_a_room_that_is_too_large_is_refused_before_it_is_searched(monkeypatch):
    room, _ = read("######\n#@___#\n#_$_.#\n#____#\n######")
    assert room.states == 12 * 11
    monkeypatch.setattr(sokoban_board, "MOST_STATES", 131)
    with pytest.raises(DataError, match="a room of 132 states is too large to search; at most 131 are"):
        distances(room)


def test_all_eight_images_of_a_board_are_one():
    board = "####\n#@$#\n#_.#\n####"
    turned = "####\n#_@#\n#.$#\n####"
    mirrored = "####\n#$@#\n#._#\n####"
    assert same_under_symmetry(board) == same_under_symmetry(turned) == same_under_symmetry(mirrored)
    assert same_under_symmetry(board) != same_under_symmetry("####\n#@$#\n#._#\n####")
