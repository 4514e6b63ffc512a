"""Makes an environment of the tools of an MCP server: `mcp:python my_server.py`, or `mcp:http://localhost:8000/mcp`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import shutil
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from opd.envs.adapters.rows import Rows
from opd.envs.dataset_env import RESERVED
from opd.envs.scoring import Member, Scorer
from opd.envs.tables import Row
from opd.envs.text_env import Reply, Start
from opd.envs.tool_env import ToolEnv, ToolError
from opd.envs.tools import Tool
from opd.errors import ConfigError, EnvError
from opd.rewards import Rewards, Rubric, Score
from opd.tool_calls import ToolFormat
from opd.types import Message

logger = logging.getLogger(__name__)

_MOST_SCHEMA = 100_000
"""Characters that the tools of one server may take in a prompt."""
_MOST_PAGES = 16
_CLOSING = 10.0
"""Seconds for a server to end; the SDK kills it, and what it started, after about six."""


class McpEnv(ToolEnv):
    """A row of a table is the task, the server's tools are the tools, and the first turn without a call is the answer.

    A server is somebody else's program. One that cannot be started or does not list its tools in time fails the
    episode; one that dies, hangs or floods later is stopped, and this and every later call of the episode is
    answered with an error text. Its process ends with the environment.

    Args:
        name: a command line, run without a shell, or the URL of a server (streamable HTTP).
        data: the rows: a file, one for each split, or a data set (see `opd/Dataset-v0`).
        rewards: what scores the answer: built-in names or functions in TRL's signature, which get messages.
        config: for a command: `env`, variables beside the few that are inherited (PATH, HOME, ...), and `cwd`.
        tools: the names of the tools to offer; by default all.
        fresh: whether every episode gets a server process (or a session) of its own, so that none sees what
            another left there. Without, starting up costs nothing, and the tools must keep no state.
        call_timeout: seconds that a call, or starting the server, may take; `rollout.step_timeout` must be larger.
        prompt_column: the column of the prompt, text or messages.
        system: a system message to put before each prompt.
        privileged_columns: which columns the teacher may see, under which names.
        success_threshold: a reward of at least this is a success.
        held_out: the share of prompts held out for eval, where no eval split is given.
        columns: the types of columns, `{age: int}` (see `opd/Dataset-v0`).
        max_result_chars: a longer result is cut, with a notice.
        tool_format, starts_thinking: how the model writes calls (see `ToolEnv`).
    """

    def __init__(
        self,
        name: str,
        *,
        data: str | Mapping[str, str],
        rewards: Rewards,
        config: Mapping[str, Any] | None = None,
        tools: Sequence[str] | None = None,
        fresh: bool = True,
        call_timeout: float = 20.0,
        prompt_column: str = "prompt",
        system: str | None = None,
        privileged_columns: Mapping[str, str] | None = None,
        success_threshold: float = 1.0,
        held_out: float = 0.1,
        columns: Mapping[str, str] | None = None,
        max_result_chars: int = 4096,
        tool_format: ToolFormat = "auto",
        starts_thinking: bool = False,
    ) -> None:
        super().__init__(
            tool_format=tool_format,
            starts_thinking=starts_thinking,
            call_timeout=call_timeout,
            max_result_chars=max_result_chars,
        )
        self._connect = _make_connector(name, config or {})
        self._offered = None if tools is None else list(tools)
        self.fresh, self.system = fresh, system
        self._rows = Rows(data, prompt_column, privileged_columns, held_out=held_out, columns=columns)
        self._rubric = Rubric(rewards)
        self._rubric.require((column for column in self._rows.columns if column not in RESERVED), table=str(data))
        self._scorer = Scorer(self._rubric, success_threshold, partial(_tell_score, success_threshold))
        self.metadata = {**self.metadata, "tasks": self._rows.counts}
        self._row: Row = {}
        self._said: list[Message] = []
        self._session: Session | None = None
        self._stop: Callable[[], object] | None = None

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        self._row, self._said = self._rows.pick(rng, split, index), []
        if self._session is not None and (self.fresh or self._session.lost is not None):
            self._end_session()
        if self._session is None:
            self._session = Session(self._connect, timeout=self.call_timeout)
            # An environment that was given up on a lost thread is never closed; it is collected, though.
            self._stop = weakref.finalize(self, self._session.close)
        self._tools = {tool.name: tool for tool in self._remote_tools(self._session)}
        return Start(
            prompt=self._rows.prompt(self._row), system=self.system, privileged=self._rows.privileged(self._row)
        )

    def no_call(self, action: str) -> Reply:
        columns = {column: value for column, value in self._row.items() if column not in RESERVED}
        member = Member(prompt=self._rows.prompt(self._row), completion=self._said, columns=columns)
        return self._scorer.reply(member, self.trainer)

    def respond(self, action: str) -> Reply:
        self._said.append(self.spoken(action))
        reply = super().respond(action)
        self._said += reply.messages
        return reply

    def score_group(self, members: Sequence[Member], ids: Sequence[Sequence[int]]) -> list[Reply]:
        return self._scorer.group(members, ids, self.trainer)

    def close(self) -> None:
        self._end_session()
        self._rubric.close()
        super().close()

    def _end_session(self) -> None:
        if self._stop is not None:
            self._stop()  # once: a finalizer that has run keeps nothing alive
        self._session = self._stop = None

    def _remote_tools(self, session: Session) -> list[Tool]:
        listed = {tool.name: tool for tool in session.tools}
        offered = list(listed) if self._offered is None else self._offered
        if missing := [name for name in offered if name not in listed]:
            raise EnvError(f"tools: the server has no tool {missing[0]!r}; it has: {', '.join(listed)}")
        return [RemoteTool(listed[name], session) for name in offered]


def _tell_score(needed: float, score: Score) -> str:
    return f"The answer scored {score.total:g}; {needed:g} is needed."


class RemoteTool(Tool):
    """Calls a tool of a server. The schema is the server's, and so is the checking of arguments."""

    def __init__(self, listed: Any, session: Session) -> None:
        self.name = listed.name
        self.is_async = False  # the session waits on its own thread
        self.function = lambda **arguments: self(arguments)
        self._listed, self._session = listed, session

    def schema(self) -> dict[str, Any]:
        parameters = {"type": "object", "properties": {}} | self._listed.input_schema
        function = {"name": self.name, "description": self._listed.description or "", "parameters": parameters}
        return {"type": "function", "function": function}

    def checked(self, arguments: dict[str, Any], *, as_text: bool = False) -> dict[str, Any]:
        return self.typed(arguments) if as_text else arguments

    def __call__(self, arguments: dict[str, Any]) -> str:
        """Call the tool and return its result as text.

        Raises ToolError for whatever goes wrong on the server's side.
        """
        result = self._session.call(self.name, arguments)
        text = _result_text(result)
        if result.is_error:
            raise ToolError(text or "the server says that the call failed, and not why")
        return text or "(no output)"


class Session:
    """Holds a connection to a server in a thread of its own, for callers who are not asynchronous.

    Raises EnvError when the server cannot be started, or does not list its tools in time.
    """

    def __init__(self, connect: Callable[[], Any], *, timeout: float) -> None:
        self.lost: str | None = None
        """Why no call can be answered any more, in words for the model; None while the server is well."""
        self._connect, self._timeout = connect, timeout
        self._client: Any = None
        self._ready: Future[list[Any]] = Future()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._serve())
        # A daemon: a server that cannot be stopped must not keep a finished run alive.
        self._thread = threading.Thread(target=self._run, name="opd-mcp", daemon=True)
        self._thread.start()
        try:
            self.tools = self._ready.result(timeout)
        except Exception as error:
            self.close()
            reason = f"no answer within {timeout:g} s" if isinstance(error, TimeoutError) else _describe_cause(error)
            raise EnvError(f"the MCP server did not start: {reason}. Run its command by hand to see why") from error

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """Call a tool and return the server's `CallToolResult`.

        Raises ToolError when none comes; stops a server that is late.
        """
        if self.lost is not None:
            raise ToolError(self.lost)
        answer = asyncio.run_coroutine_threadsafe(self._client.call_tool(name, arguments), self._loop)
        try:
            return answer.result(self._timeout)
        except TimeoutError:
            self.lost = f"the server of the tools did not answer within {self._timeout:g} s and was stopped"
            self.close()
            raise ToolError(self.lost) from None
        except Exception as error:  # whatever the SDK makes of a server that died or broke the protocol
            raise ToolError(f"the server of the tools answered: {_describe_cause(error)}"[:500]) from error

    def close(self) -> None:
        """Stop the server: its input is closed, and then it is killed with all that it started."""
        self.lost = self.lost or "the server of the tools was stopped"
        with suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(_CLOSING)
        if self._thread.is_alive():
            logger.warning("an MCP server could not be stopped within %g s", _CLOSING)

    def _run(self) -> None:
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.close()

    async def _serve(self) -> None:
        """Hold the connection open until this task is cancelled: the SDK wants one task to open and close it."""
        try:
            async with self._connect() as self._client:
                self._ready.set_result(await _list_tools(self._client))
                await asyncio.Event().wait()
        except Exception as error:
            if not self._ready.done():
                self._ready.set_exception(error)
            self.lost = f"the server of the tools is gone: {_describe_cause(error)}"


async def _list_tools(client: Any) -> list[Any]:
    tools: list[Any] = []
    cursor: str | None = None
    for _ in range(_MOST_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        if (size := sum(len(tool.model_dump_json()) for tool in tools)) > _MOST_SCHEMA:
            raise EnvError(f"its tools take {size:,} characters; at most {_MOST_SCHEMA:,} fit a prompt")
        if (cursor := page.next_cursor) is None:
            return tools
    raise EnvError(f"its list of tools has no end after {_MOST_PAGES} pages")


def _make_connector(name: str, config: Mapping[str, Any]) -> Callable[[], Any]:
    """Return a function that makes a client of the server; nothing is started yet.

    Raises ConfigError for a command that cannot be read or found.
    """
    from mcp.client.client import Client
    from mcp.client.stdio import StdioServerParameters, stdio_client

    if name.startswith(("http://", "https://")):
        if config:
            raise ConfigError(f"env.kwargs.config = {dict(config)} is for a server that is a command, not for a URL")
        return lambda: Client(name)
    try:
        command, *arguments = shlex.split(name)
    except ValueError as error:
        raise ConfigError(f"env.id: the command {name!r} cannot be read: {error}") from error
    if unknown := sorted(set(config) - {"cwd", "env"}):
        raise ConfigError(f"env.kwargs.config: an MCP server has no setting {unknown[0]!r}. Allowed: cwd, env")
    if shutil.which(command) is None:
        raise ConfigError(f"env.id: there is no command {command!r} that could start an MCP server")
    parameters = StdioServerParameters(command=command, args=arguments, **config)

    def client() -> Any:
        # What a server says on its error stream is for its author; a flood of it would bury the run's own output.
        quiet = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (closed with the client, which outlives us)
        client = Client(stdio_client(parameters, errlog=quiet))
        weakref.finalize(client, quiet.close)
        return client

    return client


def _result_text(result: Any) -> str:
    """Write all that a server said in a result: its blocks, and its structured content where no block has that."""
    blocks = [_block_text(block) for block in result.content]
    if not _is_said(result.structured_content, blocks):
        blocks.append(json.dumps(result.structured_content, ensure_ascii=False))
    return "\n".join(filter(None, blocks))


def _is_said(data: Any, blocks: Sequence[str]) -> bool:
    """True if the blocks hold the structured content in words: servers send both, for clients that read one of them.

    A value that is no object comes wrapped as `{"result": value}`, and a list as one block for each of its members.
    """
    value = data["result"] if isinstance(data, dict) and set(data) == {"result"} else data
    said = [[text, _json_of(text)] for text in blocks]
    if value is None or any(value in both or data in both for both in said):
        return True
    return isinstance(value, list) and all(
        any(one in both for both in said) for one in value
    )  # of an empty list nothing is left unsaid


def _json_of(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _block_text(block: Any) -> str:
    """Write a block of a result: text as it is, also that of a resource.

    What is no text (no image or sound is trained) is named by its kind, with the words that the server gave it.
    """
    match block.type:
        case "text":
            return str(block.text)
        case "resource":
            text = getattr(block.resource, "text", None)
            return str(text) if text is not None else _named("resource", block.resource)
        case "resource_link":
            return _named("resource", block, block.title or block.name, block.description)
        case kind:
            return _named(kind, block)


def _named(kind: str, block: Any, *words: str | None) -> str:
    """Name what is no text: `[resource file:///menu.pdf, application/pdf: Menu. What there is to eat]`."""
    found = [getattr(block, "uri", None), getattr(block, "mime_type", None)]
    where, said = ", ".join(str(one) for one in found if one), ". ".join(filter(None, words))
    return f"[{kind}{' ' * bool(where)}{where}{': ' * bool(said)}{said}]"


def _describe_cause(error: BaseException) -> str:
    """Describe, in one line, the cause inside a nest of exception groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}".strip().split("\n")[0][:300]
