"""Adapted environments are named LIBRARY:NAME, and an error says where a package is missing.

Nothing is imported for it.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from opd.envs import adapters, make, validate_id
from opd.episodes.config import EnvConfig
from opd.errors import ConfigError

ROOT = Path(__file__).parents[3]


def test_names_are_checked_without_importing_a_library():
    program = (
        "import sys, opd.envs\n"
        "from opd.envs.adapters import ADAPTERS\n"
        "for library in ADAPTERS:\n"
        "    opd.envs.validate_id(f'{library}:anything')\n"
        "heavy = {'torch', *(adapter.package for adapter in ADAPTERS.values())} - {'gymnasium'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("library", [name for name, adapter in adapters.ADAPTERS.items() if adapter.extra])
def test_a_missing_package_is_named_with_the_extra_that_installs_it(library, monkeypatch):
    monkeypatch.setattr("opd.envs.adapters.importlib.util.find_spec", lambda name: None)
    extra = adapters.ADAPTERS[library].extra
    with pytest.raises(ConfigError, match=rf"pip install 'opd\[{extra}\]'"):
        validate_id(f"{library}:anything")
    with pytest.raises(ConfigError, match=rf"opd\[{extra}\]"):
        make(f"{library}:anything")


def test_every_extra_that_is_named_exists():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {adapter.extra for adapter in adapters.ADAPTERS.values()} - {None} <= set(declared)


@pytest.mark.parametrize("library", adapters.ADAPTERS)
def test_a_library_without_a_name_is_refused(library):
    with pytest.raises(ConfigError, match="must go on after the colon with"):
        validate_id(f"{library}:")


def test_an_import_path_is_still_an_import_path():
    assert adapters.find("opd.envs.worlds.lookup:LookupEnv") is None
    assert adapters.find("opd/Lookup-v0") is None
    assert make("opd.envs.worlds.lookup:LookupEnv").reset(seed=0)


def test_a_run_s_settings_take_it_as_one_string_or_with_arguments():
    assert EnvConfig(id="gymnasium:Taxi-v4").id == "gymnasium:Taxi-v4"
    kwargs = {"config": {"is_rainy": True}}
    assert make("gymnasium:Taxi-v4", EnvConfig(id="gymnasium:Taxi-v4", kwargs=kwargs).kwargs).reset(seed=0)
