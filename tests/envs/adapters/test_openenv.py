"""A real OpenEnv server in a process of its own, made from the package's own template, over its own protocol."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opd.envs import make
from opd.errors import ConfigError, EnvError

pytestmark = pytest.mark.slow

PACKAGES = Path(sys.prefix) / "openenv-server"
WORDS = {"__ENV_NAME__": "echo", "__ENV_CLASS_NAME__": "Echo", "__ENV_TITLE_NAME__": "Echo"}

# An environment of the package's own classes that ends, refuses, breaks and hangs.
GUESS = """\
import time
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Guess(Action):
    number: int


class Hint(Observation):
    hint: str = ""


class GuessEnvironment(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, highest=9, **kwargs):
        self.secret = seed % highest + 1
        return Hint(hint=f"From 1 to {highest}.")

    def step(self, action, timeout_s=None, **kwargs):
        if action.number == 666:
            raise RuntimeError("the devil")
        if action.number == 777:
            time.sleep(20)
        if action.number == 888:
            return Hint(hint="x" * 5_000_000)
        if action.number == self.secret:
            return Hint(hint="yes", done=True, reward=1.0, metadata={"secret": self.secret})
        if action.number == 99:
            return Hint(hint="no more", done=True)
        return Hint(hint="higher" if action.number < self.secret else "lower", reward=-0.1)

    @property
    def state(self):
        return State()


app = create_app(GuessEnvironment, Guess, Hint, env_name="guess", max_concurrent_envs=8)
"""


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Start the template's server and the guessing one; return their addresses."""
    folder = tmp_path_factory.mktemp("server")
    _write_template(folder)
    (folder / "guess.py").write_text(GUESS)
    started = {}
    try:
        for app in ("server.app", "guess"):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command = [sys.executable, "-m", "uvicorn", f"{app}:app", "--host", "127.0.0.1", "--port", str(port)]
            env = {**os.environ, "PYTHONPATH": str(PACKAGES)}
            with (folder / f"{app}.log").open("w") as log:
                started[app] = port, subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
        for app, (port, process) in started.items():
            _wait_for(port, process, folder / f"{app}.log")
        yield {app: f"openenv:http://127.0.0.1:{port}" for app, (port, _) in started.items()}
    finally:
        for _, process in started.values():
            process.kill()
            process.wait()


def _write_template(folder):
    """Write what `openenv init echo` writes."""
    template = PACKAGES / "openenv" / "cli" / "templates" / "openenv_env"
    assert template.is_dir(), "make installs the OpenEnv server: see requirements/openenv-server.txt"
    for file in ("models.py", "server/__init__.py", "server/app.py", "server/__ENV_NAME___environment.py"):
        text = (template / file).read_text()
        target = file
        for placeholder, word in WORDS.items():
            text, target = text.replace(placeholder, word), target.replace(placeholder, word)
        text = text.replace("max_concurrent_envs=1,", "max_concurrent_envs=8,")  # as its comment says
        (folder / target).parent.mkdir(exist_ok=True)
        (folder / target).write_text(text)


def _wait_for(port, process, log):
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"no server after 60 s: {log.read_text()}")


def test_a_real_model_plays_the_template_of_openenv(one_episode, servers):
    kwargs = {"observation": "echoed_message", "prompt": "Say something."}
    trajectory = one_episode(lambda: make(servers["server.app"], kwargs), max_turns=3)
    assert trajectory.turns[0].messages[0]["content"] == "Say something.\n\nEcho environment ready!"
    assert trajectory.truncated  # it never ends by itself
    for turn, after in zip(trajectory.turns, trajectory.turns[1:], strict=False):
        assert after.messages[0]["content"] == turn.text
        assert turn.reward == pytest.approx(min(0.1 * len(turn.text), 1.0))


def test_a_server_that_says_done_ends_the_episode(spoken_episode, servers):
    texts = [f'I say {{"number": {n}}}.' for n in range(1, 10)]
    kwargs = {"action": "json", "observation": "hint"}
    trajectory = spoken_episode(lambda: make(servers["guess"], kwargs), texts)
    assert trajectory.turns[0].messages[0]["content"] == "From 1 to 9."
    assert trajectory.terminated
    misses = len(trajectory.turns) - 1
    assert trajectory.reward == pytest.approx(1.0 - 0.1 * misses)


def test_metadata_stands_beside_the_episode_and_an_end_without_any_reward_is_unscored(servers):
    env = make(servers["guess"], {"action": "json", "observation": "hint"})
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step('{"number": 99}')
    assert (reward, terminated, info["success"], info["unscored"]) == (0.0, True, False, True)
    env.reset(seed=0)
    for n in range(1, 10):
        *_, terminated, _, info = env.step(f'{{"number": {n}}}')
        if terminated:
            break
    assert info["notes"] == {"secret": n}
    assert "unscored" not in info
    env.close()


def test_the_seed_and_the_settings_reach_the_server(servers):
    env = make(servers["guess"], {"action": "json", "observation": "hint", "config": {"highest": 3}})
    outcomes = []
    for seed in (0, 0, 1, 2, 3, 4):
        assert env.reset(seed=seed)[0] == "From 1 to 3."
        outcomes.append(env.step('{"number": 2}')[0])
    env.close()
    assert outcomes[0] == outcomes[1]
    assert len(set(outcomes)) > 1


def test_sessions_do_not_disturb_each_other(servers):
    one, other = (make(servers["guess"], {"action": "json", "observation": "hint"}) for _ in range(2))
    one.reset(seed=0)
    before = [one.step(f'{{"number": {n}}}')[0] for n in (1, 9)]
    one.reset(seed=0)
    other.reset(seed=3)
    other.step('{"number": 5}')
    assert [one.step(f'{{"number": {n}}}')[0] for n in (1, 9)] == before
    one.close()
    other.close()


@pytest.mark.parametrize("text", ["no object", '{"number": "many"}', '{"wrong": 1}', '{"number": 666}', "{" * 5000])
def test_a_refused_action_is_answered_and_the_episode_goes_on(servers, text):
    env = make(servers["guess"], {"action": "json", "observation": "hint"})
    env.reset(seed=0)
    obs, reward, terminated, _, info = env.step(text)
    assert obs.startswith("Error: ")
    assert (reward, terminated, info["feedback"]) == (0.0, False, obs)
    assert env.step('{"number": 0}')[0] == "higher"
    env.close()


@pytest.mark.parametrize("number", [777, 888])
def test_a_late_or_huge_answer_fails_the_episode_and_the_next_one_is_clean(servers, number):
    env = make(servers["guess"], {"action": "json", "observation": "hint", "reply_timeout": 5.0})
    env.reset(seed=0)
    with pytest.raises(EnvError, match="did not answer a step"):
        env.step(f'{{"number": {number}}}')
    assert env.reset(seed=0)[0] == "From 1 to 9."
    env.close()


def test_where_no_server_is_the_episode_fails():
    with pytest.raises(EnvError, match=r"no OpenEnv server at ws://127\.0\.0\.1:9/ws"):
        make("openenv:http://127.0.0.1:9").reset(seed=0)


def test_a_mistake_is_named(servers):
    with pytest.raises(ConfigError, match="'localhost' is no address of a server"):
        make("openenv:localhost")
    with pytest.raises(EnvError, match="the server tells no 'hnt', but: hint"):
        make(servers["guess"], {"observation": "hnt"}).reset(seed=0)
