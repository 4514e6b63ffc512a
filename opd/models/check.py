"""Checks how a model's text is made and read, from its tokenizer and chat template alone, in a second or two.

It renders conversations as a run will, reads them back with the parser that the run will use, and says what came out:
a row for a person for each question, and a sentence for each answer that a run would break on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from opd.errors import ModelError
from opd.formats import MalformedCall, read_reply
from opd.models.chat import ChatFormat
from opd.models.encoding import control_strings
from opd.models.habits import PROBE, probe_reply, result_of
from opd.models.replies import EndsEarly
from opd.models.tokenizers import SAMPLE, is_as_file_says, misbuilt_class
from opd.types import Message

_USER: Message = {"role": "user", "content": "Where is the key?"}
_MORE: Message = {"role": "user", "content": "Are you sure?"}
_THOUGHT = "It may be in the box."
_WORDS, _ROUNDS = 8000, 24
"""The words of the first messages, and the rounds of a long conversation, that a template must show whole."""


@dataclass
class Report:
    """What was found."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    """Each question and its answer, in words."""
    problems: list[str] = field(default_factory=list)
    """What a run cannot go on with, with the setting and the mend."""
    notes: list[str] = field(default_factory=list)
    """What a person should know."""
    facts: dict[str, bool] = field(default_factory=dict)
    """`renders`, `reads_calls`, `ends`, `round_trip`, `forks`, `keeps_markup_text`, `whole`."""

    def add(self, name: str, text: str) -> None:
        self.rows.append((name, text))


def check_text(
    tokenizer: PreTrainedTokenizerBase,
    make: Callable[[], ChatFormat],
    *,
    own_ends: Sequence[int] = (),
    file: Path | None = None,
    tools: bool = True,
) -> Report:
    """Check a tokenizer and its template.

    Args:
        make: makes the chat format of the run.
        own_ends: the ids that end a text by the model's generation settings.
        file: the model's tokenizer.json, where there is one.
        tools: the environment offers tools.
    """
    report = Report()
    _check_tokenizer(report, tokenizer, file)
    try:
        chat = make()
    except ModelError as error:
        report.problems.append(str(error))
        report.facts |= {"renders": False}
        return report
    report.facts["renders"] = True
    _check_settings(report, chat)
    _check_calls(report, chat, tools=tools)
    _check_ends(report, chat, own_ends)
    _check_thoughts(report, chat)
    _check_forks(report, chat)
    _check_markup(report, chat)
    _check_whole(report, chat)
    if chat.template.habits.dated:
        report.add("date", f"the template writes the day: {chat.date or 'by the clock'} (chat.date)")
    return report


def _check_settings(report: Report, chat: ChatFormat) -> None:
    """Check that the template looks at each setting that is passed to it."""
    for key, value in chat.template_kwargs.items():
        named = f"rollout.chat_template_kwargs.{key}"
        if key not in _looked_at(chat.template.source):
            report.problems.append(
                f"{named}: the chat template of {chat.tokenizer.name_or_path!r} does not look at it, so that it would "
                "change nothing. Remove it, or see what the template calls it"
            )
        elif isinstance(value, str) and value.lower() in ("true", "false"):
            report.problems.append(f"{named} = {value!r} is a text, which counts as true. Write {value.lower()}")


def _looked_at(source: str) -> Collection[str]:
    """The names that a template takes from outside; where that cannot be told, all words of its text."""
    plain = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", source)  # a tag of transformers' own
    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except jinja2.TemplateSyntaxError:
        return set(re.findall(r"\w+", source))
    return jinja2.meta.find_undeclared_variables(parsed)


def show(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as a person reads it."""
    return f"{tokenizer.decode([token])!r} ({token})"


def _check_tokenizer(report: Report, tokenizer: PreTrainedTokenizerBase, file: Path | None) -> None:
    """Check that text comes back as it was, and that the tokenizer does what its own file says."""
    ids = list(tokenizer(SAMPLE, add_special_tokens=False)["input_ids"])
    back = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    same = back.strip() == SAMPLE
    report.facts["round_trip"] = same
    said = "text comes back as it was" if same else f"text changes: {SAMPLE!r} comes back as {back!r}"
    if not same:
        report.notes.append(
            f"the tokenizer {tokenizer.name_or_path!r} does not give back the text that it encodes: {said}"
        )
    if file is not None and file.is_file():
        same = report.facts["as_its_file"] = is_as_file_says(tokenizer, file)
        if not same:
            told = Tokenizer.from_file(str(file)).encode(SAMPLE, add_special_tokens=False).ids
            report.problems.append(
                f"the tokenizer of {tokenizer.name_or_path!r} is built otherwise than its tokenizer.json says: "
                f"{SAMPLE[:24]!r} is {told[:8]} by the file, and {ids[:8]} as it was loaded. Its tokenizer_config.json "
                "names a class that does not fit; set tokenizer_class: PreTrainedTokenizerFast there"
            )
        said += ", as its file says" if same else ", and not as its file says"
        if kind := misbuilt_class(tokenizer):
            said += f", and not as {kind}, which its tokenizer_config.json names"
    report.add("tokenizer", said)


def _check_calls(report: Report, chat: ChatFormat, *, tools: bool) -> None:
    """Check that a call that the template renders is read back, and say how tools are told and answered."""
    habits = chat.template.habits
    if habits.calls is not None:
        written = " ".join(habits.calls.written.split())
        report.add("format", f"{habits.form}; the template writes a call as {written}")
    elif habits.unread is not None:
        shown = " ".join(habits.unread.split())[:200]
        report.add("format", f"{habits.form}; the template's own calls are not read")
        text = (
            f"the chat template writes a call as {shown}, which no format reads; calls are expected as "
            f"{chat.format.example}. If the model writes another of our formats, set env.kwargs.tool_format"
        )
        (report.problems if tools and not _told_otherwise(chat) else report.notes).append(text)
    else:
        report.add("format", f"{habits.form}; the template renders no calls, so that they stand in the text")
    if not habits.tools:
        report.add("tools", "the template has no place for tools: they are told in the system message")
    report.facts["reads_calls"] = _reads_back(chat)
    if not report.facts["reads_calls"] and tools:
        report.problems.append(
            f"a call of this template is not read back by the format {habits.form}; set env.kwargs.tool_format"
        )
    if not habits.tool_role:
        report.add("results", "the template knows no results of tools: they are given as the user's messages")
    if not habits.system:
        report.add("system", "the template knows no system message: it stands before the first user message")


def _told_otherwise(chat: ChatFormat) -> bool:
    """True if the prompt asks for calls in the form that is read, or the form was set by a person."""
    return chat.form_is_set or chat.template.habits.form == "llama"


def _reads_back(chat: ChatFormat) -> bool:
    habits = chat.template.habits
    said = probe_reply(habits.calls) if habits.calls is not None else _plain_call()
    call = said["tool_calls"][0]["function"]
    try:
        ids = chat.spoken([_USER], said, [PROBE])
    except ModelError:
        return False
    reply = read_reply(chat.text(ids), chat.format.name, starts_thinking=chat.starts_thinking, names=(call["name"],))
    found = [] if any(isinstance(c, MalformedCall) for c in reply.calls) else reply.calls
    wanted = PROBE["function"]["name"]  # type: ignore[index]
    return [getattr(c, "name", None) for c in found] == [wanted]


def _plain_call() -> Message:
    call = {"function": {"name": PROBE["function"]["name"], "arguments": {"opd_key": "x"}}}  # type: ignore[index]
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _check_ends(report: Report, chat: ChatFormat, own_ends: Sequence[int]) -> None:
    ends, tokenizer = chat.ends, chat.tokenizer
    both = [("an answer", ends.answer), *([("a call", ends.call)] if ends.call != ends.answer else [])]
    report.add("ends", "; ".join(f"{kind} ends with {show(tokenizer, token)}" for kind, token in both))
    report.add("stops", ", ".join(show(tokenizer, token) for token in sorted(ends.stops)))
    report.facts["ends"] = True
    missing = [show(tokenizer, token) for _, token in both if token not in own_ends]
    if own_ends and missing:
        report.notes.append(
            f"generation_config.json does not name {' and '.join(missing)}, with which the chat template ends a turn: "
            "we stop there, other programs may not"
        )


def _check_thoughts(report: Report, chat: ChatFormat) -> None:
    key = chat.template.habits.thought_key
    how = {None: "dropped by the template", "content": "kept where they stand in the text"}.get(
        key, f"rendered from {key}"
    )
    opened = "; the prompt opens one" if chat.starts_thinking else ""
    report.add("thoughts", f"{how}{opened}")
    if key is None:
        return
    try:
        chat.spoken([_USER], {"role": "assistant", "content": "In it.", "reasoning_content": _THOUGHT}, None)
    except EndsEarly:
        report.problems.append(
            f"the chat template of {chat.tokenizer.name_or_path!r} ends a thought with the token that ends an answer, "
            f"{show(chat.tokenizer, chat.end_id)}, so that each turn would be over before its answer. Let the template "
            "end answers with a token of their own, or drop thoughts"
        )
    except ModelError:
        return  # a prompt that closes the thought leaves no room for one: `_check_forks` goes on without


def _check_forks(report: Report, chat: ChatFormat) -> None:
    """Say whether the conversation goes on in one sequence."""
    rewritten = {}
    for mode in ("auto", "fork"):
        try:
            rewritten[mode] = _forks(chat, mode, thought=True)
        except ModelError:  # a prompt that closes the thought leaves no room for one
            rewritten[mode] = _forks(chat, mode, thought=False)
    report.facts["forks"] = rewritten["auto"]
    if rewritten["auto"]:
        text = "the template rewrites earlier turns: a conversation begins anew at later turns, as the template has it"
    elif rewritten["fork"]:
        text = "the template drops the thoughts of earlier turns; the conversation goes on with them, in one sequence"
        text += " (rollout.on_rewrite: fork begins anew, as a deployed model would read it)"
    else:
        text = "none: a conversation is one sequence"
    report.add("rewrites", text)


def _forks(chat: ChatFormat, mode: str, *, thought: bool) -> bool:
    """True if a conversation of two calls, an answer and another question forks, each after a thought or not."""
    was, chat.on_rewrite = chat.on_rewrite, mode  # type: ignore[assignment]
    try:
        history: list[Message] = [_USER]
        key = chat.template.habits.thought_key
        hm = {"reasoning_content": _THOUGHT} if thought and key not in (None, "content") else {}
        call = probe_reply(chat.template.habits.calls) if chat.template.habits.calls else _plain_call()
        results = [result_of(call)] if chat.template.habits.calls else [{"role": "tool", "content": "a box"}]
        forked = False
        answer: Message = {"role": "assistant", "content": "In it."}
        for said, new in ((call | hm, results), (call | hm, results), (answer | hm, [_MORE])):
            try:
                ids = chat.spoken(history, said, [PROBE])
                last, text = ids[-1], chat.text(ids)
            except ModelError:  # the template writes no reply behind this prompt: then what a model would say
                if thought:
                    raise
                last = chat.ends.call if said.get("tool_calls") else chat.end_id
                text = str(chat.template.in_text(said)["content"])
            history.append({"role": "assistant", "content": text})
            forked |= chat.extend(history, new, [PROBE], last_id=last).forked
            history += new
        return forked
    finally:
        chat.on_rewrite = was


def _check_markup(report: Report, chat: ChatFormat) -> None:
    """Check that nothing that a tool or a user says becomes a control token."""
    hostile = " ".join(sorted(control_strings(chat.tokenizer)))
    controls = {chat.tokenizer.convert_tokens_to_ids(text) for text in control_strings(chat.tokenizer)}
    try:
        plain, forged = ([i for i in _told(chat, text) if i in controls] for text in ("x", hostile))
    except ModelError as error:
        report.facts["keeps_markup_text"] = False
        report.problems.append(str(error))
        return
    report.facts["keeps_markup_text"] = plain == forged
    if plain != forged:
        report.problems.append(
            f"markup in a message becomes structure in the chat template of {chat.tokenizer.name_or_path!r}: a web "
            "page could forge a turn"
        )
    report.add("markup", f"{len(controls)} control tokens; in messages and results they stay text")


def _check_whole(report: Report, chat: ChatFormat) -> None:
    """Check that the template shows all of a long message and all messages of a long conversation."""
    words = " ".join(f"opdWord{n}." for n in range(_WORDS))
    conversation: list[Message] = [{"role": "system", "content": f"system {words}"}]
    habit = chat.template.habits.calls
    for n in range(_ROUNDS):
        call = probe_reply(habit) if habit else _plain_call()
        more = "" if n else words
        text = f"result{n}. {more}."
        result = result_of(call, text) if habit else {"role": "tool", "content": text}
        said: Message = {"role": "assistant", "content": f"answer{n}. {more}."}
        conversation += [{"role": "user", "content": f"question{n}. {more}."}, call, result, said]
    conversation.append(_MORE)
    try:
        shown = chat.template.encoder.plain(chat.template.render(conversation, [PROBE], generate=True))
    except ModelError as error:
        report.problems.append(str(error))
        return
    texts = (str(message.get("content") or "") for message in conversation)
    lost = [text.split(" ")[0].rstrip(".") for text in texts if text not in shown]
    report.facts["whole"] = not lost
    if lost:
        report.problems.append(
            f"the chat template of {chat.tokenizer.name_or_path!r} cuts or drops messages: of a conversation of "
            f"{len(conversation)} messages, {len(lost)} are not shown whole ({', '.join(lost[:4])}). Mend the template"
        )


def _told(chat: ChatFormat, text: str) -> list[int]:
    """The ids of a prompt and of a tool's result that hold a text."""
    first: Message = {"role": "user", "content": f"a {text} b"}
    call = probe_reply(chat.template.habits.calls) if chat.template.habits.calls else _plain_call()
    said = {"role": "assistant", "content": chat.text(chat.spoken([_USER], call, [PROBE]))}
    result: dict[str, Any] = (
        {**result_of(probe_reply(chat.template.habits.calls))} if chat.template.habits.calls else {"role": "tool"}
    )
    glue = chat.extend([_USER, said], [{**result, "content": f"a {text} b"}], [PROBE], last_id=None)
    return [*chat.start([first], [PROBE]), *glue.token_ids]
