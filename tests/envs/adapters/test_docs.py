"""What docs/adapters.md shows can be made, and runs where it needs nobody else's server."""

import importlib
import json
import re
import sys
from pathlib import Path

import gymnasium
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

MODULES = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.DOTALL)) | {
    "my_words": "def describe(env, observation):\n    return f'The pole leans by {observation[2]:.2f}.'\n",
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


ID = re.compile(rf"\b(?:{'|'.join(adapters.ADAPTERS)}):[A-Za-z][\w-]*(?:[.:]\w+)*|\bopd/[A-Z]\w+-v\d+")
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.yaml")]
IDS = sorted({found for page in PAGES for found in ID.findall(page.read_text(encoding="utf-8"))})


def known_names(library):
    """Return the names that a library itself knows, and for those that have none the modules on the page."""
    match library:
        case "gymnasium":
            return set(gymnasium.registry)
        case "reasoning_gym":
            return set(importlib.import_module("reasoning_gym.factory").DATASETS)
        case "textarena":
            return set(importlib.import_module("textarena").envs.registration.ENV_REGISTRY)
        case "skyrl_gym":
            return set(importlib.import_module("skyrl_gym.envs.registration").registry)
        case _:
            return {module.replace("_", "-") for module in MODULES} | set(MODULES)


@pytest.mark.parametrize("env_id", IDS)
def test_every_id_in_the_documentation_is_of_an_environment_that_there_is(env_id):
    library, _, name = env_id.partition(":")
    if library in ("mcp", "openenv", "textworld"):  # a command, an address, a folder
        return
    known = known_names(library) if name else set(gymnasium.registry)
    assert (name.partition(":")[0] if name else env_id) in known, f"{env_id} is none of {sorted(known)[:20]}"


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
