"""Reads a file's conversations as episodes in token ids: an assistant's messages are completions, others are prompt."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.errors import DataError, ModelError
from opd.rows import read_file
from opd.trainers.parts.messages import read_row
from opd.types import End, Message, StopReason, Task, Trajectory, Turn

if TYPE_CHECKING:
    from opd.models.chat import ChatFormat

logger = logging.getLogger(__name__)

_LINKS = ("role", "content", "tool_call_id", "id", "name")
"""Keys that need not be seen: they tie a result to its call. A user's name is looked for."""


def read_conversations(
    path: Path, chat: ChatFormat, *, leave_out: Collection[str] = (), on_row: Callable[[], None] = lambda: None
) -> list[Trajectory]:
    """Read a file with a conversation in each row: `{"messages": [...]}`, perhaps with `tools` and `success`.

    Messages are in OpenAI's form: an assistant's may have `tool_calls` and `reasoning_content`, and its text may hold
    these in the model's own markup. Keys that the model's template does not render are refused, but for those that a
    person leaves out. `on_row` is called after each; what it raises ends the reading.

    Raises ConfigError where there is no such file; DataError, with the line's number, for what cannot be read, and for
    a row that is no conversation with something to learn.
    """
    file = read_file(path)
    reader = _Reader(chat, frozenset(leave_out))
    found = []
    for number, row in enumerate(file.rows):
        try:
            found.append(reader.conversation(row, file.places[number]))
        except (ValueError, ModelError) as error:
            raise DataError(f"{file.where(number)}: {error}") from error
        on_row()
    if reader.left_out:
        keys = ", ".join(sorted(reader.left_out))
        logger.warning("%s: the keys %s of messages are left out, as set", path, keys)
    return found


def check_conversations(path: Path) -> None:
    """Look at what can be known of a file's conversations without a model. Raises as `read_conversations` does."""
    file = read_file(path)
    for number, row in enumerate(file.rows):
        try:
            messages, _ = read_row(row)
            _check_text(messages)
            _success(row)
        except ValueError as error:
            raise DataError(f"{file.where(number)}: {error}") from error


@dataclass
class _Reader:
    chat: ChatFormat
    leave_out: frozenset[str]
    left_out: set[str] = field(default_factory=set)
    _whole: set[tuple[Any, ...]] = field(default_factory=set)
    """The shapes of messages of which the template has rendered every key."""

    def conversation(self, row: Any, number: int) -> Trajectory:
        """Return a row's conversation as an episode. Raises ValueError where there is nothing to learn."""
        messages, tools = read_row(row)
        _check_text(messages)
        spoken = _Spoken(self.chat, tools)
        for place, message in enumerate(messages):
            try:
                self._take(place, message, spoken)
            except (ValueError, ModelError) as error:
                here = f"messages[{place}]: "
                raise ValueError(f"{here}{str(error).removeprefix(here)}") from error
        if not spoken.turns:
            raise ValueError("there is no message of an assistant to learn from")
        task = Task(index=number, seed=number, split="file")
        success = _success(row)
        return Trajectory(task=task, member=0, turns=spoken.turns, end=End.FINISHED, tools=tools, success=success)

    def _take(self, place: int, message: Message, spoken: _Spoken) -> None:
        """Add a message to the conversation. Raises ValueError and ModelError where it cannot be learned, or shown."""
        learned = message.pop("weight", 1)
        if message["role"] == "assistant":
            message = self.chat.template.taken_apart(message, spoken.tools)
        elif message["role"] == "tool":
            _check_answers(message, [*spoken.history, *spoken.new])
        shown = self._rendered_part(place, message, [*spoken.history, *spoken.new], spoken.tools)
        if shown["role"] == "assistant":
            spoken.say(shown, learned=bool(learned))
        else:
            spoken.new.append(shown)

    def _rendered_part(self, place: int, message: Message, before: list[Message], tools: Any) -> Message:
        """Return what the template renders of a message. Raises ValueError where it is not all, and nobody said so."""
        keys = [key for key in message if self._looked_for(message, key)]
        shape = (message["role"], bool(before), *sorted(keys))
        if not keys or shape in self._whole:
            return message
        missing = self.chat.replies.unrendered(before, message, tools, keys)
        if not missing:
            self._whole.add(shape)
        if kept := [key for key in missing if key not in self.leave_out]:
            raise ValueError(
                f"messages[{place}]: the model's chat template does not render {', '.join(kept)}, so that it would not "
                f"be learned. Take it out of the file, or set sft.leave_out: [{', '.join(kept)}]"
            )
        self.left_out |= set(missing)
        return {key: value for key, value in message.items() if key not in missing}

    def _looked_for(self, message: Message, key: str) -> bool:
        """True for a key that says something, and that nobody would see missing."""
        if key == "content":
            return bool(message[key]) and (message["role"] != "assistant" or bool(message.get("tool_calls")))
        if key in _LINKS:
            return key == "name" and message["role"] != "tool" and bool(message[key])
        return message[key] not in ("", [], {})


@dataclass
class _Spoken:
    """A conversation that grows message by message."""

    chat: ChatFormat
    tools: Any
    history: list[Message] = field(default_factory=list)
    new: list[Message] = field(default_factory=list)
    """What was said since the assistant spoke."""
    turns: list[Turn] = field(default_factory=list)
    _unlearned: list[int] = field(default_factory=list)
    """Ids since the last turn that is learned, of messages that are only read."""
    _last_id: int | None = None

    def say(self, said: Message, *, learned: bool) -> None:
        """Add what the assistant says. Raises ValueError where nobody has spoken before it."""
        if not self.new:
            raise ValueError("the assistant speaks first, or twice in a row")
        forked = False
        if self.history:
            prompt = self.chat.extend(self.history, self.new, self.tools, last_id=self._last_id)
            prompt_ids, forked = prompt.token_ids, prompt.forked
        else:
            prompt_ids = self.chat.start(self.new, self.tools)
        ids = self.chat.spoken([*self.history, *self.new], said, self.tools)
        before = prompt_ids if forked else [*self._unlearned, *prompt_ids]
        self._unlearned = [] if learned else [*before, *ids]
        if learned:
            self.turns.append(
                Turn(
                    prompt_ids=before,
                    completion_ids=ids,
                    logprobs=[float("nan")] * len(ids),  # nobody sampled it
                    stop_reason=StopReason.STOP,
                    messages=[*self.history, *self.new] if forked else self.new,
                    text=self.chat.text(ids),
                    forked=forked and bool(self.turns),
                )
            )
        self.history += [*self.new, said]
        self.new = []
        self._last_id = ids[-1]


def _success(row: Mapping[str, Any]) -> bool:
    """Return whether a row is to be learned from as a success, which it is where nothing says so. Raises ValueError."""
    success, reward = row.get("success"), row.get("reward")
    if success not in (None, True, False):  # 1 and 0 are these; texts, and what is between, are not
        raise ValueError(f"success = {success!r:.80}; it may be true, false or null")
    if success is None and reward is not None:
        raise ValueError(
            f"reward = {reward!r:.80} does not say what is learned from. Write success: true or false, or take reward "
            "out of the row"
        )
    return success is None or bool(success)


def _check_answers(result: Message, before: list[Message]) -> None:
    """Raise ValueError for a result whose id is that of no call that it may answer, where these have ids."""
    said = next((message for message in reversed(before) if message["role"] == "assistant"), {})
    ids = [call.get("id") for call in said.get("tool_calls") or ()]
    if ids and all(ids) and result.get("tool_call_id") not in (None, *ids):
        raise ValueError(
            f"tool_call_id = {result['tool_call_id']!r:.80} is the id of no tool call of the assistant before it; "
            f"those are {', '.join(map(repr, ids))}"
        )


def _check_text(messages: list[Message]) -> None:
    """Raise ValueError for text that no tokenizer takes, and for what no template writes: dates, bytes, NaN."""
    try:
        json.dumps(messages, ensure_ascii=False, allow_nan=False).encode()
    except TypeError as error:
        raise ValueError(f"it holds what JSON does not know: {error}") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds a lone surrogate ({error.object[error.start]!a}), which is no text") from None
