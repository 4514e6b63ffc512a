"""Makes texts from episodes harmless before they stand in a prompt, and compares texts by their words.

The text of an environment, a tool or a model may be huge, and may hold the very tokens that end a turn or begin another
role. In a teacher's prompt it must be short and hold none of them.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_CHARACTERS = 600
"""The most characters of a task's text by which like tasks are found."""
_WORD = re.compile(r"[^\W_]+")
_SEPARATOR = re.compile("[\u2028\u2029]")
_SPACE = re.compile(r"\s+")
_MARKUP = re.compile(r"<[^<>\s]{1,64}>|\[/?[A-Z_]{1,32}\]")
"""Matches an added token that a template gives a meaning to, such as `<think>` or `[INST]`."""


def structural_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts that a tokenizer reads as structure wherever they stand, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    found = {token.content for token in added if token.special or _MARKUP.fullmatch(token.content)}
    return sorted(found | set(tokenizer.all_special_tokens), key=lambda text: (-len(text), text))


def neutral(text: str, structure: Iterable[str], *, most: int) -> str:
    """Return the text without anything that a chat template reads as structure, at most `most` characters.

    A space is put behind the first character of every piece of `structure`: the piece stays readable, and no other
    piece can arise, as one could if the piece were taken out. Control and other invisible characters are removed, but
    for newlines; Unicode's line and paragraph separators become newlines.
    """
    text = _SEPARATOR.sub("\n", text[: 4 * most])
    text = "".join(c for c in text if c == "\n" or not unicodedata.category(c).startswith("C"))
    for piece in structure:
        text = text.replace(piece, f"{piece[0]} {piece[1:]}" if len(piece) > 1 else " ")
    return shorten(text.strip(), most)


def shorten(text: str, most: int) -> str:
    """Return the text, or its beginning and an ellipsis: at most `most` characters."""
    return text if len(text) <= most else text[: max(0, most - 4)].rstrip() + " ..."


def one_line(text: str, most: int) -> str:
    """Return the text on one line, at most `most` characters."""
    return shorten(_SPACE.sub(" ", text).strip(), most)


def words(text: str) -> list[str]:
    """Return its words in lower case: runs of letters and digits."""
    return _WORD.findall(text.casefold())


def jaccard(a: str, b: str) -> float:
    """Return the share of two texts' words that both have, from 0 to 1; 0 where neither has any."""
    left, right = set(words(a)), set(words(b))
    return len(left & right) / len(left | right) if left | right else 0.0


def coverage(piece: str, text: Collection[str]) -> float:
    """Return the share of a piece's words that are among the words of a text; 1 for a piece without words."""
    own = words(piece)
    return sum(word in text for word in own) / len(own) if own else 1.0


def rarity(documents: Iterable[Collection[str]]) -> dict[str, float]:
    """Return for each word `log((1 + N) / (1 + n))`, where n of the N documents have it: 0 for one that all have."""
    documents = list(documents)
    counts = Counter(word for document in documents for word in set(document))
    return {word: math.log((1 + len(documents)) / (1 + n)) for word, n in counts.items()}


def likeness(query: Mapping[str, float], document: Collection[str], rare: Mapping[str, float]) -> float:
    """Return the cosine of a weighted query and a document's set of words, each word times its rarity: from 0 to 1."""
    shared = sum(weight * rare[word] ** 2 for word, weight in query.items() if word in document and word in rare)
    if not shared:
        return 0.0
    own = math.sqrt(sum(rare.get(word, 0.0) ** 2 for word in query))
    theirs = math.sqrt(sum(rare[word] ** 2 for word in document))
    return shared / (own * theirs)
