"""A text that is being read: searches that together pass over it once, and what a reader raises."""

from __future__ import annotations

import re

from opd.formats.reply import MalformedCall, ToolCall

Calls = list[ToolCall | MalformedCall]

_SPACE = re.compile(r"\s*+")


class CallError(ValueError):
    """Raised where a call cannot be read; `str(error)` says why, in words for the model.

    `at` is the position up to which the text surely belongs to the call; None where that is its beginning.
    """

    def __init__(self, reason: str, at: int | None = None) -> None:
        super().__init__(reason)
        self.at = at


class Source:
    """One text, and where patterns were found in it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._found: dict[re.Pattern[str], tuple[int, re.Match[str] | None]] = {}

    def find(self, pattern: re.Pattern[str], at: int) -> re.Match[str] | None:
        """Return the same as `pattern.search(text, at)`; searches from rising positions pass over the text once."""
        since, found = self._found.get(pattern, (len(self.text) + 1, None))
        if not since <= at or (found is not None and found.start() < at):
            found = pattern.search(self.text, at)
            self._found[pattern] = (at, found)
        return found

    def skip_space(self, at: int) -> int:
        """Return the position of the first character from `at` on that is no white space."""
        space = _SPACE.match(self.text, at)
        return at if space is None else space.end()

    def holds(self, string: str, at: int) -> bool:
        """True if the string stands at `at`, white space before it aside."""
        return self.text.startswith(string, self.skip_space(at))
