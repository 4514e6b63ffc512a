"""textarena's games, alone and against an opponent."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from opd.envs import check, make
from opd.envs.adapters import common
from opd.envs.adapters.common import OwnRandom
from opd.errors import ConfigError, EnvError

pytestmark = pytest.mark.slow

GUESS = "textarena:GuessTheNumber-v0"
SECRET = {"privileged": {"solution": "game_number"}, "config": {"max_number": 9999}}


def first_free_cell(observation):
    """Play TicTacToe as an opponent that takes the first free cell."""
    return observation.rsplit("Available Moves: ", 1)[1].split(",")[0].strip("'\n ")


def test_a_real_model_plays_a_game(one_episode):
    trajectory = one_episode(lambda: make("textarena:TowerOfHanoi-v0"), max_turns=4)
    assert "Tower of Hanoi" in trajectory.turns[0].messages[0]["content"]
    assert trajectory.terminated  # the second invalid move in a row ends it
    assert len(trajectory.turns) == 2
    assert "invalid move" in trajectory.turns[1].messages[0]["content"]


def test_a_game_is_won_with_the_reward_that_it_gives(spoken_episode):
    moves = ["[A C]", "[A B]", "[C B]", "[A C]", "[B A]", "[B C]", "[A C]"]
    trajectory = spoken_episode(lambda: make("textarena:TowerOfHanoi-v0"), moves)
    assert (trajectory.terminated, trajectory.truncated, trajectory.reward, trajectory.success) == (
        True,
        False,
        1,
        True,
    )


def test_the_secret_of_a_game_is_for_the_teacher_alone():
    env = make(GUESS, SECRET)
    obs, info = env.reset(seed=3)
    secret = info["privileged"]["solution"]
    assert secret not in obs
    hint = "higher" if int(secret) > 1 else "lower"
    assert env.step("[1]")[0] == f"[GAME] The target number is {hint}."
    _, reward, terminated, _, step = env.step(f"It is [{secret}]")
    assert (reward, terminated, step["success"]) == (1.0, True, True)


def test_only_what_is_new_is_told_and_not_the_model_s_own_words():
    env = make(GUESS, SECRET)
    env.reset(seed=3)
    said = [env.step(f"my guess is [{n}]")[0] for n in (11, 12, 13)]
    assert all(text.count("target number") == 1 and "my guess" not in text for text in said)


@pytest.mark.parametrize("name", ["GuessTheNumber-v0", "2048-v0"])
def test_the_checker_finds_no_error(name):
    findings = check(f"textarena:{name}", SECRET | {"varied": True} if name.startswith("Guess") else {})
    assert [finding for finding in findings if finding.severity != "note"] == []


def test_tasks_that_a_secret_tells_apart_are_in_one_split_each():
    env = make(GUESS, {"privileged": {"solution": "game_number"}, "varied": True})
    seen = {
        split: {env.reset(seed=n, options={"split": split})[1]["privileged"]["solution"] for n in range(60)}
        for split in ("train", "eval")
    }
    assert seen["train"]
    assert seen["eval"]
    assert not seen["train"] & seen["eval"]


def test_a_game_of_one_task_cannot_be_split(monkeypatch):
    monkeypatch.setattr(common, "_DRAWS", 20)
    env = make("textarena:TowerOfHanoi-v0", {"varied": True})
    found, refused = [], []
    for split in ("train", "eval", "warm"):
        try:
            found.append(env.reset(seed=0, options={"split": split}))
        except EnvError as error:
            refused.append(str(error))
    assert len(found) == 1
    assert all("too few different ones" in problem for problem in refused)


def play_2048(seed):
    env = make("textarena:2048-v0")
    boards = [env.reset(seed=seed)[0]]
    boards += [env.step(f"[{move}]")[0] for move in ("Up", "Left", "Down", "Right") * 3]
    return boards


def test_a_seed_decides_a_game_of_chance_whatever_other_threads_draw():
    alone = [play_2048(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(play_2048, range(4)))
    assert together == alone
    assert alone[0] != alone[1]


def test_a_stream_goes_on_where_it_was_whatever_was_drawn_in_between():
    own, expected = OwnRandom(), random.Random(5)
    with own(5):
        drawn = [random.random()]
    random.seed(99)
    with own():
        drawn.append(random.random())
    assert drawn == [expected.random(), expected.random()]


def test_the_global_generator_is_left_as_it_was():
    random.seed(0)
    expected = random.random()
    random.seed(0)
    play_2048(1)
    assert random.random() == expected


def test_an_opponent_plays_the_other_seat(spoken_episode):
    kwargs = {"players": 2, "opponent": first_free_cell}
    trajectory = spoken_episode(lambda: make("textarena:TicTacToe-v0", kwargs), ["[4]", "[1]", "[7]"])
    assert "placed their symbol (X) in cell 0" in trajectory.turns[1].messages[0]["content"]
    assert (trajectory.terminated, trajectory.reward, trajectory.success) == (True, 1.0, True)


def test_a_lost_game_is_an_end_with_the_reward_that_it_gives(spoken_episode):
    kwargs = {"players": 2, "opponent": first_free_cell}
    trajectory = spoken_episode(lambda: make("textarena:TicTacToe-v0", kwargs), ["[8]", "[4]", "[3]"])
    assert (trajectory.terminated, trajectory.reward, trajectory.success) == (True, -1.0, False)


@pytest.mark.parametrize(
    ("name", "kwargs", "problem"),
    [
        ("TicTacTo-v0", {}, 'Did you mean "TicTacToe-v0"'),
        ("TicTacToe-v0", {"players": 2}, "2 players need an opponent"),
        ("GuessTheNumber-v0", {"opponent": "math:sqrt"}, "1 players need no opponent"),
        ("GuessTheNumber-v0", {"config": {"highest": 3}}, "textarena refuses"),
    ],
)
def test_a_mistake_is_named(name, kwargs, problem):
    with pytest.raises(ConfigError, match=problem):
        make(f"textarena:{name}", kwargs)


def test_a_secret_that_the_game_does_not_have_is_named():
    with pytest.raises(EnvError, match="has no 'word'; it has: game_number"):
        make(GUESS, {"privileged": {"solution": "word"}}).reset(seed=0)


def test_a_game_that_could_not_read_a_move_says_so():
    env = make("textarena:GuessTheNumber-v0")
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step("[" + "9" * 5_000 + "]")  # more digits than Python converts
    assert (reward, terminated, info["unreadable"]) == (0.0, True, True)


@pytest.mark.parametrize(
    ("name", "reward", "reason"),
    [
        ("Countdown-v0", 0.568, "Invalid action format"),  # this one and the next two swap the reason and the reward
        ("ThreeCardMonte-v0", 0.0, "Bad action. Use `[k]`."),
        ("Cryptarithm-v0", 0.0, "Bad action format"),
        ("Bandit-v0", -1.0, "An invalid button"),  # names neither
    ],
)
def test_a_second_malformed_move_ends_a_game_with_what_the_game_gives_for_it(name, reward, reason):
    env = make(f"textarena:{name}")
    env.reset(seed=0)
    first = env.step("no move at all")
    obs, given, terminated, _, info = env.step("no move at all")
    assert not first[2]
    assert "invalid move" in first[0]
    assert (terminated, info["unreadable"], info["success"]) == (True, True, False)
    assert reason in obs
    assert given == pytest.approx(reward)
    env.close()
