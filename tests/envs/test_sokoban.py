"""The worlds of Sokoban: what their tools do, what an episode is worth, and how puzzles are drawn."""

import json
import re

import numpy as np
import pytest

from opd.envs import make
from opd.envs.text_env import task_split
from opd.envs.worlds.sokoban import LEVELS, Level, SokobanEnv, SokobanPushEnv, note, offset
from opd.envs.worlds.sokoban_board import distances, read, same_under_symmetry, solve
from opd.errors import ConfigError, EnvError

BOARD = "######\n#@___#\n#_$__#\n#___.#\n#____#\n######"
TWO = "#######\n#@____#\n#_$_$_#\n#_.__.#\n#_____#\n#######"
CLASSES = [SokobanEnv, SokobanPushEnv]


def at(board, cls=SokobanEnv, **options):
    """Make an environment in which this board has just begun."""
    env = cls(**options)
    env.reset(seed=0)
    env.room, env.state = read(board)
    env.costs = distances(env.room)
    return env


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def move(env, directions):
    return env.step(call("move", directions=directions))


def push(env, row, column, direction):
    return env.step(call("push", row=row, column=column, direction=direction))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("level", LEVELS)
def test_the_oracle_is_rewarded_at_its_last_action_and_not_before(cls, level):
    env = cls(level=level)
    low, high = env.level.pushes
    for index in range(12):
        env.reset(seed=index, options={"split": "eval", "index": index})
        *first, last = env.oracle()
        assert len(first) + 1 == low + index % (high - low + 1)
        for action in first:
            _, reward, terminated, truncated, info = env.step(action)
            assert (reward, terminated, truncated, info["success"]) == (0.0, False, False, False)
        _, reward, terminated, truncated, info = env.step(last)
        assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
        assert "feedback" not in info


def test_the_prompt_shows_the_board_and_the_system_message_its_symbols():
    _, info = SokobanEnv().reset(seed=3)
    system, user = info["messages"]
    room, state = read(user["content"].removeprefix("Solve this puzzle:\n"))
    assert room.draw(state) in user["content"]
    assert (system["role"], user["role"]) == ("system", "user")
    for symbol in "#_.$*@+":
        assert f"{symbol} " in system["content"]


def test_the_solution_in_words_is_what_to_do():
    for seed in range(10):
        env = SokobanEnv()
        _, info = env.reset(seed=seed)
        lines = [line.removeprefix("move ") for line in info["privileged"]["solution"].split("\n")]
        assert ", ".join(lines).split(", ") == solve(env.board)
        assert [move(env, line)[1] for line in lines] == [0.0] * (len(lines) - 1) + [1.0]
        env = SokobanPushEnv()
        _, info = env.reset(seed=seed)
        steps = re.findall(r"push row (\d), column (\d) (\w+)", info["privileged"]["solution"])
        assert [push(env, *step)[1] for step in steps] == [0.0] * (len(lines) - 1) + [1.0]


def test_the_plan_names_each_box_with_all_its_pushes_in_a_row():
    env = SokobanPushEnv(level=3)
    for seed in range(10):
        _, info = env.reset(seed=seed)
        for line in info["privileged"]["plan"].split("\n"):
            row, column, directions = re.fullmatch(r"push the box at row (\d), column (\d) ([\w, ]+)", line).groups()
            row, column = int(row), int(column)
            for direction in directions.split(", "):
                *_, over, _, info = push(env, row, column, direction)
                row += {"down": 1, "up": -1}.get(direction, 0)
                column += {"right": 1, "left": -1}.get(direction, 0)
        assert over
        assert info["success"]


def test_a_call_makes_one_or_several_moves_and_shows_the_board():
    env = at(BOARD)
    assert move(env, "right")[0] == "######\n#_@__#\n#_$__#\n#___.#\n#____#\n######"
    board, _, terminated, _, info = move(env, "DOWN, left  left")
    assert board == "Error: the way left is blocked; of 3 moves 2 were made\n" + env.board
    assert info["feedback"] == board
    assert not terminated
    assert env.board == "######\n#____#\n#@___#\n#_$_.#\n#____#\n######"


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ("north", "'north' is no direction; the directions are up, down, left, right"),
        ("", "there is no direction;"),
        ("left " * 101, "101 moves are too many for one call; at most 100 are made"),
    ],
)
def test_moves_that_cannot_be_read_are_answered_and_change_nothing(directions, message):
    env = at(BOARD)
    assert message in move(env, directions)[0]
    assert env.board == BOARD


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 3, "up"), "there is no box at row 2, column 3"),
        ((3, 9, "up"), "there is no box at row 3, column 9"),
        ((-3, 3, "up"), "there is no box at row -3, column 3"),
        ((10**30, 3, "up"), "there is no box at row"),
        ((3, 3, "up, up"), "one direction at a time"),
        ((3, 3, "in"), "'in' is no direction"),
    ],
)
def test_a_push_that_cannot_be_made_is_answered_and_changes_nothing(arguments, message):
    env = at(BOARD, SokobanPushEnv)
    text, reward, terminated, _, info = push(env, *arguments)
    assert message in text
    assert (reward, terminated, env.board) == (0.0, False, BOARD)
    assert info["feedback"].startswith("Error: ")


def test_a_push_needs_a_way_behind_the_box_and_a_free_cell_before_it():
    env = at("######\n#@$_.#\n#____#\n######", SokobanPushEnv)
    assert "the way down is blocked" not in push(env, 2, 3, "up")[0]
    assert "no way leads behind that box" in push(env, 2, 3, "down")[0]
    env = at("######\n#@$_.#\n#____#\n######", SokobanPushEnv)
    assert "the way up is blocked" in push(env, 2, 3, "up")[0]


def test_the_player_walks_behind_the_box_by_itself():
    env = at(BOARD, SokobanPushEnv)
    assert push(env, 3, 3, "right")[0] == "######\n#____#\n#_@$_#\n#___.#\n#____#\n######"
    assert push(env, "3", "4", "down")[0] == "######\n#____#\n#__@_#\n#__$.#\n#____#\n######"
    *_, terminated, _, info = push(env, 4, 4, "right")
    assert (terminated, info["success"]) == (True, True)


@pytest.mark.parametrize(
    ("cls", "act"),
    [
        (SokobanEnv, lambda env: move(env, "down, down, right, up, up, up")),  # those after the end are not made
        (SokobanPushEnv, lambda env: push(env, 3, 3, "up")),
    ],
)
def test_a_push_too_many_ends_the_episode_and_the_feedback_names_it(cls, act):
    env = at(BOARD, cls)
    board, reward, terminated, truncated, info = act(env)
    assert board == "######\n#_$__#\n#_@__#\n#___.#\n#____#\n######"
    assert (reward, terminated, truncated, info["success"]) == (0.0, True, False, False)
    assert info["feedback"] == "Lost: the box at row 3, column 3 must not be pushed up."
    with pytest.raises(EnvError, match="no episode running"):
        env.step("")


def test_the_reward_is_one_for_solving_and_nothing_else_by_default():
    env = at(TWO, SokobanPushEnv)
    assert push(env, 3, 3, "down")[1] == 0.0
    assert push(env, 3, 5, "down")[1] == 0.0
    assert push(env, 4, 5, "right")[1] == 1.0


def test_partial_rewards_come_and_go_with_the_boxes_on_goals_and_add_up_to_one():
    env = at(TWO, SokobanPushEnv, partial=0.5)
    rewards = [push(env, 3, 3, "down")[1], push(env, 4, 3, "right")[1], push(env, 4, 4, "left")[1]]
    assert rewards == [0.25, -0.25, 0.25]
    rewards += [push(env, 3, 5, "down")[1], push(env, 4, 5, "right")[1]]
    assert sum(rewards) == 1.0


def test_a_lost_episode_keeps_its_partial_reward():
    env = at(TWO, SokobanPushEnv, partial=0.5)
    rewards = [push(env, 3, 3, "down")[1], push(env, 3, 5, "up")[1]]
    assert not env._running
    assert rewards == [0.25, 0.0]


def test_no_board_nor_an_image_of_it_is_in_two_splits():
    boards = {}
    for split in ("train", "eval", "warm"):
        env = SokobanPushEnv()
        for index in range(200):
            env.reset(seed=index, options={"split": split, "index": index})
            boards.setdefault(split, set()).add(same_under_symmetry(env.board))
    assert all(len(found) > 100 for found in boards.values())
    assert not boards["train"] & boards["eval"]
    assert not boards["train"] & boards["warm"]
    assert not boards["eval"] & boards["warm"]
    assert {task_split(board) for board in boards["eval"]} == {"eval"}


def test_every_puzzle_begins_off_its_goals_and_can_be_lost():
    for level in LEVELS:
        env = SokobanEnv(level=level)
        for seed in range(20):
            env.reset(seed=seed)
            assert not env.state.boxes & env.room.goals
            assert len(env.state.boxes) == env.level.boxes
            assert env.room.width == env.room.height == env.level.size
            assert (env.level.size - 2) ** 2 - len(env.room.floor) == env.level.walls


def test_lengths_are_mixed_nearly_evenly_without_an_index():
    env = SokobanEnv()
    lengths = []
    for seed in range(300):
        env.reset(seed=seed)
        lengths.append(len(env.pushes(env.state)))
    assert all(70 < lengths.count(n) < 130 for n in (1, 2, 3))


def test_a_level_of_ones_own_is_drawn_as_asked():
    env = make("opd/Sokoban-v0", {"level": {"size": 7, "boxes": 3, "walls": 2, "pushes": [4, 4]}}).unwrapped
    env.reset(seed=0)
    assert env.level == Level(size=7, boxes=3, walls=2, pushes=(4, 4))
    assert (len(env.pushes(env.state)), env.room.width, len(env.room.goals)) == (4, 7, 3)


@pytest.mark.parametrize(
    ("level", "message"),
    [
        (9, "level = 9 is unknown. Allowed: 1, 2, 3, 4"),
        ({"size": 6}, "have these fields: size, boxes, walls, pushes"),
        ({"size": 6, "boxes": 1, "walls": 1, "pushes": 3}, "whole numbers, and pushes two of them"),
        ({"size": 6.5, "boxes": 1, "walls": 1, "pushes": [1, 3]}, "whole numbers"),
        ({"size": 3, "boxes": 1, "walls": 0, "pushes": [1, 3]}, "no room for boxes = 1"),
        ({"size": 5, "boxes": 1, "walls": 8, "pushes": [1, 3]}, "no room"),
        ({"size": 6, "boxes": 1, "walls": 1, "pushes": [3, 1]}, "1 or more, in order"),
        ({"size": 10, "boxes": 4, "walls": 1, "pushes": [3, 4]}, "take a smaller size or fewer boxes"),
    ],
)
def test_a_level_that_cannot_be_is_refused(level, message):
    with pytest.raises(ConfigError, match=message):
        SokobanEnv(level=level)


def test_a_partial_reward_above_the_whole_is_refused():
    with pytest.raises(ConfigError, match=r"partial = 1\.5 must be from 0 to 1"):
        SokobanEnv(partial=1.5)


def test_a_level_that_no_room_has_says_so():
    env = SokobanEnv(level={"size": 5, "boxes": 1, "walls": 0, "pushes": [9, 9]})
    with pytest.raises(EnvError, match="no puzzle of 9 pushes was found in split 'train'"):
        env.reset(seed=0)


def test_an_episode_is_truncated_two_turns_after_the_most_pushes():
    env = SokobanEnv()
    env.reset(seed=0)
    assert [env.step("")[3] for _ in range(5)] == [False] * 4 + [True]


def test_the_same_seed_gives_the_same_puzzle_whatever_was_played_before():
    env, other = SokobanEnv(level=4), SokobanEnv(level=4)
    rng = np.random.default_rng(0)
    for seed in range(5):
        _, info = env.reset(seed=seed)
        move(env, str(rng.choice(["up", "left"])))
        assert other.reset(seed=seed)[1] == info


def test_a_note_tells_where_the_goal_lies_and_what_solved_the_puzzle():
    env = at("#######\n#____@#\n#$___.#\n#######")
    assert offset(env.room, env.state) == (0, 4)
    assert note(0, 4, ["right"] * 4) == "Goal 4 right of the box: push right, right, right, right."
    assert note(-1, 2, ["right", "right", "up"]) == "Goal 1 up, 2 right of the box: push right, right, up."
    assert note(2, -1, ["left", "down", "down"]) == "Goal 2 down, 1 left of the box: push left, down, down."
