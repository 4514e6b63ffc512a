"""Asks a language model behind an OpenAI-compatible endpoint, one question at a time, and trusts no answer.

An answer may be late, huge, malformed or missing. A question that fails for a reason that may pass (no connection,
overload, a broken answer) is asked again a few times, and then has no answer. A reason that will not pass (a wrong key,
an unknown model) is an error of the settings.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass

import httpx

from opd.errors import EngineError

ANSWER_BYTES = 1 << 20
"""The most bytes of an answer: more than a page of text in any encoding."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0
"""Seconds before the second attempt, doubled before each one after it, and at most."""
_CONNECT_SECONDS = 10.0
_LAST_PORT = 65_535
_SPACE = re.compile(r"\s")
_MAY_PASS = (httpx.codes.REQUEST_TIMEOUT, httpx.codes.CONFLICT, httpx.codes.TOO_MANY_REQUESTS)


class _NoAnswer(Exception):
    """The attempt failed for a reason that may pass. It never leaves this module."""


@dataclass(frozen=True, kw_only=True)
class ChatServer:
    """An endpoint, its model, and limits of an answer. Safe to use from several threads."""

    url: str
    """The address as far as `/v1`; see `checked_url`."""
    model: str
    key: str | None = None
    timeout: float
    """Seconds for one whole attempt."""
    retries: int
    """The most attempts after the first one."""
    max_tokens: int
    temperature: float = 0.0

    def ask(self, prompt: str) -> str | None:
        """Return the answer to one user message; None where all attempts failed. Raises EngineError on a refusal."""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)))
            try:
                return self._once(prompt)
            except _NoAnswer:
                continue
        return None

    def _once(self, prompt: str) -> str:
        """Ask once. Raises _NoAnswer for what may pass, EngineError for what will not."""
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
            reason = raw[:300].decode(errors="replace")
            raise EngineError(f"{url} refuses to summarise with status {status}: {reason}")
        return _content(raw)

    def _read(self, response: httpx.Response) -> bytes:
        """Read the body, bounded in size and time: httpx has no limit for a body that comes a byte at a time.

        Raises _NoAnswer beyond the bounds.
        """
        until = time.monotonic() + self.timeout
        raw = bytearray()
        for piece in response.iter_bytes():
            raw += piece
            if len(raw) > ANSWER_BYTES or time.monotonic() > until:
                raise _NoAnswer("an answer without an end")
        return bytes(raw)


def checked_url(url: str) -> str:
    """Return the address, which goes as far as `/v1`. Raises ValueError, before a run, where it cannot be asked."""
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
    """Return the text of a chat completion's first choice. Raises _NoAnswer where there is none."""
    try:
        content = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise _NoAnswer(repr(error)) from error
    if not isinstance(content, str) or not content.strip():
        raise _NoAnswer("no text")
    return content
