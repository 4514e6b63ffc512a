"""What a family of models is described by: the markers of its calls and thoughts, and readers of what lies between."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from opd.formats.bodies import Body
from opd.formats.reply import Reply

THINK = (("<think>", "</think>"),)
"""How most families enclose a thought."""
ENDS = (
    *("<|eom_id|>", "<|eot_id|>", "<|eom|>", "<|eot|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>", "</s>"),
    *("<|end|>", "<|end_of_turn|>", "<end_of_turn>", "<turn|>", "<eos>", "<|END_OF_TURN_TOKEN|>", "<|return|>"),
    *("<｜end▁of▁sentence｜>", "<|user|>", "<|observation|>", "<|tool_response>", "<start_function_response>"),
    *("<seed:eos>", "[e~[", "<SPECIAL_12>", "<|end_of_role|>"),
)
"""Tokens after which a model stops; one that is no stop token of the run stands at the end of the text."""

ReadWhole = Callable[[str, bool], Reply]
"""From a text, and whether it starts within a thought, to the reply."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One way in which a family marks calls: an opening marker, a body, and a closing marker or none."""

    opener: str
    body: Body
    example: str
    """One call, for error texts."""
    closer: str = ""
    must_close: bool = True
    """False: where the body says itself where it ends, the closing marker may be missing."""
    starts: re.Pattern[str] | None = None
    """What the text behind the opening marker must match; a group `offered` must be the name of a tool on offer."""
    framed: bool = False
    """True: the opening marker means something inside the family's frame alone."""
    auto: bool = True
    """False: another family reads this marker where the format is not known."""


class Begun(Enum):
    """What a text without markers begins with."""

    CALL = auto()
    """Something that is meant as a call, well-formed or not."""
    ANSWER = auto()
    """A value that is no call, such as `{"answer": 42}`. Its strings hold no calls."""
    BROKEN = auto()
    """What looks like such a value and cannot be read."""
    PROSE = auto()


@dataclass(frozen=True, kw_only=True)
class Bare:
    """Calls that are the whole text, without markers."""

    body: Body
    example: str
    look: Callable[[str, int, frozenset[str]], tuple[Begun, int]]
    """From a text, a position and the names of the tools on offer to what begins there, and where an answer ends."""
    auto: bool = True
    """False: another family reads such texts where the format is not known."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Format:
    """How one family of models writes a reply: thoughts, tool calls, and the text around them."""

    name: str
    example: str
    """One call, for error texts and prompts."""
    write: Callable[[str, dict[str, Any]], str]
    """Writes a call of a name and arguments as a model of the family would."""
    blocks: tuple[Block, ...] = ()
    frame: tuple[tuple[str, str], ...] = ()
    """Markers that enclose all calls of a reply, by pairs."""
    bares: tuple[Bare, ...] = ()
    thought: tuple[tuple[str, str], ...] = THINK
    """Markers that may enclose a thought, by pairs."""
    wrappers: tuple[str, ...] = ()
    """Markers around the answer, which are no part of it."""
    inner: tuple[str, ...] = ()
    """Markers that stand inside calls."""
    stop: str = ""
    """The marker that closes a call and ends the turn at once; "" where another token ends the turn."""
    whole: ReadWhole | None = None
    """Reads the reply of a family whose structure is another."""
    begins: re.Pattern[str] | None = None
    """A text that begins so is of this family, where the format is not known."""
    families: tuple[Format, ...] = ()
    """The families that this format stands for, where the format is not known; the first marker decides for one."""

    @property
    def bare(self) -> bool:
        """True if a call may be the whole text, without markers."""
        return bool(self.bares)

    @property
    def openers(self) -> tuple[str, ...]:
        """The markers before a call, or before all calls."""
        return tuple(dict.fromkeys([*(opener for opener, _ in self.frame), *(block.opener for block in self.blocks)]))

    @property
    def closers(self) -> tuple[str, ...]:
        """The markers after a call, or after all calls."""
        closers = [*(block.closer for block in self.blocks if block.closer), *(closer for _, closer in self.frame)]
        return tuple(dict.fromkeys(closers))

    @property
    def markers(self) -> tuple[str, ...]:
        """Every marker of the family; in foreign text such strings could become structure."""
        thoughts = [marker for pair in self.thought for marker in pair]
        return tuple(dict.fromkeys([*thoughts, *self.openers, *self.inner, *self.closers, *self.wrappers]))


def dumps(value: Any) -> str:
    """Write JSON as models do. Raises ValueError for nan and inf."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def as_text(value: Any) -> str:
    """Write an argument of a format without types: text as it is, anything else as JSON. Raises ValueError."""
    return value if isinstance(value, str) else dumps(value)
