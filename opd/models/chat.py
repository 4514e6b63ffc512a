"""From messages to token ids and back, tokens in and tokens out over many turns.

Sampled ids are never decoded and encoded again: a conversation grows by the ids that were sampled and
the ids that the template puts between them (the glue). Only prompts and glue are ever tokenised. Where the
template rewrites the past, the conversation may fork: the next turn starts a new sequence with the whole prompt as the
template now renders it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date as Date
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd.formats import Format, read_reply
from opd.models.ends import Ends, find_ends
from opd.models.glue import Glue, OnRewrite
from opd.models.habits import Tools
from opd.models.replies import Replies
from opd.models.template import ChatTemplate
from opd.types import Message, Segment, TeacherView, Trajectory


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids to put before the next completion; `forked` means that they are a whole new prompt, not an addition."""

    token_ids: list[int]
    forked: bool = False


class ChatFormat:
    """Turns a conversation into token ids, with a tokenizer and its chat template (`opd.models.template`).

    Where the template rewrites the past, `on_rewrite` decides: "fork" begins a new sequence, "append" goes on with the
    ids as they are, and "auto" forks only where more than the thoughts of earlier turns is rewritten. `form` names the
    format of replies (`opd.formats`); None reads it off the template. `date` is the day that the template is told.
    Raises ModelError where the tokenizer has no template, or one that ends a turn with no token of its own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template_kwargs: dict[str, Any] | None = None,
        on_rewrite: OnRewrite = "auto",
        stop_ids: Sequence[int] = (),
        form: str | None = None,
        date: Date | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self.on_rewrite: OnRewrite = on_rewrite
        self.date = date
        self.form_is_set = form is not None
        self.template = ChatTemplate(tokenizer, self.template_kwargs, form=form, date=date)
        self.ends: Ends = find_ends(tokenizer, self.template, stop_ids)
        """The ids that end a turn, by its kind."""
        self.replies = Replies(self.template, self.ends)
        self._glue = Glue(self.template, self.ends)
        self.end_id = self.ends.answer
        """The id that ends an answer in this template; `ends.call` ends a call of tools."""
        self.stop_ids = self.ends.stops
        self.starts_thinking = self.template.habits.opens
        """The prompt opens a thought, which the model goes on with."""

    @property
    def format(self) -> Format:
        """How replies are written: thoughts, calls."""
        return self.template.format

    # -- the student's side ---------------------------------------------------------------------------

    def start(self, messages: list[Message], tools: Tools = None, **template_kwargs: Any) -> list[int]:
        """The ids of a conversation's first prompt, up to where the assistant speaks."""
        return self.template.encoder.encode(self.template.render(messages, tools, generate=True, **template_kwargs))

    def extend(self, history: list[Message], new: list[Message], tools: Tools, *, last_id: int | None) -> Prompt:
        """The ids between a completion and the next one.

        `history` ends with the assistant's message as text; `new` is what the environment answered;
        `last_id` is the last id of the completion: if it does not end the turn (the token limit cut it),
        the ids begin with the end-of-turn token, which then belongs to the prompt and is not trained.
        """
        thoughts = self.on_rewrite == "fork"
        if self.on_rewrite != "append" and self._glue.rewrites(history, new, tools, thoughts=thoughts):
            return Prompt(self.start([*history, *new], tools), forked=True)
        return Prompt(self._glue.ids(history[:-1], history[-1], new, tools, last_id))

    def encode(self, text: str) -> list[int]:
        """The ids of a text that the model might say, markup included: it goes on from what stands before it."""
        return self.template.encoder.encode_next(text)

    def text(self, completion_ids: Sequence[int]) -> str:
        """The decoded completion without its end-of-turn token, markup kept."""
        ids = list(completion_ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def action(self, text: str) -> str:
        """What an environment gets of a completion's text: the text, where tools are called or thoughts are tagged.

        A format that wraps its answers too (gpt-oss has channels) gives the answer as others write it, with the thought
        in `<think>` tags before it: rewards look for these.
        """
        if not (self.format.wrappers or self.format.whole):
            return text
        reply = read_reply(text, self.format.name, starts_thinking=self.starts_thinking)
        if reply.calls:
            return text
        thought = f"<think>\n{reply.thought}\n</think>\n\n" if reply.thought else ""
        return f"{thought}{reply.content}"

    def spoken(self, history: list[Message], message: Message, tools: Tools) -> list[int]:
        """The ids of an assistant's message that nobody sampled, with the token that ends such a turn.

        They follow the prompt that `start` or `extend` gives. Raises ModelError where the template renders the message
        otherwise than a reply to that prompt.
        """
        return self.replies.ids(history, message, tools)

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
        before: list[Message] = []
        said: Message = {}
        for number, turn in enumerate(segment.turns, start=segment.start):
            messages = rewrite(number, turn.messages)
            if messages == turn.messages and not template_kwargs:
                ids += turn.prompt_ids
            elif number == segment.start:
                ids += self.start(messages, trajectory.tools, **template_kwargs)
            else:
                ids += self._glue.ids(before, said, messages, trajectory.tools, ids[-1], **template_kwargs)
            if number == segment.start:
                ids += opening
                before = list(turn.messages)
            else:
                before += [said, *turn.messages]
            said = {"role": "assistant", "content": turn.text}
            rows += range(len(ids) - 1, len(ids) - 1 + len(turn.completion_ids))
            ids += turn.completion_ids
        return TeacherView(token_ids=ids, rows=rows)
