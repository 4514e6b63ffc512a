"""Adapts environments of `verifiers.v1`: `verifiers:my-taskset`.

Their `Env.run` plays one task with agents, and waits for each of an agent's turns. Here the agent is our student: a
turn becomes an observation, and the environment's own coroutine rests until the action is there. So the exchange,
the rewards and the end are the environment's, and its harness, which would start a program that asks a server for
completions, is not needed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from opd.envs.adapters.common import OwnRandom, Session, Unprotected
from opd.envs.text_env import Reply, Start, TextEnv, task_split
from opd.errors import ConfigError, EnvError
from opd.sandbox import Grader, Ungraded
from opd.types import Message

logger = logging.getLogger(__name__)

_UNPROTECTED = (
    "If it needs the network, programs or files to write: env.kwargs.unprotected: true and env.workers: processes"
)


class VerifiersEnv(TextEnv):
    """Plays a taskset in the environment that its package exports, or in verifiers' own for one agent.

    What needs verifiers' own rollouts is refused: tool servers, containers, more than one agent, and hooks that get
    a runtime or stop an exchange. Which split a task belongs to is decided by its `key`.

    Args:
        name: the id of an installed taskset, as for `eval`.
        config: the taskset's settings.
        tasks: how many tasks are read; a taskset may be endless.
        privileged: what the teacher may see: names, and the fields of the task's data, such as `{solution: answer}`.
        success_threshold: a total reward of at least this is a success.
        time_limit: seconds for one turn of the environment's; `rollout.step_timeout` must be larger.
        unprotected: run the environment in the process of the episode, with all that this may do. Only for one that
            needs the network (a judge, say), programs or files to write, and with `env.workers: processes`.

    Otherwise it runs where text can hurt nothing (`opd.sandbox.Grader`): a text at which it hangs, dies, raises or
    is refused ends the episode without a reward, and the log says so.
    """

    def __init__(
        self,
        name: str,
        *,
        config: Mapping[str, Any] | None = None,
        tasks: int = 1000,
        privileged: Mapping[str, str] | None = None,
        success_threshold: float = 1.0,
        time_limit: float = 10.0,
        unprotected: bool = False,
    ) -> None:
        super().__init__()
        self._name = name
        self.privileged = dict(privileged or {})
        self.success_threshold = success_threshold
        self._tasks = _split_tasks(_load(name, config or {}), tasks)
        self.metadata = {**self.metadata, "tasks": {split: len(some) for split, some in self._tasks.items()}}
        make = partial(Exchange, name, dict(config or {}), tasks)
        grader = Grader(make, name=f"verifiers:{name}", time_limit=time_limit)
        if not unprotected:
            grader.start()
        self._open: Callable[[], Session] = (lambda: Unprotected(make())) if unprotected else grader.session
        self._session: Session | None = None

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        tasks = self._tasks[split]
        number = int(rng.integers(len(tasks))) if index is None else index
        if not 0 <= number < len(tasks):
            raise EnvError(f"index {number} is outside the {split} split, which has {len(tasks)} tasks")
        task = tasks[number]
        self.close()
        self._session = self._open()
        seed = int(rng.integers(2**31))
        try:
            asked = self._session.call("begin", split=split, number=number, key=task.key, seed=seed)["asked"]
        except Ungraded as error:
            raise EnvError(f"verifiers:{self._name} cannot begin: {error}. {_UNPROTECTED}") from error
        if asked is None:
            raise EnvError("the environment ended without asking its agent for anything")
        data = task.data.model_dump()
        if missing := [field for field in self.privileged.values() if data.get(field) is None]:
            raise EnvError(f"privileged: the task's data has no {missing[0]!r}; it has: {', '.join(data)}")
        return Start(prompt=asked, privileged={name: str(data[field]) for name, field in self.privileged.items()})

    def respond(self, action: str) -> Reply:
        if self._session is None:
            raise EnvError("the environment is closed; call reset first")
        try:
            seen = self._session.call("reply", text=action)
        except Ungraded as error:
            logger.warning("verifiers:%s: the text %.200r ends the episode: %s", self._name, action[:200], error)
            self.close()
            return Reply(terminated=True, unreadable=True, feedback="The environment could not take that text.")
        if seen["asked"] is not None:
            return Reply(messages=seen["asked"])
        told: dict[str, Any] = {"rewards": dict(seen["parts"]), "metrics": dict(seen["metrics"])}
        if told["rewards"] and all(part is None for part in told["rewards"].values()):
            return Reply(terminated=True, unscored=True, **told)
        reward = float(seen["reward"])
        if not math.isfinite(reward):
            logger.warning("verifiers:%s: the text %.200r scores 0: its reward is %s", self._name, action[:200], reward)
            reward = 0.0
        return Reply(reward=reward, terminated=True, success=reward >= self.success_threshold - 1e-9, **told)

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None


class Exchange:
    """Runs the environment and its tasks in a process of their own."""

    def __init__(self, name: str, config: Mapping[str, Any], tasks: int) -> None:
        self._env = _load(name, config)
        self._tasks = _split_tasks(self._env, tasks)
        Interaction(Seat(), self._tasks["train"][0])  # verifiers asks git for its own version, once
        self._random = OwnRandom()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._seat: Seat | None = None
        self._run: asyncio.Task[None] | None = None
        self._stop: Callable[[], object] | None = None

    def prepare(self) -> None:
        """Make what needs sockets; a locked process has none."""
        self._loop = asyncio.new_event_loop()

    def begin(self, split: str, number: int, key: str, seed: int) -> dict[str, Any]:
        """Play a task until the agent is asked for something. Raises EnvError when it is not the task of this key."""
        task = self._tasks.get(split, [])[number : number + 1]
        if not task or task[0].key != key:
            raise EnvError(f"the taskset has another task at {split} {number} each time that it is loaded")
        self._loop = self._loop or asyncio.new_event_loop()
        self._seat = Seat()
        self._run = self._loop.create_task(_play_episode(self._env, task[0], self._seat))
        self._stop = weakref.finalize(self, _stop, self._loop, self._run)  # if nobody calls close
        return self._next(seed)

    def reply(self, text: str) -> dict[str, Any]:
        """Answer for the agent; return what it is `asked` next, or None and the `reward` of the episode, its `parts` by
        name (None: it was not scored) and the task's `metrics`."""
        assert self._seat is not None
        self._seat.reply(text)
        return self._next()

    def close(self) -> None:
        if self._stop is not None:
            self._stop()
        self._loop = self._seat = self._run = self._stop = None

    def _next(self, seed: int | None = None) -> dict[str, Any]:
        """Run the environment until it asks its agent, or the episode is over."""
        assert self._loop is not None
        assert self._seat is not None
        assert self._run is not None
        with self._random(seed):  # games draw from Python's global generator
            self._loop.run_until_complete(_wait_for_either(self._run, self._seat.asked))
        if self._seat.asked.is_set():
            return {"asked": self._seat.question()}
        self._run.result()
        traces = self._seat.traces
        parts = {name: None if part is None else part.score for t in traces for name, part in t.rewards.items()}
        metrics = {name: value for t in traces for name, value in t.metrics.items() if _is_finite(value)}
        finite = {name: score if score is None or _is_finite(score) else None for name, score in parts.items()}
        reward = float(sum(trace.reward for trace in traces))
        return {"asked": None, "reward": reward, "parts": finite, "metrics": metrics}


class Seat:
    """Takes the agent's place in an episode.

    To the environment it is verifiers' `Agent`, to us a question and an answer.
    """

    def __init__(self) -> None:
        self.trainable = True
        self.asked = asyncio.Event()
        self.traces: list[Any] = []
        self._question: list[Message] = []
        self._answer: asyncio.Future[str] | None = None

    def question(self) -> list[Message]:
        self.asked.clear()
        return self._question

    def reply(self, text: str) -> None:
        assert self._answer is not None
        self._answer.set_result(text)

    async def ask(self, messages: list[Message]) -> str:
        self._question, self._answer = messages, asyncio.get_running_loop().create_future()
        self.asked.set()
        return await self._answer

    async def run(self, task: Any) -> Any:
        """Hold one exchange of one turn and score it, as `Agent.run` does."""
        async with self.interaction(task) as interaction:
            await interaction.turn()
        return interaction.trace

    @asynccontextmanager
    async def interaction(self, task: Any) -> AsyncIterator[Interaction]:
        """Open an exchange that the environment leads, like `Agent.interaction`. The task scores it when it is left."""
        interaction = Interaction(self, task)
        yield interaction
        interaction.trace.stop("user_closed")
        await task.score(interaction.trace)
        interaction.trace.ok = True
        self.traces.append(interaction.trace)


class Interaction:
    """Represents an open exchange, as verifiers' own does: `turn` says something and returns the agent's segment."""

    def __init__(self, seat: Seat, task: Any) -> None:
        from verifiers.v1.configs.agent import AgentConfig
        from verifiers.v1.state import state_cls
        from verifiers.v1.trace import AgentInfo, Trace

        self._seat, self._task = seat, task
        self.trace = Trace(task=_trace_task(task), agent=AgentInfo(config=AgentConfig()), state=state_cls(type(task))())

    async def turn(self, message: Any = None) -> Any:
        """Return the agent's answer to the message, or to the task's own prompt when there is no message."""
        from verifiers.v1.agent import Segment
        from verifiers.v1.types import AssistantMessage

        said = self._opening() if not self.trace.nodes else []
        said += _to_their_messages(message)
        for one in said:
            self._add(one, sampled=False)
        answer = AssistantMessage(content=await self._seat.ask([_to_message(one) for one in said]))
        self._add(answer, sampled=True)
        return Segment(messages=[answer])

    def _opening(self) -> list[Any]:
        from verifiers.v1.types import SystemMessage

        data = self._task.data
        system = [] if data.system_prompt is None else [SystemMessage(content=data.system_prompt)]
        return [*system, *_to_their_messages(data.prompt)]

    def _add(self, message: Any, *, sampled: bool) -> None:
        from verifiers.v1.graph import MessageNode

        parent = len(self.trace.nodes) - 1 if self.trace.nodes else None
        self.trace.nodes.append(MessageNode(parent=parent, message=message, sampled=sampled))


def _stop(loop: asyncio.AbstractEventLoop, run: asyncio.Task[None]) -> None:
    """End an episode that may still be waiting for its agent, because a limit cut it."""
    run.cancel()
    with suppress(asyncio.CancelledError, Exception):
        loop.run_until_complete(run)
    loop.close()


async def _wait_for_either(run: asyncio.Task[None], asked: asyncio.Event) -> None:
    """Wait until the run is over or has asked. Raises what the run raised."""
    waiting = asyncio.ensure_future(asked.wait())
    await asyncio.wait({run, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if run.done():
        run.result()


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


async def _play_episode(env: Any, task: Any, seat: Seat) -> None:
    """Play one episode as verifiers' `run_episode` does; `seat.traces` has its rewards."""
    from verifiers.v1.agent import Agents
    from verifiers.v1.episode import EnvInfo, Episode

    agents = Agents(env.config, lambda name, spec: seat)
    await env.setup(agents)
    await env.run(task, agents)
    episode = Episode(env=EnvInfo(id=env.config.env_id), task=_trace_task(task), traces=seat.traces)
    await env.finalize(task, episode)


def _trace_task(task: Any) -> Any:
    from verifiers.v1.trace import TraceTask

    return TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)


def _to_their_messages(message: Any) -> list[Any]:
    """Convert a text, messages (dicts or verifiers' own) or None to a list of verifiers' own messages."""
    from verifiers.v1.dialects import parse_message
    from verifiers.v1.types import UserMessage

    if message is None:
        return []
    if isinstance(message, str):
        return [UserMessage(content=message)]
    return [parse_message(one) if isinstance(one, dict) else one for one in message]


def _to_message(message: Any) -> Message:
    from verifiers.v1.types import content_text

    return {"role": message.role, "content": content_text(message.content)}


def _split_tasks(env: Any, most: int) -> dict[str, list[Any]]:
    """Cut the tasks into splits; all go to train where there are too few to hold any out."""
    tasks = list(islice(env.taskset, most))
    splits: dict[str, list[Any]] = {}
    for task in tasks:
        splits.setdefault(task_split(task.key, warm=0.0), []).append(task)
    if not tasks:
        raise ConfigError(f"env.id: the taskset {env.config.taskset.id!r} has no tasks")
    return splits if len(splits) == 2 else {"train": tasks}


def _load(name: str, config: Mapping[str, Any]) -> Any:
    """Load the environment of a taskset.

    Raises ConfigError where there is none, or it needs verifiers' own rollouts.
    """
    from pydantic import ValidationError
    from verifiers.v1.configs.agent import agent_config_fields
    from verifiers.v1.utils.loaders import load_environment, resolve_env_config

    try:
        env = load_environment(resolve_env_config({"taskset": {**config, "id": name}}))
    except (ImportError, AttributeError, TypeError, ValueError, ValidationError) as error:
        raise ConfigError(f"env.id: verifiers cannot load the taskset {name!r}: {error}") from error
    task = type(env.taskset).task_type()
    needs = {
        "more than one agent": len(agent_config_fields(env.config)) != 1,
        "tool servers": bool(env.taskset.toolsets(env.taskset.config) or task.toolsets(env.taskset.config.task)),
        "a container": task.NEEDS_CONTAINER,
        "hooks that get a runtime, or stop an exchange": _has_runtime_hooks(task),
    }
    if missing := [need for need, needed in needs.items() if needed]:
        raise ConfigError(f"env.id: {name!r} needs {missing[0]}, which only verifiers' own rollouts have")
    return env


def _has_runtime_hooks(task: type) -> bool:
    import inspect

    from verifiers.v1.task import Task

    if task.setup is not Task.setup or task.finalize is not Task.finalize:  # type: ignore[attr-defined]
        return True
    methods = [getattr(task, name) for name in dir(task) if callable(getattr(task, name, None))]
    return any(
        hasattr(method, "stop") or (hasattr(method, "reward") and "runtime" in inspect.signature(method).parameters)
        for method in methods
    )
