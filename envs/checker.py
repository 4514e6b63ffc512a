"""Finds what an environment gets wrong before a run starts: gymnasium's own checker, and the contract of `text_env`."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.utils.env_checker import check_env

from opd.envs.checker_words import describe, listening_to_tools, names_of
from opd.envs.factory import make
from opd.envs.text_env import SPLITS
from opd.errors import ConfigError

_TASKS = 24
"""Most tasks of each split that are played."""
_STEPS = 8
"""Most steps of an episode."""
_LONG = 16
"""Characters from which privileged text in a prompt is no coincidence."""
_AROUND = 60
"""Characters that a quotation shows on both sides of what it is about."""
_SLOW = 1.0
"""Seconds that a reset or step may take before it is remarked on."""

Tasks = dict[str, int | None]


@dataclass(frozen=True, slots=True)
class Finding:
    """Names something to mend (`error`), to look at (`warning`), or to know (`note`)."""

    severity: Literal["error", "warning", "note"]
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Episode:
    """Records what one episode of random actions showed."""

    task: str
    """All that is told of the task at reset: equal for equal tasks."""
    told: list[str]
    """What each step answered: equal for equal tasks and actions."""
    privileged: dict[str, str]
    seen: list[str]
    """Every text that reaches the student's prompt: observations and messages."""
    where: list[str]
    """Which call each of these was said by."""
    names: frozenset[str]
    """The names that the tools' schemas have: of tools, of arguments, of their choices."""
    seconds: list[float]
    problems: list[str]
    ends_twice: bool
    """Terminated and truncated at once."""


def check(
    env_id: str, kwargs: Mapping[str, Any] | None = None, *, doing: Callable[[str], None] = lambda _: None
) -> list[Finding]:
    """Play some episodes with random actions and report what breaks the contract.

    Without an `error` in the list, the environment is fit to train on; a note on its speed is always there
    unless it broke before. `doing` is told of each call before it is made. Raises ConfigError when the environment
    cannot be made as it is named; what its own code raises is a finding.
    """
    made: list[gymnasium.Env[str, str]] = []
    try:
        doing("making the environment")
        made += [make(env_id, kwargs), make(env_id, kwargs)]
        with listening_to_tools() as raised:
            found = [*_gymnasium_findings(made[0], doing), *_contract_findings(made[0], made[1], doing)]
        return list(dict.fromkeys([*found, *(Finding("warning", text) for text in raised)]))
    except ConfigError:
        raise
    except Exception as error:  # whatever somebody else's code raises is what we report
        return [Finding("error", f"making the environment raised {describe(error)}")]
    finally:
        for env in made:
            env.close()


def _gymnasium_findings(env: gymnasium.Env[str, str], doing: Callable[[str], None]) -> list[Finding]:
    findings: list[Finding] = []
    doing("gymnasium's check_env")
    raw = env.unwrapped
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            # An import path has no spec to make a second one for rendering, and check_env would say so each time.
            check_env(raw, skip_render_check=raw.spec is None)
        except Exception as error:  # as above
            findings.append(Finding("error", f"gymnasium's check_env: {describe(error)}"))
    plain = (re.sub(r"\x1b\[\d+m|WARN: ", "", str(warning.message)) for warning in caught)
    return [*findings, *(Finding("warning", f"gymnasium's check_env: {text}") for text in plain)]


def _contract_findings(
    first: gymnasium.Env[str, str], second: gymnasium.Env[str, str], doing: Callable[[str], None]
) -> Iterator[Finding]:
    tasks = first.metadata.get("tasks")
    if problem := _tasks_problem(tasks):
        yield Finding("error", problem)
        return
    addresses = list(_addresses(tasks))
    try:
        episodes = [_play(first, *address, doing) for address in addresses]
        again = [_play(second, *address, doing) for address in addresses]
    except Exception as error:  # as above
        yield Finding("error", f"an episode raised {describe(error)}")
        return
    yield from (Finding("error", problem) for episode in episodes for problem in episode.problems)
    for (seed, options), one, other in zip(addresses, episodes, again, strict=True):
        if one.task != other.task:
            yield Finding("error", f"reset(seed={seed}, options={options}) gave two different tasks")
            break
        if one.told != other.told:
            pairs = zip(one.told, other.told, strict=False)
            step = next((n for n, (a, b) in enumerate(pairs, start=1) if a != b), len(one.told))
            yield Finding(
                "error",
                f"after reset(seed={seed}, options={options}) the same actions had other answers (step {step}); draw "
                "with self.np_random alone, and start from nothing at each reset",
            )
            break
    if any(episode.ends_twice for episode in episodes):
        yield Finding(
            "warning",
            "a step said terminated and truncated at once, and is taken for terminated: the task is over. truncated is "
            "for a limit that cut it short",
        )
    yield from _split_findings(addresses, episodes)
    yield from _leaks(episodes)
    yield from _speed(episodes)


def _tasks_problem(tasks: Any) -> str | None:
    """Say what is wrong with `metadata["tasks"]`; None if nothing is."""
    if tasks is None:
        return None
    if not isinstance(tasks, dict) or "train" not in tasks or set(tasks) - set(SPLITS):
        return f'metadata["tasks"] = {tasks!r} must be a dict with "train" and, where there are such, "eval" and "warm"'
    for split, count in tasks.items():
        if count is not None and (not isinstance(count, int) or count < 1):
            return f'metadata["tasks"]["{split}"] = {count!r} must be a number of tasks, or None for unlimited'
    return None


def _addresses(tasks: Tasks | None) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield the seed and the options of each episode to play, as the trainer would pass them."""
    if tasks is None:
        yield from ((seed, None) for seed in range(_TASKS))
        return
    for split, count in tasks.items():
        for index in range(_TASKS if count is None else min(count, _TASKS)):
            yield index, {"split": split, "index": index}


def _play(
    env: gymnasium.Env[str, str], seed: int, options: dict[str, Any] | None, doing: Callable[[str], None]
) -> _Episode:
    """Play one episode: an empty action, then random text."""
    env.action_space.seed(seed)
    calls = [f"reset(seed={seed}, options={options})"]
    doing(calls[0])
    started = time.perf_counter()
    obs, info = env.reset(seed=seed, options=options)
    seconds = [time.perf_counter() - started]
    seen, problems = _texts(obs, info), list(_info_problems(info, "reset"))
    where, names = [calls[0]] * len(seen), names_of(info.get("tools"))
    task = repr([obs, *(info.get(key) for key in ("messages", "tools", "privileged"))])
    privileged, told = info.get("privileged", {}), []
    for step in range(_STEPS):
        action = env.action_space.sample() if step else ""
        doing(f"step {step + 1} after {calls[0]}, with the action {action!r:.80}")
        started = time.perf_counter()
        obs, reward, terminated, truncated, info = env.step(action)
        seconds.append(time.perf_counter() - started)
        said = _texts(obs, info)
        seen, where = seen + said, where + [f"step {step + 1} after {calls[0]}"] * len(said)
        told.append(repr([obs, reward, terminated, truncated, info.get("messages"), info.get("success")]))
        problems += [*_step_problems(reward, terminated, truncated), *_info_problems(info, "step")]
        if terminated or truncated:
            break
    return _Episode(
        task=task,
        told=told,
        privileged=privileged if _is_text_dict(privileged) else {},  # what it is else is among the problems
        seen=seen,
        where=where,
        names=names,
        seconds=seconds,
        problems=problems,
        ends_twice=bool(terminated and truncated),
    )


def _texts(obs: Any, info: dict[str, Any]) -> list[str]:
    messages = info.get("messages")
    contents = [str(m["content"]) for m in messages if _is_message(m)] if isinstance(messages, list) else []
    return [str(obs), *contents]


def _step_problems(reward: Any, terminated: Any, truncated: Any) -> Iterator[str]:
    for name, value in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(value, bool | np.bool_):
            yield f"step returned {name} = {value!r}; it must be a bool"
    if not isinstance(reward, int | float | np.number) or not math.isfinite(reward):
        yield f"step returned reward = {reward!r}; it must be a finite number"


def _info_problems(info: Any, where: str) -> Iterator[str]:
    if not isinstance(info, dict):
        yield f"{where} returned info of type {type(info).__name__}; it must be a dict"
        return
    for key, type_ in (("success", bool | np.bool_), ("feedback", str)):
        if key in info and not isinstance(info[key], type_):
            yield f'{where}: info["{key}"] = {info[key]!r} must be a {"str" if type_ is str else "bool"}'
    if "unreadable" in info and not isinstance(info["unreadable"], bool | np.bool_):
        yield f'{where}: info["unreadable"] = {info["unreadable"]!r} must be a bool'
    if "privileged" in info and not _is_text_dict(info["privileged"]):
        yield f'{where}: info["privileged"] = {info["privileged"]!r} must be a dict of str to str'
    if "rewards" in info and not _is_parts(info["rewards"]):
        yield f'{where}: info["rewards"] = {info["rewards"]!r} must be a dict of str to finite numbers or None'
    if "messages" in info and not _is_list(info["messages"], _is_message):
        yield f'{where}: info["messages"] = {info["messages"]!r} must be a list of dicts with "role" and "content"'
    if "tools" in info and not _is_list(info["tools"], _is_tool):
        yield f'{where}: info["tools"] must be a list of {{"type": "function", "function": {{"name", "parameters"}}}}'


def _split_findings(addresses: list[tuple[int, dict[str, Any] | None]], episodes: list[_Episode]) -> Iterator[Finding]:
    """Report tasks that are in two splits, and splits that hold only one task."""
    by_split: dict[str, set[str]] = {}
    played: Counter[str] = Counter()
    for (_, options), episode in zip(addresses, episodes, strict=True):
        split = options["split"] if options else "train"
        by_split.setdefault(split, set()).add(episode.task)
        played[split] += 1
    for split, tasks in by_split.items():
        if len(tasks) == 1 < played[split]:
            yield Finding("warning", f"the {played[split]} tasks of the {split} split that were looked at are one task")
        for other in list(by_split)[list(by_split).index(split) + 1 :]:
            both = tasks & by_split[other]
            if both and len(tasks | by_split[other]) == 1 and min(played[split], played[other]) > 1:
                yield Finding("warning", f"the tasks of {split} and {other} cannot be told apart: all begin alike")
            elif both:
                yield Finding("error", f"the splits {split} and {other} share tasks, such as {min(both):.200}")


def _leaks(episodes: list[_Episode]) -> Iterator[Finding]:
    """Report privileged text that the student reads. A short one (a number, say) may be there by coincidence, and one
    that is the name of a tool or of a choice stands in every text that offers it."""
    long: set[str] = set()
    counts: Counter[str] = Counter()
    quotes: dict[str, str] = {}
    for episode in episodes:
        for key, value in episode.privileged.items():
            text = value.strip()
            found = None if not text or text in episode.names else _quote(text, episode)
            if found is not None:
                counts[key] += 1
                quotes.setdefault(key, found)
                long |= {key} if len(value) >= _LONG else set()
    for key, count in counts.items():
        if key in long or count > len(episodes) / 2:
            yield Finding(
                "error", f'info["privileged"]["{key}"] stands in the observations of {count} episodes: {quotes[key]}'
            )


def _quote(value: str, episode: _Episode) -> str | None:
    """Quote the sentence that holds the value as words of its own: the 3 of `31` is not the answer 3."""
    sought = re.compile(rf"(?<!\w){re.escape(value)}(?!\w)")
    for text, where in zip(episode.seen, episode.where, strict=True):
        if found := sought.search(text):
            start, end = max(0, found.start() - _AROUND), found.end() + _AROUND
            cut = f"{'…' * (start > 0)}{text[start:end]}{'…' * (end < len(text))}"
            return f"{where} said {cut!r}"
    return None


def _speed(episodes: list[_Episode]) -> Iterator[Finding]:
    resets = [episode.seconds[0] for episode in episodes]
    steps = [seconds for episode in episodes for seconds in episode.seconds[1:]]
    slowest = max(*resets, *steps)
    yield Finding("note", f"a reset takes {1e3 * np.mean(resets):.2g} ms, a step {1e3 * np.mean(steps):.2g} ms")
    if slowest > _SLOW:
        yield Finding("warning", f"the slowest reset or step took {slowest:.1f} s")


def _is_list(value: Any, holds: Any) -> bool:
    return isinstance(value, list) and all(holds(item) for item in value)


def _is_text_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair)


def _is_parts(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and (part is None or (isinstance(part, int | float | np.number) and math.isfinite(part)))
        for name, part in value.items()
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def _is_tool(value: Any) -> bool:
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    return (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("parameters"), dict)
        and function["parameters"].get("type") == "object"
    )
