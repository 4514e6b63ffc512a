"""Environments of `verifiers.v1`, whose own `run` leads the exchange."""

import pytest
import verifiers.v1 as vf

from opd.envs import check, make
from opd.errors import ConfigError, EnvError

pytestmark = pytest.mark.slow

WORDS = ["abc", "stone", "river", "tree", "house", "mouse", "horse", "cloud", "water", "bread", "candle", "lamp"]

REVERSE = """
import verifiers.v1 as vf

__all__ = ["ReverseTaskset"]


class ReverseData(vf.TaskData):
    answer: str


class ReverseConfig(vf.TasksetConfig):
    words: list[str]


class ReverseTask(vf.Task[ReverseData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        return float(self.data.answer in trace.last_reply)

    @vf.reward(weight=0.5)
    async def short(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply) < 10)


class ReverseTaskset(vf.Taskset[ReverseTask, ReverseConfig]):
    def load(self):
        for word in self.config.words:
            data = ReverseData(prompt=f"Write {word} backwards.", system_prompt="Be short.", answer=word[::-1])
            yield ReverseTask(data, self.config.task)
"""

# The environment is verifiers' own for textarena's games; its taskset offers only games that need a download.
GAME = """
import verifiers.v1 as vf
from verifiers.v1.tasksets.textarena.taskset import TextArenaData, TextArenaEnv, TextArenaTask

__all__ = ["GuessTaskset", "TextArenaEnv"]


class GuessTaskset(vf.Taskset[TextArenaTask, vf.TasksetConfig]):
    INFINITE = True

    def load(self):
        seed = 0
        while True:
            info = {"game": "GuessTheNumber-v0", "seed": seed}
            yield TextArenaTask(TextArenaData(prompt=f"Game {seed}: guess, as [5].", info=info), self.config.task)
            seed += 1
"""

TOOLS = """
import verifiers.v1 as vf

__all__ = ["NeedyTaskset"]


class NeedyTask(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def files(self, trace: vf.Trace, runtime) -> float:
        return 1.0


class NeedyTaskset(vf.Taskset[NeedyTask, vf.TasksetConfig]):
    def load(self):
        yield NeedyTask(vf.TaskData(prompt="?"), self.config.task)
"""


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    for name, source in (("spell_backwards", REVERSE), ("guess_game", GAME), ("needy_files", TOOLS)):
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)


def reverse(**kwargs):
    settings = {"config": {"words": WORDS}, "privileged": {"solution": "answer"}}
    return make("verifiers:spell-backwards", {**settings, **kwargs})


def test_a_real_model_plays_a_taskset(one_episode):
    trajectory = one_episode(reverse)
    assert trajectory.terminated
    assert trajectory.reward in (0.0, 0.5)
    assert [message["role"] for message in trajectory.turns[0].messages] == ["system", "user"]
    assert trajectory.privileged["solution"][::-1] in WORDS


def test_a_real_model_plays_the_environment_that_verifiers_ships(one_episode):
    trajectory = one_episode(lambda: make("verifiers:guess-game"), max_turns=3)
    assert "invalid move" in trajectory.turns[1].messages[0]["content"]
    assert trajectory.terminated  # after the second one
    assert len(trajectory.turns) == 2


def test_the_rewards_are_those_of_the_task_with_its_weights():
    env = reverse()
    for answer, expected in (("{}", 1.5), ("It is spelt {} I think", 1.0), ("?", 0.5), ("I do not know it", 0.0)):
        _, info = env.reset(seed=1)
        _, reward, terminated, _, step = env.step(answer.format(info["privileged"]["solution"]))
        assert (reward, terminated, step["success"]) == (expected, True, expected >= 1)
        assert step["rewards"] == {"right": float(expected >= 1), "short": float(expected in (0.5, 1.5))}
    env.close()


def test_an_exchange_of_many_turns_is_led_by_the_environment(spoken_episode):
    texts = [f"I guess [{n}]" for n in range(1, 9)]
    trajectory = spoken_episode(lambda: make("verifiers:guess-game"), texts)
    assert trajectory.terminated or trajectory.truncated
    assert all("target number" in turn.messages[0]["content"] for turn in trajectory.turns[1:])


def test_no_task_is_in_two_splits():
    env = reverse()
    counts = env.metadata["tasks"]
    assert sum(counts.values()) == len(WORDS)
    seen = {
        split: {env.reset(seed=0, options={"split": split, "index": index})[0] for index in range(count)}
        for split, count in counts.items()
    }
    assert set(seen) == {"train", "eval"}
    assert not seen["train"] & seen["eval"]
    env.close()


def test_an_episode_that_is_cut_does_not_disturb_the_next():
    env = make("verifiers:guess-game")
    first = env.reset(seed=0)
    env.step("[1]")
    assert env.reset(seed=0) == first
    env.close()


@pytest.mark.parametrize("name", ["spell-backwards", "guess-game"])
def test_the_checker_finds_nothing_to_mend(name):
    kwargs = {"config": {"words": WORDS}, "privileged": {"solution": "answer"}} if name == "spell-backwards" else {}
    assert [finding for finding in check(f"verifiers:{name}", kwargs) if finding.severity != "note"] == []


def test_what_needs_verifiers_own_rollouts_is_refused():
    with pytest.raises(ConfigError, match="needs hooks that get a runtime, or stop an exchange, which only verifiers'"):
        make("verifiers:needy-files")


def test_a_mistake_is_named():
    with pytest.raises(ConfigError, match="verifiers cannot load the taskset 'reverse-wrds'"):
        make("verifiers:reverse-wrds")
    with pytest.raises(ConfigError, match="cannot load the taskset 'spell-backwards'"):
        make("verifiers:spell-backwards", {"config": {"wrds": []}})
    with pytest.raises(EnvError, match="the task's data has no 'solution'"):
        reverse(privileged={"solution": "solution"}).reset(seed=0)


def test_the_seat_offers_what_the_environment_uses_of_an_agent():
    assert {"run", "interaction"} <= set(dir(vf.Agent))
