"""Stored messages, in the forms in which people have them: OpenAI's, Hugging Face's, and what Arrow makes of these."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from opd.json_text import parse_json
from opd.types import MEDIA, ONLY_TEXT, Message, medium_in

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool", "ipython": "tool"}
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
_OTHER_ROWS = {
    "conversations": "rename it messages, from role and value content, with the roles system, user, assistant, tool",
    "prompt": "make prompt and completion messages of a user and an assistant",
    "messages": "its value must be a list of messages that is not empty",
}
"""Keys of rows in other forms, and the mend."""
_KEYS = ("messages", "tools", "success", "reward")
"""Keys of a row that mean something here, written so and not otherwise."""
_SAYS_NOTHING = ("refusal", "annotations", "audio", "function_call", "tool_calls")
"""Keys that a dump of an API holds, empty."""
_MEDIUM_KEY = re.compile(rf"(input_)?({MEDIA.pattern})s?(_urls?)?")


def read_row(row: Any) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Return the messages and the tools of a row, in the one form that templates are given.

    Raises ValueError, which names the message and its key, for what is no such row.
    """
    if not isinstance(row, Mapping) or not isinstance(row.get("messages"), list | tuple) or not row["messages"]:
        other = next((key for key in _OTHER_ROWS if isinstance(row, Mapping) and key in row), None)
        instead = f"; it has {other!r}: {_OTHER_ROWS[other]}" if other else ""
        raise ValueError(f'it is no {{"messages": [{{"role": ..., "content": ...}}, ...]}}{instead}')
    if other := next((key for key in row if key not in _KEYS and str(key).strip().lower() in _KEYS), None):
        raise ValueError(f"it has {other!r:.80}; write {other.strip().lower()}, or take it out")
    if row.get("functions"):
        raise ValueError(
            'functions is the old name of tools; write tools: [{"type": "function", "function": ...}, ...]'
        )
    if medium := _medium_beside(row):
        raise ValueError(f"it has {medium!r} beside its messages: {ONLY_TEXT}. Leave the row out")
    messages = []
    for number, message in enumerate(row["messages"]):
        try:
            messages.append(_message(message))
        except ValueError as error:
            raise ValueError(f"messages[{number}]: {error}") from None
    return messages, _tools(row.get("tools"))


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"it is {type(message).__name__}, and must be a dict with a role and a content")
    given = {key: value for key, value in message.items() if value is not None}  # Arrow fills what others have
    role = given.pop("role", None)
    if not isinstance(role, str) or role not in _ROLES:
        instead = f'; write "{_OTHER_ROLES[role]}"' if isinstance(role, str) and role in _OTHER_ROLES else ""
        raise ValueError(f"role = {role!r:.80} is unknown{instead}. Allowed: {', '.join(_ROLES)}")
    if medium := _medium_beside(given):
        raise ValueError(f"it has {medium!r} beside its content: {ONLY_TEXT}. Leave the row out")
    made: Message = {"role": _ROLES[role]}
    if given.get("function_call"):
        raise ValueError("function_call is the old form; write tool_calls, and its result as a message of role tool")
    calls = _calls(given.pop("tool_calls", None))
    thought = _thought(given)
    content = given.pop("content", None)
    if content is None and (said := next((key for key in ("refusal", "audio") if given.get(key)), None)):
        raise ValueError(f"content is null and {said} is not: put its text into content, or leave the row out")
    if content is None and not (role == "assistant" and (calls or thought)):
        raise ValueError(
            'content is null; an assistant\'s may be where it has tool_calls. Write "" for an empty text, or leave the '
            "message out"
        )
    made["content"] = "" if content is None else _text(content)
    if thought:
        made["reasoning_content"] = thought
    if calls:
        if role != "assistant":
            raise ValueError(f"tool_calls are an assistant's, and this message is of role {role}")
        made["tool_calls"] = calls
    if "weight" in given:
        made["weight"] = _weight(given.pop("weight"), made["role"])
    return made | {key: value for key, value in given.items() if not (key in _SAYS_NOTHING and not value)}


def _medium_beside(given: Mapping[str, Any]) -> str | None:
    """Return the key under which a row, or a message, holds images, video or sound."""
    return next((key for key, value in given.items() if value and _MEDIUM_KEY.fullmatch(str(key))), None)


def _weight(weight: Any, role: str) -> int:
    """Return the weight of a message, as OpenAI's files have it: 0 for one that is read and not learned."""
    if role != "assistant" or isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(f"weight = {weight!r:.80}; an assistant's message may have 0 (read, not learned) or 1")
    return int(weight)


def _thought(given: dict[str, Any]) -> str:
    """Take the thought out of a message's keys."""
    found = {key: given.pop(key) for key in _THOUGHTS if key in given}
    thoughts = {text for key, value in found.items() if value and (text := _text(value, key)).strip()}
    if len(thoughts) > 1:
        raise ValueError(f"{' and '.join(found)} hold different thoughts; keep one of them")
    return next(iter(thoughts), "")


def _text(content: Any, key: str = "content") -> str:
    """Return a content as text; one of parts is joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ValueError(f"{key} is {type(content).__name__}; it must be a text or a list of text parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            if medium := medium_in([part]):
                raise ValueError(f"{key} has a part of type {medium!r}: {ONLY_TEXT}. Leave the row out")
            raise ValueError(f"{key} has a part of type {kind!r}; only text is trained. Leave the row out")
    return "".join(texts)


def _calls(calls: Any) -> list[Message]:
    """Return tool calls in OpenAI's form, their arguments as dicts."""
    if not calls:
        return []
    if not isinstance(calls, list | tuple):
        raise ValueError(f"tool_calls is {type(calls).__name__}; it must be a list")
    made = []
    for number, call in enumerate(calls):
        function = call.get("function") or call if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if function is None or not isinstance(name, str) or not name:
            raise ValueError(f'tool_calls[{number}] is no {{"function": {{"name": ..., "arguments": ...}}}}')
        stored = function.get("arguments")
        arguments = _json(stored, f"tool_calls[{number}].function.arguments")
        if not isinstance(arguments, Mapping | None):
            raise ValueError(f"tool_calls[{number}].function.arguments is no object, but {arguments!r:.80}")
        # Nulls of a dict are Arrow's, which gives each call the arguments of all; those of JSON text are the model's.
        given = dict(arguments or {}) if isinstance(stored, str) else _given(arguments)
        made.append({"type": "function", "id": call.get("id"), "function": {"name": name, "arguments": given}})
    return made


def _given(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return arguments without nulls, with which Arrow fills up a column of different tools' arguments."""
    given: dict[str, Any] = _without_nulls(arguments or {})
    return given


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return tool schemas in OpenAI's form; they may be given as JSON text, and without the outer `function`."""
    tools = _json(tools, "tools")
    if not tools:
        return None
    if not isinstance(tools, list | tuple):
        raise ValueError(f"tools is {type(tools).__name__}; it must be a list of schemas, or JSON text of one")
    made = []
    for number, tool in enumerate(tools):
        tool = _json(tool, f"tools[{number}]")
        function = (tool.get("function") or tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f'tools[{number}] is no {{"type": "function", "function": {{"name": ...}}}}')
        made.append({"type": "function", "function": _without_nulls(function)})
    return made


def _without_nulls(value: Any) -> Any:
    """Leave out the keys of a schema that are null: Arrow gives each schema the keys of all."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value


def _json(value: Any, what: str) -> Any:
    """Return a value that may be given as JSON text. Raises ValueError, which says what it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else None
    except ValueError as error:
        raise ValueError(f"{what} is no JSON: {error}") from None
