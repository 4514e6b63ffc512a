"""Games that TextWorld makes, played through its interpreter."""

import pytest
import textworld

from opd.envs import check, make
from opd.errors import ConfigError

# TextWorld ignores this warning of its interpreter, which knows nothing of games made anew; pytest forgets that.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Game .* is not fully supported")]


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    """Make three small games in train and eval, as `tw-make` writes them."""
    folder = tmp_path_factory.mktemp("games")
    for split, seed in (("train", 1), ("train", 2), ("eval", 3)):
        options = textworld.GameOptions()
        options.seeds, options.nb_rooms, options.nb_objects, options.quest_length = seed, 2, 2, 2
        options.path = str(folder / split / f"{seed}.z8")
        (folder / split).mkdir(exist_ok=True)
        textworld.make(options)
    return folder


def test_a_real_model_plays_it(one_episode, games):
    trajectory = one_episode(lambda: make(f"textworld:{games}"), max_turns=3)
    assert trajectory.truncated  # it babbles on until our limit
    assert trajectory.reward == 0.0
    assert "-=" in trajectory.turns[0].messages[0]["content"]  # a room's name
    assert trajectory.privileged["solution"]


def test_the_walkthrough_wins_the_game(spoken_episode, games):
    name = f"textworld:{games / 'train' / '1.z8'}"
    commands = make(name).reset(seed=0)[1]["privileged"]["solution"].split("\n")
    trajectory = spoken_episode(lambda: make(name), [f"I think.\n> {command}" for command in commands])
    assert (trajectory.terminated, trajectory.truncated) == (True, False)
    assert (trajectory.reward, trajectory.success) == (1.0, True)


def test_folders_are_splits(games):
    env = make(f"textworld:{games}")
    assert env.metadata["tasks"] == {"train": 2, "eval": 1}
    texts = [env.reset(seed=0, options={"split": "train", "index": index})[0] for index in (0, 1)]
    texts.append(env.reset(seed=0, options={"split": "eval", "index": 0})[0])
    assert len(set(texts)) == 3
    assert env.reset(seed=1, options={"split": "train", "index": 0})[0] == texts[0]


def test_what_is_asked_for_is_shown_and_the_banner_is_not(games):
    env = make(f"textworld:{games / 'train' / '1.z8'}", {"config": {"admissible_commands": True}})
    obs, info = env.reset(seed=0)
    first = info["privileged"]["solution"].split("\n")[0]
    assert first in obs.split("admissible commands: ")[1].split(", ")
    assert "$$" not in obs
    assert ">" not in obs


@pytest.mark.parametrize("command", ["quit", "SAVE", "look. quit", "go east then restart", "\\s quit", "save\n"])
def test_commands_to_the_interpreter_do_not_reach_it(games, command):
    env = make(f"textworld:{games / 'train' / '1.z8'}")
    env.reset(seed=0)
    env.step("quit")
    obs, reward, terminated, *_ = env.step(command)
    assert (reward, terminated) == (0.0, False)
    assert "not available" in obs or "s quit" in command
    assert "-=" in env.step("look")[0]  # the game is still there


def test_any_text_is_a_command(games):
    env = make(f"textworld:{games / 'train' / '1.z8'}")
    env.reset(seed=0)
    for text in ("", "é漢字😀\0", "x" * 100_000, "\\", "\ud83d", "$ # %"):
        assert env.step(text)[2:4] == (False, False)


def test_the_checker_finds_no_error(games):
    findings = check(f"textworld:{games}")
    assert [finding for finding in findings if finding.severity == "error"] == []


def test_a_mistake_is_named(games, tmp_path):
    with pytest.raises(ConfigError, match="is neither a Z-machine story"):
        make(f"textworld:{games / 'train' / '1.json'}")
    with pytest.raises(ConfigError, match="has no train games"):
        make(f"textworld:{tmp_path}")
    with pytest.raises(ConfigError, match=r"EnvInfos has no 'commands'"):
        make(f"textworld:{games}", {"config": {"commands": True}})
