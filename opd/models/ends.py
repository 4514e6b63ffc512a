"""The tokens that end a turn of the assistant, by the kind of turn: an answer, or a call of tools.

A template says it where it renders a conversation: what stands behind the assistant's words. Some families end every
turn with one token (ChatML), some have one for each kind (gpt-oss: `<|return|>` and `<|call|>`), and for some the end
is the token that opens the next turn (GLM: `<|user|>` and `<|observation|>`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from opd.errors import ModelError
from opd.models.encoding import control_strings
from opd.models.habits import PROBE, VALUE, probe_reply, result_of
from opd.types import Message

if TYPE_CHECKING:
    from opd.models.template import ChatTemplate

_ANSWER, _NEXT = "opdAnswer", "opdNext"
_USER: Message = {"role": "user", "content": "opdQuestion"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """The ids that end a turn."""

    answer: int
    """Ends an answer."""
    call: int
    """Ends a turn that calls tools."""
    stops: frozenset[int]
    """All that end a turn: these two, the tokenizer's, and those of the model's generation settings."""
    closers: frozenset[int]
    """Those that a template writes behind a turn and that say nothing of what follows. Where the model has ended its
    turn by another of `stops`, that one stands for them."""
    wrappers: frozenset[int]
    """Those that close an answer, and not the turn."""
    is_blank: Callable[[int], bool]
    """True for a token of white space."""

    def after(self, glue: list[int], last_id: int | None) -> list[int]:
        """The ids that are still to come behind a completion, given all that the template puts there.

        Nothing is left out where the completion was cut, so that `last_id` is no end. Only what stands first closes the
        turn, white space and `wrappers` aside.
        """
        if last_id not in self.stops:
            return glue
        at = next((n for n, token in enumerate(glue) if token not in self.wrappers and not self.is_blank(token)), None)
        if at is None or (glue[at] != last_id and glue[at] not in self.closers):
            return glue
        return glue[at + 1 :]


def find_ends(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, stop_ids: Sequence[int]) -> Ends:
    """Find the ends of turns. `stop_ids` are those of the model's generation settings.

    Raises ModelError where the template ends a turn with no token of its own: a sampler would not know where to stop.
    """
    eos = {tokenizer.eos_token_id} - {None}
    known = {*tokenizer.convert_tokens_to_ids(sorted(control_strings(tokenizer))), *eos, *stop_ids}
    unknown = {None, tokenizer.unk_token_id}
    wrappers = set(tokenizer.convert_tokens_to_ids(list(template.format.wrappers))) - unknown
    tails = _Tails(template, known, wrappers)
    answered = tails.of([_USER, {"role": "assistant", "content": _ANSWER}], _ANSWER)
    followed = tails.of([_USER, {"role": "assistant", "content": _ANSWER}, {**_USER, "content": _NEXT}], _ANSWER)
    if not (answered or followed):
        template.check_renders(_ANSWER)
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path!r} ends an assistant's turn with no token of its own, "
            "so that a sampler would not know where to stop; use a template with an end-of-turn token"
        )
    answer = (answered or followed)[0]
    called, returned = _around_a_call(template, tails)
    # What stands before a result ends the call where the model is known to stop at it, whatever closes a last call; and
    # where nothing else ends any turn (GLM).
    known_to_stop = [token for token in returned[:1] if token in stop_ids]
    call = next(iter(known_to_stop or called or answered or returned), answer)
    special = _special(tokenizer, template)
    opens = {tail[0] for tail in (followed, returned) if tail and not special.intersection(tail[1:])} - set(answered)
    closers = {tail[0] for tail in (answered, followed, called, returned) if tail} - opens
    stops = frozenset({answer, call, *eos, *stop_ids})
    return Ends(
        answer=answer,
        call=call,
        stops=stops,
        closers=frozenset(closers),
        wrappers=frozenset(wrappers - stops),
        is_blank=lambda token: not str(tokenizer.decode([token])).strip(),
    )


def _around_a_call(template: ChatTemplate, tails: _Tails) -> tuple[list[int], list[int]]:
    """The control tokens behind a last call, and those between a call and its result."""
    habit = template.habits.calls
    if habit is None:
        return [], []
    said = probe_reply(habit)
    called = tails.of([_USER, said], VALUE, skip=habit.close)
    return called, tails.of([_USER, said, result_of(said, _NEXT)], VALUE, skip=habit.close)


def _special(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> set[int]:
    """The special tokens that are no markup of a call's or a result's text."""
    call_text = template.habits.calls.written if template.habits.calls is not None else ""
    added = tokenizer.added_tokens_decoder.items()
    return {number for number, token in added if token.special and str(token.content) not in call_text}


@dataclass(frozen=True, slots=True)
class _Tails:
    template: ChatTemplate
    known: set[int]
    wrappers: set[int]
    """They close an answer, and not the turn."""

    def of(self, messages: list[Message], words: str, *, skip: str = "") -> list[int]:
        """The control tokens between an assistant's words and those of the message behind it, or the end."""
        try:
            text = self.template.render(messages, [PROBE], generate=False)
        except ModelError:
            return []
        plain = self.template.encoder.plain(text)
        if words not in plain:
            return []
        tail = plain.rpartition(words)[2].removeprefix(skip).partition(_NEXT)[0]
        found = [token for token in self.template.encoder.encode_next(tail) if token in self.known]
        return [token for token in found if token not in self.wrappers] or found
