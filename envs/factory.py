"""Makes environments from the ids and import paths that users write."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator

from opd.addressing import find_module
from opd.envs import adapters
from opd.envs.adapters import Adapter
from opd.errors import ConfigError
from opd.secrets import know_settings
from opd.standing import kept_standing
from opd.variables import resolve

_IN_MODULE = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<name>[\w./-]+)")


def list_envs() -> list[str]:
    """List the ids that this package registers."""
    return sorted(env_id for env_id in gymnasium.registry if env_id.startswith("opd/"))


def validate_id(env_id: str) -> None:
    """Raise ConfigError unless the id is registered or the module that it names exists.

    Cheap: nothing of the environment is imported, so a mistyped id is found before torch is loaded.
    """
    if adapted := adapters.find(env_id):
        adapted[0].require()
    elif named := _IN_MODULE.fullmatch(env_id):
        if find_module(named["module"]) is None:
            raise ConfigError(
                f"env.id: {env_id!r} names the module {named['module']!r}, which cannot be found. "
                "Is its folder on PYTHONPATH, or the package installed?"
            )
    elif env_id not in gymnasium.registry:
        near = get_close_matches(env_id, list(gymnasium.registry), n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ConfigError(
            f"env.id: {env_id!r} is unknown. Ours: {', '.join(list_envs())}; others by import path, "
            f"package.module:Class.{hint}"
        )


def entry_point(env_id: str) -> object:
    """What is called to make an environment of a registered id. Raises ConfigError for an unknown one."""
    validate_id(env_id)
    return gymnasium.registry[env_id].entry_point


def module_of(env_id: str) -> str:
    """Return the module that is imported to make this environment; `opd.envs` where its id does not tell."""
    module, _, name = env_id.rpartition(":")
    if not module and env_id in gymnasium.registry:
        module, _, name = str(gymnasium.registry[env_id].entry_point).rpartition(":")
    return module if _IN_MODULE.fullmatch(f"{module}:{name}") else "opd.envs"


def make_for(
    env_id: str, kwargs: Mapping[str, Any] | None = None, *, tool_format: str, starts_thinking: bool
) -> gymnasium.Env[str, str]:
    """Make an environment for a model that writes its replies in a format, whose prompts may open a thought.

    Environments of tools learn it here (`ToolEnv.read_calls_as`). Raises what `make` raises.
    """
    env = make(env_id, kwargs)
    if learn := getattr(env.unwrapped, "read_calls_as", None):
        learn(tool_format, starts_thinking=starts_thinking)
    return env


def make(env_id: str, kwargs: Mapping[str, Any] | None = None) -> gymnasium.Env[str, str]:
    """Make an environment whose observations and actions are text.

    A registered id goes through `gymnasium.make`, so that its author's wrappers (a time limit, the check that
    reset comes first) apply; they pass `info` on as it is. gymnasium's passive checker is left out: it looks at
    the first reset and step only, in every one of the many environments of a run, and prints what `check` reports
    once. `package.module:Class` is called directly; `package.module:Id-v0` is gymnasium's own form for an id that
    the module registers when it is imported. `LIBRARY:NAME` is another library's environment (`opd.envs.adapters`).

    `${env:NAME}` in an argument is replaced here, in the process that holds the environment (`opd.variables`).

    Raises ConfigError for an unknown id or argument, a variable that is not set, or spaces that are not text.
    """
    validate_id(env_id)
    know_settings(kwargs or {})
    kwargs = resolve(dict(kwargs or {}), "env.kwargs")
    module, _, name = env_id.rpartition(":")
    if adapted := adapters.find(env_id):
        env = _from_adapter(env_id, *adapted, kwargs)
    elif module and name.isidentifier():
        env = _from_class(env_id, kwargs)
    else:
        env = _from_registry(module, name, kwargs)
    for attribute in ("observation_space", "action_space"):
        space = getattr(env, attribute, None)
        if not _is_text(space):
            raise ConfigError(
                f"env.id: {env_id!r} has {attribute} = {space}; it must be text, such as opd.envs.TextSpace()"
            )
    return env


def _from_adapter(env_id: str, adapter: Adapter, name: str, kwargs: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    creator = pkgutil.resolve_name(adapter.entry_point)
    _check_kwargs(env_id, partial(creator, name), kwargs)
    return creator(name, **kwargs)  # type: ignore[no-any-return]  # an adapter of ours


def _from_class(path: str, kwargs: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    try:
        with kept_standing(f"the module {path.rpartition(':')[0]!r}"):
            creator = pkgutil.resolve_name(path)
    except (AttributeError, ImportError) as error:
        raise ConfigError(f"env.id: {path!r} cannot be imported: {error}") from error
    _check_kwargs(path, creator, kwargs)
    env = creator(**kwargs)
    if not isinstance(env, gymnasium.Env):
        raise ConfigError(f"env.id: {path!r} makes a {type(env).__name__}, which is no gymnasium.Env")
    return env


def _from_registry(module: str, env_id: str, kwargs: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    try:
        if module:
            with kept_standing(f"the module {module!r}"):
                importlib.import_module(module)
            validate_id(env_id)
        spec = gymnasium.registry[env_id]
        creator = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
    except (AttributeError, ImportError) as error:
        raise ConfigError(f"env.id: {env_id!r} cannot be imported: {error}") from error
    _check_kwargs(env_id, creator, {**spec.kwargs, **kwargs})
    return gymnasium.make(env_id, disable_env_checker=True, **kwargs)


def _check_kwargs(env_id: str, creator: Any, kwargs: dict[str, Any]) -> None:
    """Raise ConfigError for an argument that the constructor does not take, or lacks."""
    signature = inspect.signature(creator)
    known = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for name in kwargs:
        if name not in known and not takes_any:
            near = get_close_matches(name, known, n=1)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            raise ConfigError(f"env.kwargs: {env_id} takes no {name!r}. Allowed: {', '.join(known) or 'none'}.{hint}")
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        raise ConfigError(f"env.kwargs: {env_id}: {error}. Allowed: {', '.join(known) or 'none'}") from None


def _is_text(space: Any) -> bool:
    return isinstance(space, gymnasium.Space) and space.dtype is not None and np.dtype(space.dtype).kind == "U"
