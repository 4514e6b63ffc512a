"""The built-in reward functions. Each compares completions with the `answer` column: 1.0 right, 0.0 wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from opd.types import Message

Completion = str | list[Message]

# No digit of a word (`v2`) and no second half of `1.5.2`; the minus of `47-38` is an operator, not a sign.
_NUMBER = re.compile(r"(?<![^\W_])(?<!\d\.)-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])-?\.\d+")


def exact_match(completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """Whether the completion is the answer, white space at the ends aside."""
    return [
        float(_text(completion).strip() == str(right).strip())
        for completion, right in zip(completions, answer, strict=True)
    ]


def contains_answer(completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """Whether the answer stands in the completion as whole words, in any case. None: the answer is empty."""
    return [
        _contains(_text(completion), str(right).strip()) for completion, right in zip(completions, answer, strict=True)
    ]


def number_match(completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """Whether the last number of the completion equals the last one of the answer (`1,250.0` is `1250`).

    So GSM8K's `answer` column works as it is. None: the answer holds no number.
    """
    return [
        None if (right := last_number(str(expected))) is None else float(last_number(_text(completion)) == right)
        for completion, expected in zip(completions, answer, strict=True)
    ]


def last_number(text: str) -> Decimal | None:
    """The last decimal number of the text, thousands separated by commas or not; None if there is none."""
    numbers = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def _contains(text: str, answer: str) -> float | None:
    if not answer:
        return None
    return float(re.search(rf"(?<!\w){re.escape(answer.casefold())}(?!\w)", text.casefold()) is not None)


def _text(completion: Completion) -> str:
    """What the assistant wrote: the string itself, or the contents of the messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message["content"]) for message in completion)
