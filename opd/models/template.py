"""A tokenizer's chat template: from messages to text, also where the template lacks a role or tools.

What others wrote goes through the template guarded (`opd.models.encoding`): the rendered text holds stand-ins in place
of markup in it. Token ids, and where a conversation goes on, are the business of `opd.models.chat`.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date as Date
from datetime import datetime
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd.errors import ModelError
from opd.formats import FORMATS, Format, Reply
from opd.models.encoding import Encoder, control_strings
from opd.models.habits import ERRORS, Tools, read_habits
from opd.models.wording import Wording
from opd.types import Message

_OURS = frozenset(
    {"messages", "tools", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "conversation"}
)


class ChatTemplate:
    """Renders messages with a tokenizer's own template.

    A template that knows no tools, no `tool` role or no `system` role is helped out in plain text: schemas go into the
    system message, tool results into user messages, the system text before the first user's. A template that renders no
    calls gets them in the text.

    `form` names the format of replies; None reads it off the template. `date` is the day that templates are told; None
    leaves it to the clock. Raises ModelError where the tokenizer has no template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        kwargs: dict[str, Any],
        *,
        form: str | None = None,
        date: Date | None = None,
    ) -> None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ModelError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template; "
                "use an instruction-tuned model, or set tokenizer.chat_template and save it beside the model"
            )
        for key in _OURS.intersection(kwargs):
            raise ModelError(f"rollout.chat_template_kwargs.{key}: a run passes this itself. Remove it")
        self._tokenizer = tokenizer
        self.name = str(tokenizer.name_or_path)
        self._kwargs = kwargs if date is None else {**_on_the_day(date), **kwargs}
        self.source = source = _source(tokenizer)
        self._parts = False
        self._parts = not self._renders_text()
        self.habits = read_habits(self._apply, control_strings(tokenizer), source, form=form)
        self.format: Format = FORMATS[self.habits.form]
        self.encoder = Encoder(tokenizer, _markup(self.format, source))
        self._wording = Wording(self.habits, self.format, self.encoder)

    def render(self, messages: list[Message], tools: Tools, *, generate: bool, **template_kwargs: Any) -> str:
        """The text of a conversation, guarded; with `generate` up to where the assistant speaks. Raises ModelError."""
        return self._render(messages, tools, self._wording.of(messages, tools), generate=generate, **template_kwargs)

    def render_strictly(self, messages: list[Message], tools: Tools, *, generate: bool) -> str:
        """The same as `render`, in no other words than the template's own. Raises ModelError where it refuses them."""
        return self._render(messages, tools, islice(self._wording.of(messages, tools), 1), generate=generate)

    def _render(
        self,
        messages: list[Message],
        tools: Tools,
        wordings: Iterable[list[Message]],
        *,
        generate: bool,
        **template_kwargs: Any,
    ) -> str:
        shown = self.encoder.guard_all(tools) if tools and self.habits.tools else None
        refused: Exception | None = None
        for plain in wordings:
            try:
                return self._apply(plain, tools=shown, generate=generate, **template_kwargs)
            except ERRORS as error:
                refused = refused or error
        raise ModelError(
            f"the chat template of {self._tokenizer.name_or_path!r} refuses the roles "
            f"{', '.join(str(m['role']) for m in messages)}: {refused}"
        ) from refused

    def taken_apart(self, message: Message, tools: Tools = None) -> Message:
        """An assistant's message with its thought and its calls as keys of their own, where the template renders these.

        A message that already has such keys, and one whose calls cannot be read, come back as they are.
        """
        return self._wording.said.taken_apart(message, _names(tools))

    def read(self, text: str, tools: Tools = None) -> Reply:
        """Take a reply of the assistant apart."""
        return self._wording.said.read(text, _names(tools))

    def in_text(self, message: Message) -> Message:
        """A message whose calls, if it has any, stand in its text as the format writes them."""
        return self._wording.said.in_text(message)

    def check_renders(self, text: str) -> None:
        """Raise ModelError where the template does not render what an assistant says."""
        said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]
        if text not in self.encoder.plain(self.render(said, None, generate=False)):
            raise ModelError(
                f"the chat template of {self._tokenizer.name_or_path!r} does not render an assistant's content"
            )

    def _renders_text(self) -> bool:
        """True if the template takes a content that is text; those for pictures may want a list of parts instead."""
        try:
            return "opdQuestion" in self._apply([{"role": "user", "content": "opdQuestion"}])
        except ERRORS:
            return False

    def _apply(self, messages: list[Message], *, tools: Tools = None, generate: bool = False, **kwargs: Any) -> str:
        given = [_in_parts(message) for message in messages] if self._parts else messages
        return str(
            self._tokenizer.apply_chat_template(
                given,
                tools=tools,
                tokenize=False,
                add_generation_prompt=generate,
                **{**self._kwargs, **kwargs},
            )
        )


def _in_parts(message: Message) -> Message:
    """A message whose text is a part of its own."""
    text = message.get("content")
    return {**message, "content": [{"type": "text", "text": text}] if text else []}


def _names(tools: Tools) -> list[str]:
    return [str(tool["function"].get("name")) for tool in tools or ()]


def _markup(form: Format, source: str) -> list[str]:
    """Strings that the template looks for in a message: those of the format that its text holds."""
    return [marker for marker in form.markers if marker.strip() and marker in source]


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    return template if isinstance(template, str) else "\n".join(map(str, dict(template).values()))


def _on_the_day(day: Date) -> dict[str, Any]:
    """What a template asks for the date, answered for one day."""
    moment = datetime(day.year, day.month, day.day)
    return {"strftime_now": moment.strftime}
