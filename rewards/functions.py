"""Holds the built-in rewards that compare an answer with the `answer` column: 1.0 right, 0.0 wrong.

A thought is not part of an answer: what stands up to the last `</think>` of a completion is left out.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from opd.types import Message

Completion = str | list[Message]

# No digit of a word (`v2`) and no second half of `1.5.2`; the minus of `47-38` is an operator, not a sign.
_NUMBER = re.compile(r"(?<![^\W_])(?<!\d\.)-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])-?\.\d+")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """Score 1.0 where the completion is the answer, white space at the ends aside, else 0.0. None: there is none."""
    return [
        float(answer_of(completion) == gold) if (gold := _text(right)) else None
        for completion, right in zip(completions, answer, strict=True)
    ]


def normalized_match(completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """Score 1.0 where the completion is the answer once both are normalised (`normalize`), else 0.0.

    Where the answer is a list, any of its texts will do. None: no answer has a word.
    """
    return [
        _best_score(answer_of(completion), right, lambda given, gold: float(given == gold))
        for completion, right in zip(completions, answer, strict=True)
    ]


def f1(completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """Compute the F1 of the words of the completion and of the answer, both normalised; from 0 to 1.

    Where the answer is a list, the best of its texts counts. None: no answer has a word. Source: SQuAD
    (arXiv 1606.05250), section 6.1.
    """
    return [
        _best_score(answer_of(completion), right, _f1) for completion, right in zip(completions, answer, strict=True)
    ]


def contains_answer(completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """Score 1.0 where the answer stands in the completion as whole words, in any case, else 0.0.

    None: the answer is empty.
    """
    return [
        _contains(answer_of(completion), _text(right)) for completion, right in zip(completions, answer, strict=True)
    ]


def number_match(completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """Score 1.0 where the last numbers of the completion and of the answer are equal (`1,250.0` is `1250`), else 0.0.

    So GSM8K's `answer` column works as it is. None: the answer holds no number.
    """
    return [
        None if (right := last_number(str(expected))) is None else float(last_number(answer_of(completion)) == right)
        for completion, expected in zip(completions, answer, strict=True)
    ]


def last_number(text: str) -> Decimal | None:
    """Return the last decimal number of the text, thousands separated by commas or not; None if there is none."""
    numbers = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def normalize(text: str) -> str:
    """Return the text in lower case, without punctuation and English articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.casefold().translate(_NO_PUNCTUATION)).split())


def text_of(completion: Completion) -> str:
    """Return what the assistant wrote: the string itself, or the contents of its messages."""
    return completion if isinstance(completion, str) else "\n".join(_spoken(completion))


def answer_of(completion: Completion) -> str:
    """Return what the assistant wrote last, after its last thought, white space at the ends aside."""
    text = completion if isinstance(completion, str) else (_spoken(completion) or [""])[-1]
    return text.rpartition("</think>")[2].strip()


def _spoken(messages: Sequence[Message]) -> list[str]:
    """Return the assistant's own words: not the results of tools, which hold the answer where they are right."""
    return [str(message.get("content") or "") for message in messages if message.get("role") == "assistant"]


def last_tagged(text: str, tag: str) -> str | None:
    """Return the text in the last pair of `<tag>` and `</tag>`, white space at the ends aside; None without a pair.

    As the pattern `<tag>(.*?)</tag>` finds it, in time that grows with the length alone: that pattern looks through
    the whole text again for every tag that is never closed.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    found, at = None, 0
    while (start := text.find(opening, at)) >= 0 and (end := text.find(closing, start + len(opening))) >= 0:
        found, at = text[start + len(opening) : end], end + len(closing)
    return None if found is None else found.strip()


def _text(answer: Any) -> str:
    """Return an answer as text without white space at its ends; "" for a cell with nothing in it."""
    return "" if answer is None else str(answer).strip()


def _contains(text: str, answer: str) -> float | None:
    if not answer:
        return None
    return float(re.search(rf"(?<!\w){re.escape(answer.casefold())}(?!\w)", text.casefold()) is not None)


def _best_score(completion: str, answer: Any, score: Callable[[str, str], float]) -> float | None:
    """Return the best score that the completion has against an answer with a word; None where no answer has one."""
    golds = [normalize(_text(one)) for one in (answer if isinstance(answer, list | tuple) else [answer])]
    given = normalize(completion)
    return max((score(given, gold) for gold in golds if gold), default=None)


def _f1(given: str, gold: str) -> float:
    words, right = Counter(given.split()), Counter(gold.split())
    shared = (words & right).total()
    return 2 * shared / (words.total() + right.total())
