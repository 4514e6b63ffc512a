"""Adapts other people's environments, unchanged. Each is named `LIBRARY:NAME`; NAME is the library's own name for it.

    env: gymnasium:FrozenLake-v1
    env: {id: "textarena:GuessTheNumber-v0", kwargs: {config: {max_number: 9}}}

In every adapter `config` holds the arguments of the library's own constructor; the other arguments are ours.
Nothing of a library is imported before one of its environments is made (docs/adapters.md).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from opd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Adapter:
    """Says how the environments of one library are made."""

    entry_point: str
    """A `gymnasium.Env` class whose first argument is the NAME."""
    package: str
    """The package that must be importable."""
    extra: str | None
    """Our extra that installs it; None for what is always there."""
    named: str
    """What a NAME is, in words."""
    in_process: bool = False
    """True if an environment should have a process of its own: code that is not Python reads the model's text."""

    def require(self) -> None:
        """Raise ConfigError, which names the extra, unless the package is installed. Imports nothing."""
        if importlib.util.find_spec(self.package) is None:
            raise ConfigError(
                f"env.id: this environment needs the package {self.package}, which is not installed: "
                f"pip install 'opd[{self.extra}]'"
            )


ADAPTERS = {
    "gymnasium": Adapter("opd.envs.adapters.discrete:DiscreteEnv", "gymnasium", None, "an id of discrete actions"),
    "mcp": Adapter("opd.envs.adapters.mcp:McpEnv", "mcp", "mcp", "the command that starts the server, or its URL"),
    "openenv": Adapter("opd.envs.adapters.openenv:OpenEnv", "websockets", "openenv", "the address of a server"),
    "reasoning_gym": Adapter(
        "opd.envs.adapters.reasoning_gym:ReasoningGymEnv", "reasoning_gym", "reasoning-gym", "the name of a data set"
    ),
    "skyrl_gym": Adapter(
        "opd.envs.adapters.skyrl_gym:SkyRLGymEnv", "skyrl_gym", "skyrl-gym", "the id of an environment"
    ),
    "textarena": Adapter("opd.envs.adapters.textarena:TextArenaEnv", "textarena", "textarena", "the id of a game"),
    "textworld": Adapter(
        "opd.envs.adapters.textworld:TextWorldEnv", "textworld", "textworld", "a .z8 file or a folder of them", True
    ),
    "trl": Adapter("opd.envs.adapters.trl:TrlEnv", "trl", None, "an import path, my_package.my_module:MyEnvironment"),
    "verifiers": Adapter("opd.envs.adapters.verifiers:VerifiersEnv", "verifiers", "verifiers", "the id of a taskset"),
}


def workers_for(env_id: str, kwargs: Mapping[str, Any]) -> Literal["threads", "processes"]:
    """Return where an environment lives unless the user says so (`env.workers: auto`).

    One of a library lives in a process of its own where its code may crash or hang on the model's text outside of a
    locked process; where the system cannot fork, none does.
    """
    found = find(env_id)
    wanted = found is not None and (found[0].in_process or bool(kwargs.get("unprotected")))
    return "processes" if wanted and hasattr(os, "fork") else "threads"


def forms() -> list[str]:
    """Say how the environments of each library are named, one line for each library."""
    width = max(map(len, ADAPTERS)) + len(":NAME")
    return [f"{f'{library}:NAME':{width}}  {adapter.named}" for library, adapter in ADAPTERS.items()]


def find(env_id: str) -> tuple[Adapter, str] | None:
    """Return the adapter that an id asks for and the NAME in it; None for an id that belongs to no adapter.

    Raises ConfigError when there is no NAME.
    """
    library, colon, name = env_id.partition(":")
    if not colon or library not in ADAPTERS:
        return None
    if not name.strip():
        raise ConfigError(f"env.id: {env_id!r} must go on after the colon with {ADAPTERS[library].named}")
    return ADAPTERS[library], name
