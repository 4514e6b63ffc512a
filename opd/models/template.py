"""A tokenizer's chat template: from messages to text, also where the template lacks a role or tools.

Token ids, and where a conversation goes on, are the business of `opd.models.chat`.
"""

from __future__ import annotations

import json
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from opd.errors import ModelError
from opd.types import Message

Tools = list[dict[str, Any]] | None
_PROBE = {"type": "function", "function": {"name": "opd_probe", "description": "", "parameters": {"type": "object"}}}
_CALL_FORM = '<tool_call>{"name": ..., "arguments": {...}}</tool_call>'


class ChatTemplate:
    """Renders messages with a tokenizer's own template.

    A template that knows no tools, no `tool` role or no `system` role is helped out in plain text: schemas go into the
    system message, tool results into user messages, the system text before the first user's. Raises ModelError where
    the tokenizer has no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> None:
        if tokenizer.chat_template is None:
            raise ModelError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template; "
                "use an instruction-tuned model, or set tokenizer.chat_template and save it beside the model"
            )
        self._tokenizer = tokenizer
        self._kwargs = kwargs
        user = {"role": "user", "content": "x"}
        self._knows_system = self._accepts([{"role": "system", "content": "opd_probe"}, user])
        self._knows_tool_role = self._accepts(
            [user, {"role": "assistant", "content": "y"}, {"role": "tool", "content": "opd_probe"}]
        )
        self._knows_tools = self._accepts([user], tools=[_PROBE])

    def render(self, messages: list[Message], tools: Tools, *, generate: bool, **template_kwargs: Any) -> str:
        """The text of a conversation; with `generate` up to where the assistant speaks. Raises ModelError."""
        plain = self._in_plain_text(messages, tools)
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    plain,
                    tools=tools if self._knows_tools else None,
                    tokenize=False,
                    add_generation_prompt=generate,
                    **{**self._kwargs, **template_kwargs},
                )
            )
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise ModelError(
                f"the chat template of {self._tokenizer.name_or_path!r} refuses the roles "
                f"{', '.join(str(m['role']) for m in messages)}: {error}"
            ) from error

    def _in_plain_text(self, messages: list[Message], tools: Tools) -> list[Message]:
        """Move what the template does not know into what it knows."""
        plain = list(messages)
        if tools and not self._knows_tools:
            listing = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
            text = f"You may call these tools, in the form {_CALL_FORM}:\n{listing}"
            if plain and plain[0]["role"] == "system":
                plain[0] = {**plain[0], "content": f"{plain[0]['content']}\n\n{text}"}
            else:
                plain.insert(0, {"role": "system", "content": text})
        if not self._knows_system and plain and plain[0]["role"] == "system":
            system = plain.pop(0)["content"]
            if plain and plain[0]["role"] == "user":
                plain[0] = {**plain[0], "content": f"{system}\n\n{plain[0]['content']}"}
            else:
                plain.insert(0, {"role": "user", "content": system})
        if not self._knows_tool_role:
            plain = _tool_results_as_user(plain)
        return plain

    def _accepts(self, messages: list[Message], tools: Tools = None) -> bool:
        """True if the template renders these without complaint and without dropping the probe."""
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=False, **self._kwargs
            )
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError):
            return False
        return "opd_probe" in str(text)


def _tool_results_as_user(messages: list[Message]) -> list[Message]:
    """Turn tool results into user messages, those of one turn into one: strict templates want alternating roles."""
    plain: list[Message] = []
    after_result = False
    for message in messages:
        if message["role"] == "tool" and after_result:
            plain[-1] = {"role": "user", "content": f"{plain[-1]['content']}\n{message['content']}"}
        else:
            plain.append({**message, "role": "user"} if message["role"] == "tool" else message)
        after_result = message["role"] == "tool"
    return plain
