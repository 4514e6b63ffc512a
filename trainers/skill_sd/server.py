"""A language model behind an OpenAI-compatible endpoint, asked one thing at a time, read as a stranger is.

An answer may be late, huge, malformed or none. What may pass (no connection, overload, a broken answer) is asked again
a few times, then there is no answer; what will not pass (a wrong key, an unknown model) is an error of the settings.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass

import httpx

from opd.errors import EngineError

ANSWER_BYTES = 1 << 20
"""More than a page of text in any encoding."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0
"""Seconds before the second attempt, doubled before each one after it, and at most."""
_CONNECT_SECONDS = 10.0
_LAST_PORT = 65_535
_SPACE = re.compile(r"\s")
_MAY_PASS = (httpx.codes.REQUEST_TIMEOUT, httpx.codes.CONFLICT, httpx.codes.TOO_MANY_REQUESTS)


class _NoAnswer(Exception):
    """What may be better at the next attempt; never leaves this module."""


@dataclass(frozen=True, kw_only=True)
class ChatServer:
    """Where to ask, whom, and for how long. Safe to use from several threads."""

    url: str
    """As far as `/v1`; see `checked_url`."""
    model: str
    key: str | None = None
    timeout: float
    """Seconds for one attempt, all of it."""
    retries: int
    max_tokens: int
    temperature: float = 0.0

    def ask(self, prompt: str) -> str | None:
        """What it says to one user message; None where it cannot be had. Raises EngineError where it refuses."""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)))
            try:
                return self._once(prompt)
            except _NoAnswer:
                continue
        return None

    def _once(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limit = httpx.Timeout(self.timeout, connect=min(self.timeout, _CONNECT_SECONDS))
        url = f"{self.url.rstrip('/')}/chat/completions"
        try:
            with (
                httpx.Client(timeout=limit, trust_env=False) as client,
                client.stream("POST", url, json=body, headers=headers) as response,
            ):
                raw = self._read(response)
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise _NoAnswer(repr(error)) from error
        status = response.status_code
        if status != httpx.codes.OK:
            if status in _MAY_PASS or status >= httpx.codes.INTERNAL_SERVER_ERROR:
                raise _NoAnswer(f"status {status}")
            said = raw[:300].decode(errors="replace")
            raise EngineError(f"{url} refuses to summarise with status {status}: {said}")
        return _content(raw)

    def _read(self, response: httpx.Response) -> bytes:
        """The body, bounded in size and time: a read that always brings one more byte meets no time limit of httpx."""
        until = time.monotonic() + self.timeout
        raw = bytearray()
        for piece in response.iter_bytes():
            raw += piece
            if len(raw) > ANSWER_BYTES or time.monotonic() > until:
                raise _NoAnswer("an answer without an end")
        return bytes(raw)


def checked_url(url: str) -> str:
    """An address as far as `/v1`. Raises ValueError for what cannot be asked: that must not be found out in a run."""
    wanted = "it must be like http://127.0.0.1:8000/v1"
    try:
        parsed = httpx.URL(url)
        parsed.host.encode("idna")
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ValueError(f"{url[:200]!r} is no address: {error}; {wanted}") from None
    if parsed.scheme not in ("http", "https"):
        raise ValueError(f"{url!r} does not begin with http:// or https://; {wanted}")
    if not parsed.host or (parsed.port or 0) > _LAST_PORT or parsed.query or parsed.fragment or _SPACE.search(url):
        raise ValueError(f"{url!r} is no address of a server; {wanted}")
    return url


def _content(raw: bytes) -> str:
    """The text of the first choice of a chat completion."""
    try:
        content = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise _NoAnswer(repr(error)) from error
    if not isinstance(content, str) or not content.strip():
        raise _NoAnswer("no text")
    return content
