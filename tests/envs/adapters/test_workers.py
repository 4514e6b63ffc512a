"""Environments of other libraries whose code may take a process along have one of their own by default."""

import pytest

from opd.envs.adapters import ADAPTERS, workers_for
from opd.episodes.config import EnvConfig


@pytest.mark.parametrize(
    ("env_id", "kwargs", "workers"),
    [
        *((f"{library}:x", {}, "processes" if library == "textworld" else "threads") for library in ADAPTERS),
        ("skyrl_gym:search", {"unprotected": True}, "processes"),
        ("verifiers:x", {"unprotected": True}, "processes"),
        ("opd/Lookup-v0", {}, "threads"),
        ("my_package.my_module:MyEnv", {"unprotected": True}, "threads"),
    ],
)
def test_an_environment_lives_where_its_code_can_hurt_nobody(env_id, kwargs, workers):
    assert EnvConfig(id=env_id, kwargs=kwargs).workers == "auto"
    assert workers_for(env_id, kwargs) == workers
