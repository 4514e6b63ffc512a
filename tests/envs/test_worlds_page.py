"""The page docs/worlds.md is true: its settings are settings, and its episodes can be played."""

import json
import re
from pathlib import Path

import pytest
import yaml

from opd.envs import list_envs, make
from opd.envs.worlds.sokoban import LEVELS
from opd.episodes.config import EnvConfig

PAGE = (Path(__file__).parents[2] / "docs" / "worlds.md").read_text(encoding="utf-8")
EPISODE = r"```yaml\n(.*?)```\n\n```text\nseed (\d+), task (\d+) of the (\w+) split\n(.*?)\n```"
EPISODES = re.findall(EPISODE, PAGE, re.DOTALL)


def as_call(env, action):
    """Turn `move up, right` into the call of that tool; only the last argument may hold commas."""
    name, _, values = action.partition(" ")
    tool = next(tool["function"] for tool in env.unwrapped.tool_schemas() if tool["function"]["name"] == name)
    arguments = list(tool["parameters"]["properties"])
    parts = values.split(", ", len(arguments) - 1)
    return f"<tool_call>{json.dumps({'name': name, 'arguments': dict(zip(arguments, parts, strict=True))})}</tool_call>"


@pytest.mark.parametrize(("settings", "seed", "index", "split", "text"), EPISODES)
def test_an_episode_on_the_page_goes_as_it_is_shown(settings, seed, index, split, text):
    config = EnvConfig(**yaml.safe_load(settings)["env"])
    env = make(config.id, config.kwargs)
    _, info = env.reset(seed=int(seed), options={"split": split, "index": int(index)})
    first, *turns = text.split("\n> ")
    assert info["messages"][-1]["content"] == first
    for turn in turns:
        action, _, shown = turn.partition("\n")
        observation, _, over, _, info = env.step(as_call(env, action))
        assert observation == shown
    assert over
    assert info["success"]
    env.close()


def test_the_page_shows_an_episode_of_three_worlds_and_names_all():
    assert len(EPISODES) == 3
    worlds = {env for env in list_envs() if re.match("opd/(Sokoban|Countdown|Sql)", env)}
    assert len(worlds) == 5
    assert set(re.findall(r"`(opd/\w+-v0)`", PAGE)) >= worlds


def test_the_levels_of_sokoban_are_those_of_the_table():
    rows = re.findall(r"\| (\d)[^|]*\| (\d)×\d \| (\d) \| (\d) \| (\d+) to (\d+) \|", PAGE)
    shown = {int(level): tuple(map(int, rest)) for level, *rest in rows}
    assert shown == {n: (x.size, x.boxes, x.walls, *x.pushes) for n, x in LEVELS.items()}
