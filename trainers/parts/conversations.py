"""Reads a file's conversations as episodes in token ids: an assistant's messages are completions, others are prompt."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.errors import DataError, ModelError
from opd.trainers.parts.messages import read_row
from opd.types import End, Message, StopReason, Task, Trajectory, Turn

if TYPE_CHECKING:
    from opd.models.chat import ChatFormat

logger = logging.getLogger(__name__)

_LINKS = ("role", "content", "tool_call_id", "id", "name")
"""Keys that need not be seen: they tie a result to its call. A user's name is looked for."""


def read_conversations(path: Path, chat: ChatFormat, *, leave_out: Collection[str] = ()) -> list[Trajectory]:
    """Read one conversation a line: `{"messages": [...]}`, perhaps with `tools` and `success`.

    Messages are in OpenAI's form: an assistant's may have `tool_calls` and `reasoning_content`, and its text may hold
    these in the model's own markup. Keys that the model's template does not render are refused, but for those that a
    person leaves out.

    Raises DataError, with the line's number, for a line that is no conversation with something to learn.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    reader = _Reader(chat, frozenset(leave_out))
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(reader.conversation(json.loads(line), number))
            except (ValueError, ModelError) as error:
                raise DataError(f"{path}, line {number}: {error}") from error
    if reader.left_out:
        keys = ", ".join(sorted(reader.left_out))
        logger.warning("%s: the keys %s of messages are left out, as set", path, keys)
    return found


@dataclass
class _Reader:
    chat: ChatFormat
    leave_out: frozenset[str]
    left_out: set[str] = field(default_factory=set)
    _rendered: dict[tuple[str, ...], list[str]] = field(default_factory=dict)
    """The keys that the template does not render of a message with these keys."""

    def conversation(self, row: Any, number: int) -> Trajectory:
        """Return the conversation of line `number` as an episode. Raises ValueError where there is nothing to learn."""
        messages, tools = read_row(row)
        history: list[Message] = []
        new: list[Message] = []
        turns: list[Turn] = []
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                message = self.chat.template.taken_apart(message, tools)
            shown = self._rendered_part(place, message, [*history, *new], tools)
            if shown["role"] != "assistant":
                new.append(shown)
                continue
            if not new:
                raise ValueError("the assistant speaks first, or twice in a row")
            turns.append(self._turn(history, new, shown, tools, turns))
            history += [*new, shown]
            new = []
        if not turns:
            raise ValueError("there is no message of an assistant to learn from")
        task = Task(index=number, seed=number, split="file")
        success = bool(row.get("success", True))
        return Trajectory(task=task, member=0, turns=turns, end=End.FINISHED, tools=tools, success=success)

    def _turn(self, history: list[Message], new: list[Message], said: Message, tools: Any, turns: list[Turn]) -> Turn:
        """Return a turn whose completion is an assistant's message."""
        if turns:
            last = turns[-1].completion_ids[-1]
            prompt = self.chat.extend(history, new, tools, last_id=last)
            prompt_ids, forked = prompt.token_ids, prompt.forked
        else:
            prompt_ids, forked = self.chat.start(new, tools), False
        ids = self.chat.spoken([*history, *new], said, tools)
        return Turn(
            prompt_ids=prompt_ids,
            completion_ids=ids,
            logprobs=[float("nan")] * len(ids),  # nobody sampled it
            stop_reason=StopReason.STOP,
            messages=[*history, *new] if forked else new,
            text=self.chat.text(ids),
            forked=forked,
        )

    def _rendered_part(self, place: int, message: Message, before: list[Message], tools: Any) -> Message:
        """Return what the template renders of a message. Raises ValueError where it is not all, and nobody said so."""
        shape = (message["role"], *sorted(key for key in message if message[key]))
        if shape not in self._rendered:
            keys = [key for key in message if self._looked_for(message, key)]
            self._rendered[shape] = self.chat.replies.unrendered(before, message, tools, keys) if keys else []
        missing = self._rendered[shape]
        if kept := [key for key in missing if key not in self.leave_out]:
            raise ValueError(
                f"messages[{place}]: the model's chat template does not render {', '.join(kept)}, so that it would not "
                f"be learned. Take it out of the file, or set sft.leave_out: [{', '.join(kept)}]"
            )
        self.left_out |= set(missing)
        return {key: value for key, value in message.items() if key not in missing}

    def _looked_for(self, message: Message, key: str) -> bool:
        beside_calls = key == "content" and bool(message.get("tool_calls"))
        a_name = key == "name" and message["role"] != "tool"
        return bool(message[key]) and (key not in _LINKS or beside_calls or a_name)
