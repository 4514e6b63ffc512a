"""Serves `opd.episodes.processes`: forks a process for each environment, and runs the environment there.

The server is started afresh (never forked from the trainer, whose threads and devices do not survive a fork),
imports what environments need once, and then forks quickly (`opd.sandbox.forks`).
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import pickle
import signal
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, NoReturn

from opd.episodes import answers
from opd.episodes.answers import Answer
from opd.episodes.faults import explain
from opd.grading import Trainer, listening
from opd.plain_text import LastingStream
from opd.sandbox.forks import ForkServer, read_frame, write_frame
from opd.secrets import know_environment, redact_console
from opd.types import Task


def play(connection: socket.socket) -> None:
    """Answer the calls of one environment until the other side is gone."""
    env: Any = None
    process = os.getpid()
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None:
            setattr(sys, name, LastingStream(stream))
    factory = read_frame(connection) or b""
    while (frame := read_frame(connection)) is not None:
        request = json.loads(frame)
        reply: dict[str, Any]
        try:
            with listening(lambda begins: _send(connection, {"grading": begins})):
                match request["call"]:
                    case "reset":
                        env = pickle.loads(factory)() if env is None else env
                        told = request["trainer"]
                        answer = answers.reset(env, Task(**request["goal"]), told and Trainer(**told))
                        reply = {"answer": _written(answer)}
                    case "step":
                        reply = {"answer": _written(answers.step(env, request["action"]))}
                    case "score_group":
                        env = pickle.loads(factory)() if env is None else env
                        members = [pickle.loads(base64.b64decode(one)) for one in request["members"]]
                        scored = answers.score_group(env, members, request["ids"])
                        reply = {"answers": [_written(answer) for answer in scored]}
                    case _:
                        if env is not None:
                            env.close()
                        reply = {"answer": None}
        except BaseException as error:  # sys.exit() too is an answer
            fault, reason = explain(error)
            reply = {"fault": fault, "reason": reason}
        if os.getpid() != process:  # the environment has forked: two would answer
            os._exit(1)
        _send(connection, reply)


def _written(answer: Answer) -> dict[str, Any]:
    """Write an answer as JSON has it. What it hands out for its group's scoring is pickled here and read here, in
    another of these processes: the trainer keeps it and never reads it."""
    member = None if answer.member is None else base64.b64encode(pickle.dumps(answer.member)).decode()
    return asdict(replace(answer, member=None)) | {"member": member}


def _send(connection: socket.socket, reply: dict[str, Any]) -> None:
    write_frame(connection, json.dumps(reply).encode())


def main(plan: str) -> NoReturn:
    """Serve at the socket `descriptor`, once the `modules` are imported; `plan` says both, in JSON."""
    told = json.loads(plan)
    redact_console()
    know_environment()
    server = ForkServer(socket.socket(fileno=told["descriptor"]), play)
    server.watch_trainer()
    for module in told["modules"]:
        with suppress(Exception):  # the environment that needs it will say so, where somebody listens
            importlib.import_module(module)
    if threading.active_count() > 1:  # a fork would lose them: begin again without
        signal.setitimer(signal.ITIMER_REAL, 0)  # would outlive its handler
        os.execv(sys.executable, command_line({**told, "modules": []}))
    server.serve()


def command_line(plan: dict[str, Any]) -> list[str]:
    """Return the command that starts a server.

    `plan["path"]` is the trainer's `sys.path`: both find the same modules.
    """
    code = "import json, sys; sys.path[:] = json.loads(sys.argv[1])['path']; import opd.episodes.env_server as s; "
    return [sys.executable, "-c", f"{code}s.main(sys.argv[1])", json.dumps(plan)]
