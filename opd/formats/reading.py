"""Taking a reply apart, for every family whose calls and thoughts stand between markers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from opd.formats.blocks import CallReader, literal, marks_of
from opd.formats.form import ENDS, Begun, Format
from opd.formats.reply import Reply, join_thoughts
from opd.formats.source import Source


def read_marked(text: str, form: Format, *, starts_thinking: bool, names: frozenset[str]) -> Reply:
    """Read a reply by the markers of its family. No text makes this raise; it takes time linear in the length."""
    return _Reading(text, form, names).read(starts_thinking=starts_thinking)


def without_end(text: str) -> str:
    """Cut the token that ended the text, and white space around it."""
    text = text.rstrip()
    for token in ENDS:
        if text.endswith(token):
            return text.removesuffix(token)
    return text


def unite(families: Iterable[Format], *, example: Format) -> Format:
    """Return the format of texts whose format is not known; it writes calls like `example`."""
    families = tuple(families)
    return Format(
        name="auto",
        example=example.example,
        write=example.write,
        blocks=tuple(block for family in families for block in family.blocks if block.auto),
        frame=tuple(dict.fromkeys(pair for family in families for pair in family.frame)),
        bares=tuple(dict.fromkeys(bare for family in families for bare in family.bares if bare.auto)),
        thought=tuple(dict.fromkeys(pair for family in families for pair in family.thought if not family.whole)),
        wrappers=tuple(dict.fromkeys(wrapper for family in families for wrapper in family.wrappers)),
        families=families,
    )


@cache
def _decided(form: Format, opener: str) -> Format:
    """The format that is left once the first marker is known: its owner, and what others write between that marker."""
    if not form.families:
        return form
    by_frame = [family for family in form.families if opener in dict(family.frame)]
    shared = [block for block in form.blocks if block.opener == opener]
    any_body = [block for block in shared if not block.starts]
    owners = [family for block in any_body + shared for family in form.families if block in family.blocks]
    owner = [*by_frame, *owners][0]
    return Format(
        name=owner.name,
        example=owner.example,
        write=owner.write,
        blocks=(*(block for block in shared if block not in owner.blocks), *owner.blocks),
        frame=owner.frame,
        thought=form.thought,
        wrappers=form.wrappers,
    )


@cache
def _thoughts_of(form: Format) -> Format:
    """The format without its calls."""
    return Format(name=form.name, example=form.example, write=form.write, thought=form.thought, wrappers=form.wrappers)


class _Reading:
    """Reads one text. Its methods take the position to read from, note what they find, and return where to go on."""

    def __init__(self, text: str, form: Format, names: frozenset[str]) -> None:
        self.source = Source(without_end(text))
        self.text = self.source.text
        self.form = form
        self.names = names
        self.calls = CallReader(self.source, names)
        self.thoughts: list[str] = []
        self.content: list[str] = []
        self._kept = 0  # where the text begins that is not yet noted as content, a thought or a call
        self._since = 0  # where the last thought ended

    def read(self, *, starts_thinking: bool) -> Reply:
        marks = marks_of(self.form)
        answer: int | None = self._think(self._opened(0), marks.thought_end) if starts_thinking else 0
        while answer is not None:
            self.calls.forget()  # what was read so far turned out to be a thought
            self.content = []
            self._kept = self._since = answer
            answer = self._read_answer(answer)
        content = "".join(self.content)
        if marks.wrappers:
            content = marks.wrappers.sub("", content)
        return Reply(
            thought=join_thoughts(self.thoughts), content=content.strip(), calls=self.calls.calls, end=self.calls.end
        )

    def _opened(self, at: int) -> int:
        """The position behind an opening marker that repeats the one of the template."""
        mark = marks_of(self.form).all.match(self.text, self.source.skip_space(at))
        return mark.end() if mark and mark[0] in marks_of(self.form).thoughts else at

    def _read_answer(self, at: int) -> int | None:
        """Read up to the end, or up to the end of a thought that nothing opened: then where the answer begins anew."""
        form, marks = self.form, marks_of(self.form)
        while (mark := marks.all.match(self.text, self.source.skip_space(at))) and mark[0] in marks.thoughts:
            at = self._read_thought(mark)
        at, was_bare = self._read_bare(at)
        if was_bare:
            form = _thoughts_of(form)
        while mark := marks_of(form).all.search(self.text, at):
            if mark[0] in marks.thoughts:
                at = self._read_thought(mark)
            elif mark[0] in marks.thoughts.values():
                self.thoughts.append(self.text[self._since : mark.start()])
                return mark.end()
            else:
                form = _decided(form, mark[0])
                at = self._read_marked(form, mark)
        self._note(len(self.text))
        return None

    def _read_thought(self, mark: re.Match[str]) -> int:
        self._note(mark.start())
        closer = literal(marks_of(self.form).thoughts[mark[0]])
        self._kept = self._since = self._think(mark.end(), closer)
        return self._kept

    def _think(self, start: int, closer: re.Pattern[str]) -> int:
        """Note the thought that begins at `start`; it ends with the text where nothing closes it."""
        end = self.source.find(closer, start)
        self.thoughts.append(self.text[start : end.start() if end else None])
        return end.end() if end else len(self.text)

    def _note(self, end: int) -> None:
        self.content.append(self.text[self._kept : end])
        self._kept = end

    def _read_bare(self, at: int) -> tuple[int, bool]:
        """Read calls that are the whole text; return where to go on, and True if there were any."""
        for bare in self.form.bares:
            begun, end = bare.look(self.text, at, self.names)
            marks = marks_of(self.form)
            # A call in a string of something broken must not run, and prose with braces should say so.
            if begun is Begun.CALL or (begun is Begun.BROKEN and marks.calls and self.source.find(marks.calls, at)):
                self._note(at)
                self._kept = self.calls.read_open(_thoughts_of(self.form), bare.body, bare.example, at)
                return self._kept, True
            if begun is Begun.ANSWER:
                return end, False
        return at, False

    def _read_marked(self, form: Format, mark: re.Match[str]) -> int:
        """Read what follows an opening marker of a call or a frame."""
        frame = dict(form.frame).get(mark[0])
        block = None if frame else self.calls.block(form, mark.start())
        if frame is not None:
            self._note(mark.start())
            self._kept = self.calls.read_frame(form, mark.end(), frame)
        elif block is not None:
            self._note(mark.start())
            self._kept = self.calls.read_block(form, block, mark.end())
        else:
            return mark.end()  # the marker alone, in prose
        return self._kept
