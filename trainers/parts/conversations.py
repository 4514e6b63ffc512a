"""Reads a file's conversations as episodes in token ids: an assistant's messages are completions, others are prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.errors import DataError, ModelError
from opd.types import End, Message, StopReason, Task, Trajectory, Turn

if TYPE_CHECKING:
    from opd.models.chat import ChatFormat


def read_conversations(path: Path, chat: ChatFormat) -> list[Trajectory]:
    """Read one conversation a line: `{"messages": [...]}` with roles and texts, perhaps `tools` and `success`.

    Raises DataError, with the line's number, for a line that is no conversation with something to learn.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(_conversation(json.loads(line), chat, number))
            except (ValueError, ModelError) as error:
                raise DataError(f"{path}, line {number}: {error}") from error
    return found


def _conversation(row: Any, chat: ChatFormat, number: int) -> Trajectory:
    """Return the conversation of line `number` as an episode. Raises ValueError where there is nothing to learn."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise ValueError('it is no {"messages": [{"role": ..., "content": ...}, ...]}')
    tools = row.get("tools")
    history: list[Message] = []
    new: list[Message] = []
    turns: list[Turn] = []
    for message in messages:
        if message["role"] != "assistant":
            new.append(message)
            continue
        if not new:
            raise ValueError("the assistant speaks first, or twice in a row")
        if turns:
            prompt = chat.extend(history, new, tools, last_id=chat.end_id)
            prompt_ids, forked = prompt.token_ids, prompt.forked
        else:
            prompt_ids, forked = chat.start(new, tools), False
        ids = [*chat.encode(message["content"]), chat.end_id]
        turns.append(
            Turn(
                prompt_ids=prompt_ids,
                completion_ids=ids,
                logprobs=[float("nan")] * len(ids),  # nobody sampled it
                stop_reason=StopReason.STOP,
                messages=new,
                text=message["content"],
                forked=forked,
            )
        )
        history += [*new, message]
        new = []
    if not turns:
        raise ValueError("there is no message of an assistant to learn from")
    task = Task(index=number, seed=number, split="file")
    return Trajectory(
        task=task, member=0, turns=turns, end=End.FINISHED, tools=tools, success=bool(row.get("success", True))
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
