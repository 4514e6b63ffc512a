"""From messages to token ids and back, tokens in and tokens out over many turns.

Sampled ids are never decoded and encoded again: a conversation grows by the ids that were sampled and
the ids that the template puts between them (the glue). Only prompts and glue are ever tokenised. Where the
template rewrites the past (it drops the thinking of earlier turns, say), the conversation forks: the next
turn starts a new sequence with the whole prompt as the template now renders it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from opd.errors import ModelError
from opd.models.template import ChatTemplate, Tools
from opd.types import Message, Segment, TeacherView, Trajectory

_MARK = "\u2063opd\u2063"  # stands for an assistant's content while the glue after it is rendered


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids to put before the next completion; `forked` means that they are a whole new prompt, not an addition."""

    token_ids: list[int]
    forked: bool = False


class ChatFormat:
    """Turns a conversation into token ids, with a tokenizer and its chat template (`opd.models.template`).

    Where the template rewrites the past, `on_rewrite` decides: "fork" begins a new sequence, "append" goes on with the
    ids as they are. Raises ModelError where the tokenizer has no template, or one that ends a turn with no token of its
    own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template_kwargs: dict[str, Any] | None = None,
        on_rewrite: Literal["fork", "append"] = "fork",
        stop_ids: Sequence[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self.on_rewrite = on_rewrite
        self._template = ChatTemplate(tokenizer, self.template_kwargs)
        user: Message = {"role": "user", "content": "x"}
        self.end_id = self._find_end(self.encode(self._glue_text([user], [user], None)), stop_ids)
        """The id that ends an assistant's turn in this template."""
        self.stop_ids = frozenset({self.end_id, *stop_ids} | ({tokenizer.eos_token_id} - {None}))

    # -- the student's side ---------------------------------------------------------------------------

    def start(self, messages: list[Message], tools: Tools = None, **template_kwargs: Any) -> list[int]:
        """The ids of a conversation's first prompt, up to where the assistant speaks."""
        return self.encode(self._template.render(messages, tools, generate=True, **template_kwargs))

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
        *,
        opening: Sequence[int] = (),
        **template_kwargs: Any,
    ) -> TeacherView:
        """The teacher's sequence for one segment: other prompts, the same sampled ids.

        `rewrite(turn, messages)` gets a turn's number and messages (the whole conversation so far for the
        first turn of a segment, what the environment added for the others) and returns what the teacher
        reads in their place.
        Without `template_kwargs`, messages that come back unchanged keep the student's ids to the letter.
        The ids of `opening` stand between the first prompt and the first completion, as if the model had begun its
        reply with them. They are read, not scored: only the last of them has a row, for the completion's first id.
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
            if number == segment.start:
                ids += opening
            rows += range(len(ids) - 1, len(ids) - 1 + len(turn.completion_ids))
            ids += turn.completion_ids
        return TeacherView(token_ids=ids, rows=rows)

    # -- rendering ------------------------------------------------------------------------------------

    def _find_end(self, closing: list[int], stop_ids: Sequence[int]) -> int:
        """Find the end-of-turn id in what a template puts after a completion; white space may stand before it."""
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
        text = self._template.render(marked, tools, generate=True, **template_kwargs)
        if mark not in text:
            raise ModelError(
                f"the chat template of {self.tokenizer.name_or_path!r} does not render an assistant's content"
            )
        return text.rpartition(mark)[2]

    def _rewrites(self, history: list[Message], new: list[Message], tools: Tools) -> bool:
        """True if the next prompt, as the template renders it, no longer starts with what the student has seen.

        White space that the template trims from a completion's ends, or adds there, is not a rewrite.
        """
        seen = self._template.render(history[:-1], tools, generate=True)
        now = self._template.render([*history, *new], tools, generate=True)
        content = str(history[-1]["content"]).strip()
        return not (now.startswith(seen) and now[len(seen) :].lstrip().startswith(content))

    def encode(self, text: str) -> list[int]:
        """The ids of a text, no special tokens added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
