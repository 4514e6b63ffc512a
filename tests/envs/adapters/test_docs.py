"""What docs/adapters.md shows can be made, and runs where it needs nobody else's server."""

import json
import re
import sys
from pathlib import Path

import pytest
import textworld
import yaml

from opd.envs import adapters, make
from opd.episodes.config import EnvConfig

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
SETTINGS = [yaml.safe_load(block)["env"] for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
CONFIGS = [EnvConfig(**setting) if isinstance(setting, dict) else EnvConfig(id=setting) for setting in SETTINGS]

# TextWorld ignores this warning of its interpreter, which knows nothing of games made anew; pytest forgets that.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Game .* is not fully supported")]

MODULES = {
    "my_words": "def describe(env, observation):\n    return f'The pole leans by {observation[2]:.2f}.'\n",
    "my_counter": '''
class Counter:
    def reset(self, target=3, **row):
        self.count, self.target = 0, target

    def add(self, amount: int) -> int:
        """Add to the counter.

        Args:
            amount: how much
        """
        self.count += amount
        return self.count

    def get_reward(self):
        return float(self.count == self.target)
''',
    "reverse_words": """
import verifiers.v1 as vf

__all__ = ["ReverseTaskset"]


class ReverseData(vf.TaskData):
    answer: str


class ReverseConfig(vf.TasksetConfig):
    words: list[str]


class ReverseTask(vf.Task[ReverseData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(self.data.answer in trace.last_reply)


class ReverseTaskset(vf.Taskset[ReverseTask, ReverseConfig]):
    def load(self):
        for word in self.config.words:
            yield ReverseTask(ReverseData(prompt=f"{word} backwards?", answer=word[::-1]), self.config.task)
""",
}
ROWS = {
    "rows.jsonl": [{"prompt": f"Count to {n}.", "target": n, "plan": f"add {n}"} for n in range(40)],
    "shop.jsonl": [{"prompt": f"What do {n} pears cost?", "answer": 5 * n, "way": f"5 x {n}"} for n in range(40)],
    "gsm8k.jsonl": [
        {
            "prompt": f"{n} + 1?",
            "reward_spec": {"ground_truth": str(n + 1)},
            "extra_info": {},
            "answer": f"#### {n + 1}",
        }
        for n in range(40)
    ],
}


@pytest.fixture
def where_the_page_runs(tmp_path, monkeypatch):
    """Make a folder with the files that the page names, and a `python` that is this one."""
    for name, source in MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
    for name, rows in ROWS.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    return tmp_path


def test_every_library_is_on_the_page():
    shown = {config.id.partition(":")[0] for config in CONFIGS}
    assert shown == set(adapters.ADAPTERS)
    for library, adapter in adapters.ADAPTERS.items():
        assert f"| `{library}` | {f'`{adapter.extra}`' if adapter.extra else 'none'} |" in PAGE


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.id)
def test_a_setting_on_the_page_begins_and_plays(config, where_the_page_runs):
    if config.id.startswith("textworld"):
        (where_the_page_runs / "games").mkdir()
        options = textworld.GameOptions()
        options.seeds, options.nb_rooms, options.quest_length = 1, 2, 1
        options.path = str(where_the_page_runs / "games" / "1.z8")
        textworld.make(options)
    env = make(config.id, config.kwargs)
    try:
        if config.id.startswith("openenv"):
            return  # it connects at reset
        _, info = env.reset(seed=0)
        assert info["privileged"] or "CartPole" in config.id
        _, reward, terminated, truncated, _ = env.step("right")
        assert (type(reward), type(terminated), type(truncated)) == (float, bool, bool)
    finally:
        env.close()
