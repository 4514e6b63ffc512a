"""Shows one episode of an environment: what is read, said, answered and rewarded, a line each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from opd.envs.factory import make
from opd.secrets import redact
from opd.tool_calls import format_call

_STEPS = 4
"""Most steps that are shown."""
_MOST = 400
"""Characters that are shown of a text."""


def show(env_id: str, kwargs: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Play the first training task and yield what is said, a line each.

    Each tool is called once, with arguments made up by its schema; then the teacher's text, or any, is the answer.
    Raises what the environment raises.
    """
    env = make(env_id, kwargs)
    try:
        tasks = env.metadata.get("tasks")
        obs, info = env.reset(seed=0, options=None if tasks is None else {"split": "train", "index": 0})
        yield "one episode, with made-up actions:"
        yield from _told(obs, info)
        for name, text in info.get("privileged", {}).items():
            yield _line(f"teacher alone: {name}", text)
        for action in _actions(info):
            yield _line("action", action)
            obs, reward, terminated, truncated, info = env.step(action)
            yield from _told(obs, info)
            if feedback := info.get("feedback"):
                yield _line("feedback", feedback)
            for name, part in info.get("rewards", {}).items():
                yield _line(f"reward of {name}", "abstains" if part is None else f"{part:g}")
            end = "terminated" if terminated else "truncated" if truncated else "goes on"
            solved = {True: ", a success", False: "", None: ""}[info.get("success")]
            yield _line("reward", f"{reward:g}, {end}{solved}{', without a score' * bool(info.get('unscored'))}")
            if terminated or truncated:
                return
    finally:
        env.close()


def _told(obs: str, info: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the student reads."""
    for message in info.get("messages") or [{"role": "user", "content": obs}] * bool(obs):
        role = message["role"]
        yield _line(f"tool {message['name']}" if role == "tool" and "name" in message else role, message["content"])
    if tools := info.get("tools"):
        yield _line("tools", ", ".join(_signature(tool["function"]) for tool in tools))


def _signature(function: Mapping[str, Any]) -> str:
    return f"{function['name']}({', '.join(function['parameters'].get('properties', {}))})"


def _actions(info: Mapping[str, Any]) -> list[str]:
    """Return the actions to show: calls of the first tools, and then an answer."""
    calls = []
    for tool in (info.get("tools") or [])[: _STEPS - 1]:
        function = tool["function"]
        properties, needed = function["parameters"].get("properties", {}), function["parameters"].get("required", [])
        arguments = {name: _made_up(schema) for name, schema in properties.items() if name in needed}
        calls.append(format_call(function["name"], arguments))
    answer = next(iter(info.get("privileged", {}).values()), "Hello.")
    return [*calls, *[answer] * (_STEPS - len(calls))]


def _made_up(schema: Mapping[str, Any]) -> Any:
    """Return a value that a schema takes, as far as that can be seen at once."""
    if "const" in schema or schema.get("enum"):
        return schema["const"] if "const" in schema else schema["enum"][0]
    if options := schema.get("anyOf"):
        return _made_up(options[0])
    made: dict[str, Any] = {"string": "a", "integer": 1, "number": 1.0, "boolean": True, "array": [], "null": None}
    if schema.get("type") == "object":
        return {name: _made_up(schema.get("properties", {}).get(name, {})) for name in schema.get("required", [])}
    return made.get(str(schema.get("type")), "a")


def _line(what: str, text: str) -> str:
    """Write a text behind its name, on as many lines as it has, without control characters."""
    text = redact(text)  # before it is cut: half a secret is one too
    cut = text if len(text) <= _MOST else f"{text[:_MOST]}… ({len(text):,} characters)"
    plain = "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in cut)
    first, *rest = plain.split("\n")
    return "\n".join([f"  {what:>16} | {first}", *(f"  {'':>16} | {line}" for line in rest)])
