"""Ids and import paths make environments; what cannot is told with the nearest name, before torch is loaded."""

import subprocess
import sys

import gymnasium
import pytest

from opd.envs import TextSpace, list_envs, make, validate_id
from opd.envs.worlds.arithmetic import ArithmeticEnv
from opd.errors import ConfigError

# Found by its import path: tests are no package, so the module is put where an import finds it.
sys.modules["factory_fixtures"] = sys.modules[__name__]


class Plain(gymnasium.Env):
    def __init__(self, greeting="hi"):
        self.observation_space = self.action_space = TextSpace()
        self.greeting = greeting

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.greeting, {"privileged": {"a": "b"}, "tools": [], "feedback": "f"}

    def step(self, action):
        return action, 0.0, False, False, {"success": False, "anything": [1, {"x": 2}]}


class Required(Plain):
    def __init__(self, greeting):
        super().__init__(greeting)


class Open(Plain):
    def __init__(self, **anything):
        super().__init__(anything["greeting"])


class Unfinished(gymnasium.Env):
    pass


def test_ours_are_listed():
    assert {"opd/Arithmetic-v0", "opd/Dataset-v0", "opd/Lookup-v0"} <= set(list_envs())


def test_a_registered_id_is_made_with_its_arguments():
    env = make("opd/Arithmetic-v0", {"digits": 3})
    assert isinstance(env.unwrapped, ArithmeticEnv)
    assert env.unwrapped.digits == 3


def test_an_import_path_is_made_as_it_is():
    env = make("opd.envs.worlds.arithmetic:ArithmeticEnv", {"digits": 3})
    assert type(env) is ArithmeticEnv
    assert make("factory_fixtures:Open", {"greeting": "ho"}).greeting == "ho"


def test_an_id_that_a_module_registers_is_found_through_the_module(tmp_path, monkeypatch):
    lines = "import gymnasium\ngymnasium.register('factory-test/Late-v0', entry_point='factory_fixtures:Plain')\n"
    (tmp_path / "late_registration.py").write_text(lines)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="'factory-test/Late-v0' is unknown"):
        make("factory-test/Late-v0")
    assert make("late_registration:factory-test/Late-v0", {"greeting": "ho"}).reset(seed=0)[0] == "ho"
    with pytest.raises(ConfigError, match=r'Did you mean "factory-test/Late-v0"\?'):
        make("late_registration:factory-test/Lat-v0")


def test_info_and_metadata_survive_the_wrappers():
    gymnasium.register("factory-test/Plain-v0", entry_point=Plain, max_episode_steps=2, kwargs={"greeting": "hello"})
    env = make("factory-test/Plain-v0")
    assert "PassiveEnvChecker" not in str(env)
    assert env.reset(seed=0) == ("hello", {"privileged": {"a": "b"}, "tools": [], "feedback": "f"})
    assert env.step("x") == ("x", 0.0, False, False, {"success": False, "anything": [1, {"x": 2}]})
    assert env.step("x")[2:4] == (False, True)  # its author's time limit
    assert make("opd/Arithmetic-v0").metadata["tasks"] == {"train": None, "eval": None, "warm": None}


@pytest.mark.parametrize(
    ("env_id", "reason"),
    [
        ("opd/Arithmetc-v0", r'unknown. Ours: opd/Arithmetic-v0, .*Did you mean "opd/Arithmetic-v0"\?'),
        ("Arithmetic", "'Arithmetic' is unknown"),
        ("", "'' is unknown"),
        (
            "no_such_package:Env",
            "names the module 'no_such_package', which cannot be found. Is its folder on PYTHONPATH",
        ),
        ("opd.envs.nothing:Env", "names the module 'opd.envs.nothing', which cannot be found"),
        (
            "opd.envs.worlds.arithmetic.deeper:Env",
            "names the module 'opd.envs.worlds.arithmetic.deeper', which cannot be found",
        ),
        ("json.decoder.json:Env", "which cannot be found"),
        ("json.decoder.x.y:Env", "which cannot be found"),
        ("opd.envs.worlds.arithmetic:", "is unknown"),
        (":Env", "is unknown"),
    ],
)
def test_an_id_that_leads_nowhere_is_told_by_name(env_id, reason):
    for function in (validate_id, make):
        with pytest.raises(ConfigError, match=reason):
            function(env_id)


@pytest.mark.parametrize(
    "env_id", ["opd/Arithmetic-v0", "opd.envs.worlds.lookup:LookupEnv", "json.decoder:Env", "xml.dom:E"]
)
def test_a_good_id_is_valid(env_id):
    validate_id(env_id)


@pytest.mark.parametrize(
    ("env_id", "kwargs", "reason"),
    [
        ("opd/Arithmetic-v0", {"digit": 1}, r"takes no 'digit'. Allowed: operators, .*Did you mean \"digits\"\?"),
        ("opd/Dataset-v0", {"path": "x"}, "missing a required argument: 'rewards'"),
        ("opd.envs.worlds.arithmetic:Arithmetic", {}, "has no attribute 'Arithmetic'"),
        ("factory_fixtures:Plain", {"greet": 1}, r"Did you mean \"greeting\"\?"),
        ("factory_fixtures:Unfinished", {}, "has observation_space = None; it must be text"),
        ("FrozenLake-v1", {}, r"has observation_space = Discrete\(16\); it must be text"),
        ("pathlib:Path", {}, "makes a PosixPath, which is no gymnasium.Env"),
    ],
)
def test_what_makes_no_text_environment_is_refused(env_id, kwargs, reason):
    with pytest.raises(ConfigError, match=reason):
        make(env_id, kwargs)


def test_an_argument_that_the_registration_gives_need_not_be_given_again():
    gymnasium.register("factory-test/Required-v0", entry_point=Required, kwargs={"greeting": "hey"})
    assert make("factory-test/Required-v0").reset(seed=0)[0] == "hey"
    assert make("factory-test/Required-v0", {"greeting": "ho"}).reset(seed=0)[0] == "ho"


def test_gymnasiums_own_text_space_is_accepted():
    class Ascii(Plain):
        def __init__(self):
            super().__init__()
            self.observation_space = self.action_space = gymnasium.spaces.Text(100)

    gymnasium.register("factory-test/Ascii-v0", entry_point=Ascii)
    assert make("factory-test/Ascii-v0").reset(seed=0)[0] == "hi"


def imported_by(code):
    heavy = "('torch', 'datasets', 'transformers', 'trl', 'opd.envs.worlds.lookup', 'xml.dom', 'user_torch')"
    code = f"{code}\nimport sys\nprint([name for name in {heavy} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_nothing_heavy_is_imported_to_validate_list_or_play():
    assert imported_by("import opd.envs, opd.rewards") == "[]"
    assert imported_by("from opd.envs import *; list_envs(); validate_id('opd/Lookup-v0')") == "[]"
    assert (
        imported_by("from opd.envs import *; make('opd/Arithmetic-v0').reset(seed=0); check('opd/Arithmetic-v0')")
        == "[]"
    )
    assert imported_by("from opd.envs import *; validate_id('xml.dom.minidom:Env')") == "[]"


def test_a_jsonl_table_needs_no_datasets(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}", "answer": "{i}"}}\n' for i in range(50)))
    assert (
        imported_by(
            f"from opd.envs import *; make('opd/Dataset-v0', dict(path={str(path)!r}, rewards=['exact_match']))"
        )
        == "[]"
    )
