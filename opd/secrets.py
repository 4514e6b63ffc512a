"""What must not be read by others: which settings and texts hold a secret, and how it is taken out of what is written.

A process knows its secrets (`know`): those written out in its settings, the values of `${env:NAME}` (`opd.variables`),
and what its environment variables with telling names hold. `redact` puts `***` in their place, and in the place of
whatever has the form of a well-known key. It is called where a text leaves the process. Nothing that a model reads or
samples goes through it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MARK = "***"
"""What stands in the place of a secret."""
SHORTEST = 6
"""Characters. A shorter secret is hidden where it is set, and not looked for in other texts, where it means nothing."""
_VARIABLE_SHORTEST = 8
"""The same for an environment variable that no setting names."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_TELLING = {
    *("password", "passwords", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials"),
    *("authorization", "apikey", "cookie"),
}
"""Words of a name that tell of a secret, wherever in it they stand."""
_ENDINGS = {"key", "token", "auth", "bearer", "pat"}
"""Words that do so at the end of a name; beside one of `_BEFORE` they mean nothing else, also in the plural."""
_BEFORE = {"api", "access", "auth", "secret", "private", "refresh", "bearer", "client", "session", "hf", "wandb"}
_NO_SECRET = {
    *("env", "file", "path", "name", "names", "id", "ids", "type", "column", "field", "length", "size", "count"),
    *("format", "index", "kind", "limit", "timeout", "folder", "dir"),
}
"""Last words of a name that says something about a secret, and holds none."""
_ORDINARY = re.compile(r"[a-z_]{1,12}|<.*>|\[.*\]|(?:~|\.{0,2})(?:/[\w.-]+){2,}")
"""Values that `sort_key` or `pad_token` may well have: a word, a special token, a path."""
_BARE_KEY = re.compile(
    r"(?:sk|pk|rk)-[\w-]{8,}|(?:hf|gh[pousr]|github_pat)_\w{8,}|(?:AKIA|ASIA)[A-Z0-9]{8,}|xox[a-z]-[\w-]{8,}"
)
"""A setting that is one of these and nothing else is a key, though a text that holds it may mean something else."""

_KEYS = (
    r"sk-(?=[\w-]{0,80}[0-9A-Z])[\w-]{16,}",
    r"hf_[A-Za-z0-9]{16,}",
    r"(?:gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,})",
    r"(?:AKIA|ASIA)[A-Z0-9]{12,}\b",
    r"xox[a-z]-[A-Za-z0-9-]{8,}",
    r"AIza[\w-]{30,}",
    r"eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+",
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[^-]*(?:-----END [A-Z ]{0,40}PRIVATE KEY-----)?",
)
_BEGIN = r"(?:(?<!\w)|(?<=%[0-9A-F]{2}))"
"""A key begins a word, or stands behind what an address spells out."""
_BESIDE = (
    r"(?<=://)(?:[^\s/?#:@'\"]{0,200}:)(?P<password>[^\s/?#@'\"]{1,500})(?=@)",
    r"(?i:\bbearer\s{1,4})(?=[^\s'\",;]{0,80}[0-9])(?P<bearer>[\w.~+/=-]{8,})",
    r"(?i:\bauthorization['\"]?\s{0,4}[:=]\s{0,4}['\"]?(?:basic|token|digest)\s{1,4})(?P<basic>[^\s'\",;]{4,})",
    r"(?i:[?&](?:api_?key|key|access_token|token|secret|client_secret|password|passwd|signature|sig)=)"
    r"(?P<query>[^\s&#'\"<>]{4,})",
)
"""Secrets by what stands before them, which is kept: the password of an address, a header, part of a query."""
_FORMS = re.compile("|".join([*(f"{_BEGIN}(?P<key{n}>{form})" for n, form in enumerate(_KEYS)), *_BESIDE]))

_known: dict[str, None] = {}
_pattern: re.Pattern[str] | None = None
_lock = threading.Lock()


def know(value: str) -> None:
    """Hide a value, and the spellings of it in an address, in JSON and in Python, from now on; no shorter than 6."""
    global _pattern
    if len(value.strip()) < SHORTEST:
        return
    lines = [line for line in value.splitlines() if len(line.strip()) >= 16]  # a log may indent each
    bare = {value, value.strip(), *lines}
    spelled = bare | {json.dumps(v)[1:-1] for v in bare} | {json.dumps(v, ensure_ascii=False)[1:-1] for v in bare}
    spelled |= {repr(v)[1:-1] for v in bare}
    with _lock:
        if spelled <= _known.keys():
            return
        _known.update(dict.fromkeys(spelled))
        longest_first = sorted(_known, key=len, reverse=True)
        _pattern = re.compile("|".join(map(_in_addresses, longest_first)))
        redact_log_records()


def _in_addresses(text: str) -> str:
    """Return a pattern of the text, in which each sign may be written as an address writes it: clients differ in which
    they leave alone."""
    parts = []
    for character in text:
        encoded = "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))
        other = "|\\+" * (character == " ")
        plain = character.isascii() and character.isalnum()
        parts.append(character if plain else f"(?:{re.escape(character)}|(?i:{encoded}){other})")
    return "".join(parts)


def forget() -> None:
    """Know no secret any more. For tests: what a process has known it may still write."""
    global _pattern
    with _lock:
        _known.clear()
        _pattern = None


def redact(text: str) -> str:
    """Return the text with `***` in the place of every known secret and of what has the form of a key."""
    if _pattern is not None:
        text = _pattern.sub(MARK, text)
    return _FORMS.sub(_without_secret, text)


def _without_secret(found: re.Match[str]) -> str:
    """What stands in the place of a match of `_FORMS`: the mark, behind what only leads to the secret."""
    assert found.lastgroup is not None
    return found[0][: found.start(found.lastgroup) - found.start()] + MARK


def redacted(value: Any) -> Any:
    """Return plain data (as of JSON) with every text in it redacted; what is no plain data stays as it is."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redacted(key): redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


def tells_of_secret(name: str) -> bool:
    """True: what has this name is a secret, as `api_key`, `password` and `X-Auth-Token` are. False: it may be none."""
    words = _words(name)
    return bool(words) and words[-1] not in _NO_SECRET and (_is_sure(words) or words[-1] in _ENDINGS)


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


def _is_sure(words: list[str]) -> bool:
    """True if a name of these words means a secret, whatever its value: `sort_key` and `pad_token` may mean others."""
    last = words[-1].removesuffix("s")
    alone = len(words) == 1 and words[0] in _ENDINGS
    return alone or bool(_TELLING.intersection(words)) or (last in _ENDINGS and not _BEFORE.isdisjoint(words[:-1]))


def _is_secret(name: str, value: Any) -> bool:
    """True if a setting of this name holds a secret that is written out."""
    words = _words(name)
    if not tells_of_secret(name):
        return False
    if isinstance(value, str):
        return value not in ("", MARK) and "${env:" not in value and (_is_sure(words) or not _ORDINARY.fullmatch(value))
    return _is_sure(words) and isinstance(value, int) and not isinstance(value, bool)


def _inherited(above: str, name: str) -> str:
    """The name that says what a setting is: its own, or that of the section that it stands in, as `credentials`."""
    words = _words(above)
    holds = words and words[-1] not in _NO_SECRET and ("auth" in words or not _TELLING.isdisjoint(words))
    return above if holds else name


def _leaves(settings: Any, key: str = "", name: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (dotted key, the name that says what it is, value) of every setting."""
    if isinstance(settings, Mapping):
        for own, value in settings.items():
            yield from _leaves(value, f"{key}.{own}" if key else str(own), _inherited(name, str(own)))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _leaves(value, key, name)
    else:
        yield key, name, settings


def know_settings(settings: Mapping[str, Any]) -> list[str]:
    """Know the secrets that settings have written out; return their keys, each once.

    A key is secret by its name, or where its value has the form of a key. What `api_key_env` names is known too.
    """
    found = []
    for key, name, value in _leaves(settings):
        if _is_secret(name, value):
            know(str(value))
            found.append(key)
        elif isinstance(value, str):
            if name.endswith("_env"):
                know(os.environ.get(value, ""))
            forms = [match[match.lastgroup] for match in _FORMS.finditer(value) if match.lastgroup]
            forms += [value] if _BARE_KEY.fullmatch(value) else []
            forms = [form for form in forms if MARK not in form and "${env:" not in form]
            for form in forms:
                know(form)
            found += [key] * bool(forms)
    return list(dict.fromkeys(found))


def know_environment() -> None:
    """Know what the environment variables hold whose names tell of a secret: `HF_TOKEN`, `OPENAI_API_KEY`."""
    for name, value in os.environ.items():
        if tells_of_secret(name) and len(value) >= _VARIABLE_SHORTEST and not _ORDINARY.fullmatch(value):
            know(value)


def without_secrets(settings: Any, name: str = "") -> Any:
    """Return settings with `***` for each secret that is written out; `${env:NAME}` stays. It depends on them alone."""
    if isinstance(settings, Mapping):
        return {key: without_secrets(value, _inherited(name, str(key))) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [without_secrets(value, name) for value in settings]
    if _is_secret(name, settings) or (isinstance(settings, str) and _BARE_KEY.fullmatch(settings)):
        return MARK
    return _FORMS.sub(_unless_named, settings) if isinstance(settings, str) else settings


def _unless_named(found: re.Match[str]) -> str:
    return found[0] if "${env:" in found[0] else _without_secret(found)


class _Redacting:
    """A stream of text that redacts what is written to it; in all else it is the stream behind it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redact_console() -> None:
    """Redact from now on what this process prints and logs, tracebacks and other people's code included."""
    redact_log_records()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Redacting):
            setattr(sys, name, _Redacting(stream))


_records = logging.getLogRecordFactory()


def redact_log_records() -> None:
    """Have each record of a log redacted when it is made, whichever handler writes it where."""
    global _records
    made_by = logging.getLogRecordFactory()
    if made_by is not _redacted_record:
        _records = made_by
        logging.setLogRecordFactory(_redacted_record)


def _redacted_record(*arguments: Any, **named: Any) -> logging.LogRecord:
    record = _records(*arguments, **named)
    try:
        text = record.getMessage()
    except Exception:  # the handler says what is wrong with the arguments
        return record
    if (shown := redact(text)) != text:
        record.msg, record.args = shown, ()
    if record.exc_info and record.exc_info[0] is not None:
        trace = logging.Formatter().formatException(record.exc_info)
        if (shown := redact(trace)) != trace:
            record.exc_text = shown  # what a formatter writes where it is there; others may ask for the error itself
    return record
