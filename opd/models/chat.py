"""From messages to token ids and back, tokens in and tokens out over many turns.

What was sampled is never decoded and encoded again: a conversation grows by the ids that were sampled and
the ids that the template puts between them (the glue). Only prompts and glue are ever tokenised. Where the
template rewrites the past (it drops the thinking of earlier turns, say), the conversation forks: the next
turn starts a new sequence with the whole prompt as the template now renders it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from opd.errors import ModelError
from opd.types import Message, Segment, TeacherView, Trajectory

Tools = list[dict[str, Any]] | None
_MARK = "\u2063opd\u2063"  # stands for an assistant's content while the glue after it is rendered
_PROBE = {"type": "function", "function": {"name": "opd_probe", "description": "", "parameters": {"type": "object"}}}
_CALL_FORM = '<tool_call>{"name": ..., "arguments": {...}}</tool_call>'


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids to put before the next completion; `forked` if they are a whole new prompt, not an addition."""

    token_ids: list[int]
    forked: bool = False


class ChatFormat:
    """A tokenizer and its chat template, as a conversation in token ids needs them.

    A template that knows no tools, no `tool` role or no `system` role is helped out in plain text: schemas
    go into the system message, tool results into user messages, the system text before the first user's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template_kwargs: dict[str, Any] | None = None,
        on_rewrite: Literal["fork", "append"] = "fork",
        stop_ids: Sequence[int] = (),
    ) -> None:
        if tokenizer.chat_template is None:
            raise ModelError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template; "
                "use an instruction-tuned model, or set tokenizer.chat_template and save it beside the model"
            )
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self.on_rewrite = on_rewrite
        user = {"role": "user", "content": "x"}
        self._knows_system = self._accepts([{"role": "system", "content": "opd_probe"}, user])
        self._knows_tool_role = self._accepts(
            [user, {"role": "assistant", "content": "y"}, {"role": "tool", "content": "opd_probe"}]
        )
        self._knows_tools = self._accepts([user], tools=[_PROBE])
        self.end_id = self._find_end(self.encode(self._glue_text([user], [user], None)), stop_ids)
        """The id that ends an assistant's turn in this template."""
        self.stop_ids = frozenset({self.end_id, *stop_ids} | ({tokenizer.eos_token_id} - {None}))

    # -- the student's side ---------------------------------------------------------------------------

    def start(self, messages: list[Message], tools: Tools = None, **template_kwargs: Any) -> list[int]:
        """The ids of a conversation's first prompt, up to where the assistant speaks."""
        return self.encode(self._render(messages, tools, generate=True, **template_kwargs))

    def extend(self, history: list[Message], new: list[Message], tools: Tools, *, last_id: int | None) -> Prompt:
        """The ids between a completion and the next one.

        `history` ends with the assistant's message as text; `new` is what the environment answered;
        `last_id` is the last id of the completion: if it does not end the turn (the token limit cut it),
        the ids begin with the end-of-turn token, which then belongs to the prompt and is not trained.
        """
        if self.on_rewrite == "fork" and self._rewrites(history, new, tools):
            return Prompt(self.start([*history, *new], tools), forked=True)
        return Prompt(self._after(self.encode(self._glue_text(history[:-1], new, tools)), last_id))

    def text(self, completion_ids: Sequence[int]) -> str:
        """The action: the decoded completion without its end-of-turn token, tool markup kept."""
        ids = list(completion_ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    # -- the teacher's side ---------------------------------------------------------------------------

    def view(
        self,
        trajectory: Trajectory,
        segment: Segment,
        rewrite: Callable[[int, list[Message]], list[Message]],
        **template_kwargs: Any,
    ) -> TeacherView:
        """The teacher's sequence for one segment: other prompts, the same sampled ids.

        `rewrite(turn, messages)` gets a turn's number and messages (the whole conversation so far for the
        first turn of a segment, what the environment added for the others) and returns what the teacher
        reads in their place.
        Without `template_kwargs`, messages that come back unchanged keep the student's ids to the letter.
        """
        ids: list[int] = []
        rows: list[int] = []
        for number, turn in enumerate(segment.turns, start=segment.start):
            messages = rewrite(number, turn.messages)
            if messages == turn.messages and not template_kwargs:
                ids += turn.prompt_ids
            elif number == segment.start:
                ids += self.start(messages, trajectory.tools, **template_kwargs)
            else:
                placeholder: list[Message] = [{"role": "user", "content": "x"}]
                glue = self._glue_text(placeholder, messages, trajectory.tools, **template_kwargs)
                ids += self._after(self.encode(glue), ids[-1])
            rows += range(len(ids) - 1, len(ids) - 1 + len(turn.completion_ids))
            ids += turn.completion_ids
        return TeacherView(token_ids=ids, rows=rows)

    # -- rendering ------------------------------------------------------------------------------------

    def _find_end(self, closing: list[int], stop_ids: Sequence[int]) -> int:
        """The end-of-turn id in what a template puts after a completion; white space may stand before it."""
        known = {*self.tokenizer.added_tokens_decoder, self.tokenizer.eos_token_id, *stop_ids}
        for token in closing:
            if token in known:
                return token
        raise ModelError(
            f"the chat template of {self.tokenizer.name_or_path!r} ends an assistant's turn with no token of its own, "
            "so that a sampler would not know where to stop; use a template with an end-of-turn token"
        )

    def _after(self, glue: list[int], last_id: int | None) -> list[int]:
        if last_id == self.end_id and self.end_id in glue:
            return glue[glue.index(self.end_id) + 1 :]
        return glue

    def _glue_text(self, before: list[Message], new: list[Message], tools: Tools, **template_kwargs: Any) -> str:
        mark = _MARK
        while any(mark in str(message.get("content")) for message in new):  # an environment may say anything
            mark += _MARK
        marked = [*before, {"role": "assistant", "content": mark}, *new]
        text = self._render(marked, tools, generate=True, **template_kwargs)
        if mark not in text:
            raise ModelError(
                f"the chat template of {self.tokenizer.name_or_path!r} does not render an assistant's content"
            )
        return text.rpartition(mark)[2]

    def _rewrites(self, history: list[Message], new: list[Message], tools: Tools) -> bool:
        """Whether the next prompt, as the template renders it, no longer starts with what was seen.

        White space that the template trims from a completion's ends, or adds there, is not a rewrite.
        """
        seen = self._render(history[:-1], tools, generate=True)
        now = self._render([*history, *new], tools, generate=True)
        content = str(history[-1]["content"]).strip()
        return not (now.startswith(seen) and now[len(seen) :].lstrip().startswith(content))

    def _render(self, messages: list[Message], tools: Tools, *, generate: bool, **template_kwargs: Any) -> str:
        plain = self._in_plain_text(messages, tools)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    plain,
                    tools=tools if self._knows_tools else None,
                    tokenize=False,
                    add_generation_prompt=generate,
                    **{**self.template_kwargs, **template_kwargs},
                )
            )
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise ModelError(
                f"the chat template of {self.tokenizer.name_or_path!r} refuses the roles "
                f"{', '.join(str(m['role']) for m in messages)}: {error}"
            ) from error

    def _in_plain_text(self, messages: list[Message], tools: Tools) -> list[Message]:
        """The messages, with what the template does not know moved into what it knows."""
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
        """Whether the template renders these without complaint and without dropping the probe."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=False, **self.template_kwargs
            )
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError):
            return False
        return "opd_probe" in str(text)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, no special tokens added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _tool_results_as_user(messages: list[Message]) -> list[Message]:
    """Tool results as user messages, those of one turn in one: strict templates want the roles to alternate."""
    plain: list[Message] = []
    after_result = False
    for message in messages:
        if message["role"] == "tool" and after_result:
            plain[-1] = {"role": "user", "content": f"{plain[-1]['content']}\n{message['content']}"}
        else:
            plain.append({**message, "role": "user"} if message["role"] == "tool" else message)
        after_result = message["role"] == "tool"
    return plain
