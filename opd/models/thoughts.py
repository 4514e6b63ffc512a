"""Thoughts in rendered text: where they stand, and what a text goes on with behind another, thoughts aside."""

from __future__ import annotations

import re

from opd.formats import Format


def whole_thoughts(form: Format, generation_prompt: str) -> re.Pattern[str]:
    """Find whole thoughts, with the white space behind them, and one that a text's end leaves open.

    A thought that a template drops may leave the marker that closes it, right behind the generation prompt (GLM 4.7).
    A format that speaks anew after a thought (gpt-oss) repeats the generation prompt: it goes along.
    """
    again = f"(?:{re.escape(generation_prompt)})?" if generation_prompt.strip() else ""
    pieces = []
    for opened, closed in form.thought:
        head = re.escape(opened.strip())
        pieces += [rf"{head}(?:(?!{head}).)*?{re.escape(closed.strip())}\s*{again}", rf"{head}\s*\Z"]
        if again:
            pieces.append(rf"(?<={re.escape(generation_prompt)}){re.escape(closed.strip())}\s*")
    return re.compile("|".join(pieces) or r"(?!)", re.DOTALL)


def behind(whole: str, start: str) -> str | None:
    """What a text goes on with behind its start; None where it starts otherwise, white space aside."""
    if whole.startswith(start):
        return whole[len(start) :]
    at = 0
    for character in start:
        if not character.isspace():
            while at < len(whole) and whole[at].isspace():
                at += 1
            if not whole.startswith(character, at):
                return None
            at += 1
    return whole[at:].lstrip() if start[-1:].isspace() else whole[at:]


def scaffold(form: Format) -> re.Pattern[str]:
    """Find a thought that stands at a prompt's end: empty, or just opened."""
    pieces = [rf"{re.escape(o.strip())}\s*(?:{re.escape(c.strip())}\s*)?\Z" for o, c in form.thought]
    return re.compile("|".join(pieces) or r"(?!)")
