"""Problems of a file of settings, as sentences: setting, value, what is allowed, and the mend.

Nothing here knows which settings exist; `opd.launch.settings.config` finds the problems and hands them over.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from opd.secrets import redact

_LONGEST_VALUE = 80
_MOST_PROBLEMS = 16
"""More problems than that are one problem, such as a file that is meant for something else."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to mend. `keys` are the settings that it is about, the one to mend first."""

    keys: tuple[str, ...]
    text: str

    def line(self, source: str, overridden: Collection[str] = ()) -> str:
        """Return `source: text`; the source is the command line if one of the keys was given there."""
        given = any(is_within(key, override) for key in self.keys for override in overridden)
        return f"{'command line' if given else source}: {visible(self.text)}"


def is_within(key: str, prefix: str) -> bool:
    """True: `key` is `prefix` or a setting below it. False: it stands elsewhere."""
    return key == prefix or key.startswith(f"{prefix}.")


def report(problems: Iterable[Problem], source: str, overridden: Collection[str] = ()) -> str:
    """Return every problem on a line of its own, each once, in the order found; of very many the first ones."""
    lines = list(dict.fromkeys(problem.line(source, overridden) for problem in problems))
    if len(lines) > _MOST_PROBLEMS:
        lines[_MOST_PROBLEMS:] = [f"{source}: {len(lines) - _MOST_PROBLEMS} more problems; mend these first"]
    return "\n".join(lines)


def visible(text: str) -> str:
    r"""Return a text with what nobody sees written out: `te\u200bxt`, a key that such a character makes unknown."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def short(text: str) -> str:
    """Return a text as a message shows it: cut where it is long, with what nobody sees written out."""
    return visible(text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…")


def show(value: Any) -> str:
    """Write a value as the file would hold it: text in quotes, true, null; cut if it is long."""
    return short(redact(json.dumps(value, ensure_ascii=False, default=repr)))  # cut after: half a secret is one too


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that `word` most likely meant; None if no choice is near."""
    folded = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(word.lower(), folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def nearest_key(key: str, keys: Collection[str]) -> str | None:
    """Return the setting that `key` most likely meant: of that name deeper in its section, or like it elsewhere."""
    section, _, name = key.rpartition(".")
    deeper = (k for k in keys if section and is_within(k, section) and k.rpartition(".")[2] == name)
    if found := next(deeper, None):
        return found
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == section}
    if found := nearest(name, siblings):
        return siblings[found]
    by_name = {k.rpartition(".")[2]: k for k in reversed(list(keys))}
    if name in by_name:
        return by_name[name]
    if found := nearest(key, keys):
        return found
    found = nearest(name, by_name)
    return by_name[found] if found else None


def did_you_mean(found: str | None) -> str:
    """Return the closing sentence of a message; an empty text if nothing was found."""
    return f' Did you mean "{found}"?' if found else ""
