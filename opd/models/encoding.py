"""Text to token ids, where some of the text must not become control tokens.

A tokenizer reads `<|im_end|>` as the end of a turn wherever it stands, also in a web page that a tool returned. A chat
template pastes both kinds of text into one string, its own markup and what others said, so that the string no longer
tells them apart. Here foreign text goes through the template with stand-ins in place of the markup in it: words that no
template looks at (`Encoder.guard`). When the rendered string is encoded, the stand-ins are put back as plain text.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from opd.errors import ModelError
from opd.models.kept import KeptByText
from opd.types import Message

# Markup, as tokens look that are not marked as special (`<tool_call>`, `[ARGS]`); others of these are words and phrases
# that a tokenizer was given, and HTML (Gemma's), which opens and closes nothing.
_MARKUP = re.compile(r"<[^<>\s]{1,64}>|\[/?[A-Z][A-Z_]+\]|\u25c1[^\u25c1\u25b7]{1,64}\u25b7")
_HTML = re.compile(
    r"</?(?:table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code|pre|p|br|hr|a|"
    r"img|div|span|ul|ol|li)>"
)
_ANCHORS = ("\n", "a", "=", "1")
"""Texts that may stand before another one, so that it is not encoded as a beginning."""


def control_strings(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The texts of the tokens that a tokenizer cuts out of any text before it reads it, and that mean something.

    Those count that are marked as special, that hold one of these, or that look like markup.
    """
    found = {str(token.content): token.special for token in tokenizer.added_tokens_decoder.values()}
    special = [text for text, is_special in found.items() if is_special]

    def means_something(text: str) -> bool:
        is_markup = _MARKUP.fullmatch(text) is not None and not _HTML.fullmatch(text)
        return is_markup or any(part in text for part in special)

    return frozenset(text for text, is_special in found.items() if is_special or means_something(text))


class Guard:
    """Covers markup in text that others wrote, control strings and `markup` besides, with words that stand for it."""

    def __init__(self, controls: Iterable[str], markup: Iterable[str] = ()) -> None:
        self._guarded = sorted({*controls, *markup}, key=lambda text: (-len(text), text))
        self.nonce = os.urandom(8).hex()  # so that no text can hold a stand-in; ids never depend on it
        self._numbers: dict[str, int] = {}
        self._texts: list[str] = []
        self._pattern = _any_of(self._guarded)
        self._stand_in = re.compile(rf"Q{self.nonce}x(\d{{6}})Q")
        parts = [(text[:n], text[n:]) for text in self._guarded for n in range(1, len(text))]
        self._heads = {head for head, _ in parts if not head.isalnum()}
        self._tails = {tail for _, tail in parts if not tail.isalnum()}
        self._longest = max(map(len, self._guarded), default=0)
        self._covered = KeptByText(self._cover_text)

    def guard(self, text: str) -> str:
        """Return a text that others wrote, stand-ins in place of the markup in it.

        So does what could become markup together with what stands beside it: half a token at either end.
        """
        return self._covered(text)

    def guard_all(self, value: Any) -> Any:
        """`guard` every text of a value made of dicts and lists, keys included (these are a template's to look at)."""
        if isinstance(value, str):
            return self.guard(value)
        if isinstance(value, dict):
            return {self._cover_all(str(key)): self.guard_all(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.guard_all(item) for item in value]
        return value

    def guard_message(self, message: Message) -> Message:
        """`guard` every text of a message but its role."""
        return {**self.guard_all(message), "role": message["role"]}

    def mark(self) -> str:
        """A word that no text can hold, to find a place in what a template renders."""
        return f"Q{self.nonce}markQ"

    def plain(self, text: str) -> str:
        """Put back what the stand-ins stand for."""
        return self._stand_in.sub(lambda found: self._texts[int(found[1])], text) if self.nonce in text else text

    def _cover_text(self, text: str) -> str:
        return self._cover_ends(self._cover_all(text)) if self._guarded else text

    def _cover_all(self, text: str) -> str:
        return self._pattern.sub(lambda found: self._cover(found[0]), text)

    def _cover(self, text: str) -> str:
        number = self._numbers.setdefault(text, len(self._numbers))
        if number == len(self._texts):
            self._texts.append(text)
        return f"Q{self.nonce}x{number:06d}Q"

    def _cover_ends(self, text: str) -> str:
        for n in range(min(self._longest - 1, len(text)), 0, -1):
            if text[-n:] in self._heads:
                text = text[:-n] + self._cover(text[-n:])
                break
        for n in range(min(self._longest - 1, len(text)), 0, -1):
            if text[:n] in self._tails:
                return self._cover(text[:n]) + text[n:]
        return text

    def is_whole(self, text: str) -> bool:
        """True if every stand-in of a text is one that was put there, uncut."""
        return f"Q{self.nonce}" not in self._stand_in.sub("", text)


class Encoder:
    """Encodes text with a tokenizer, parts of it guarded.

    `markup` are further strings that a template or a parser gives a meaning (`<think>` where it is no token): `guard`
    covers them as well.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, markup: Iterable[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.controls = control_strings(tokenizer)
        self._guard = Guard(self.controls, markup)
        self.guard, self.guard_all = self._guard.guard, self._guard.guard_all
        self.guard_message, self.mark, self.plain = self._guard.guard_message, self._guard.mark, self._guard.plain

    def encode(self, text: str) -> list[int]:
        """The ids of a rendered text, no special tokens added. Raises ModelError where a guarded text cannot be kept
        from becoming a control token."""
        if self._guard.nonce not in text:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._encode_guarded(text)[0]

    def encode_next(self, text: str) -> list[int]:
        """The ids of a text that goes on from another one: no space is put before it, as before a beginning.

        Raises ModelError as `encode` does.
        """
        if not text or not self._adds_a_prefix:
            return self.encode(text)
        for anchor in _ANCHORS:
            ids, starts = self._encode_with_starts(anchor + text)
            if len(anchor) in starts:
                return ids[starts.index(len(anchor)) :]
        raise ModelError(f"the tokenizer {self.tokenizer.name_or_path!r} cannot encode {text[:40]!r} as a continuation")

    def encode_pair(self, before: str, after: str) -> list[int]:
        """The ids of `after`, as the tokenizer reads it behind `before`.

        Where a token would reach across the border, as it never does when a model samples what follows, `after` is
        encoded by itself.
        """
        ids, starts = self._encode_with_starts(before + after)
        border = len(self._plain_for_clone(before)) if self._guard.nonce in before + after else len(before)
        return ids[starts.index(border) :] if border in starts else self.encode_next(after)

    def _encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text, and the position of the first character of each."""
        if self._guard.nonce in text:
            return self._encode_guarded(text)
        found = self._backend.encode(text, add_special_tokens=False)
        return list(found.ids), [start for start, _ in found.offsets]

    def _encode_guarded(self, text: str) -> tuple[list[int], list[int]]:
        if not self._guard.is_whole(text):
            raise ModelError(
                f"the chat template of {self.tokenizer.name_or_path!r} cuts or changes words of the messages, so that "
                "markup in them cannot be kept from becoming control tokens"
            )
        clone, real_ids, names = self._clone
        wanted = self._own.findall(text)
        found = clone.encode(self._plain_for_clone(text), add_special_tokens=False)
        ids = [real_ids.get(token, token) for token in found.ids]
        controls = {real_ids[_id_of(clone, name)]: control for control, name in names.items()}
        if [controls[token] for token in ids if token in controls] != wanted:
            raise ModelError(
                f"the tokenizer {self.tokenizer.name_or_path!r} reads markup in a message as a control token even "
                "where it is told that it is text"
            )
        return ids, [start for start, _ in found.offsets]

    def _plain_for_clone(self, text: str) -> str:
        """Rename a rendered text's own control strings to those of the clone, and put back what stand-ins stand for."""
        names = self._clone[2]
        return self.plain(self._own.sub(lambda found: names[found[0]], text))

    @property
    def _backend(self) -> Tokenizer:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no tokenizer.json, so that markup in a message "
                "cannot be told from the template's; convert it to a fast tokenizer"
            )
        return backend

    @cached_property
    def _own(self) -> re.Pattern[str]:
        """Find the control strings of a rendered text that are the template's own."""
        return _any_of(sorted(self.controls, key=lambda text: (-len(text), text)))

    @cached_property
    def _clone(self) -> tuple[Tokenizer, dict[int, int], dict[str, str]]:
        """A tokenizer that knows each control token by another name alone; its ids to the real ones; the names.

        The names are of characters that no text holds but by chance, and random.
        """
        described = json.loads(self._backend.to_str())
        described["post_processor"] = None
        names: dict[str, str] = {}
        kept: list[str] = []
        secret = "".join(chr(0xE100 + int(digit, 16)) for digit in self._guard.nonce)
        for token in described["added_tokens"]:
            text = token["content"]
            if text not in self.controls:
                kept.append(text)
                continue
            number = "".join(chr(0xE200 + int(digit)) for digit in f"{len(names):06d}")
            names[text] = token["content"] = f"\ue000{secret}{number}\ue001"
        clone = Tokenizer.from_str(json.dumps(described))
        told = {**names, **dict.fromkeys(kept, "")}  # the clone numbers what is not in its vocabulary anew
        real = {_id_of(clone, name or text): _id_of(self._backend, text) for text, name in told.items()}
        return clone, real, names

    @cached_property
    def _adds_a_prefix(self) -> bool:
        """True for tokenizers that put a space before whatever they are given, as SentencePiece's do."""
        ids, starts = self._encode_with_starts("\nThe")
        return 1 not in starts or ids[starts.index(1) :] != self.encode("The")


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    """A pattern of any of these texts, the longest first; of nothing where there are none."""
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def _id_of(tokenizer: Tokenizer, text: str) -> int:
    """The id of a token that the tokenizer has."""
    number = tokenizer.token_to_id(text)
    assert number is not None, text
    return number
