"""Watching the other ranks: when one dies, this process says which at once, and ends too.

A rank that waits for a dead one in a collective operation waits for the time limit, and then blames the network. So
every rank holds a connection to the first rank: when a process ends, whatever killed it, the kernel closes its
connection. A rank that ends in order says so first; inside common work (`together`) no end is in order.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, TypedDict

from opd.ranks.ranks import Ranks, SharedError

_ENDED_WELL = b"."
_SECONDS = 60.0
"""Seconds for the connections to be made."""


class _Member(TypedDict):
    rank: int
    host: str
    pid: int


class _Watch:
    """This rank's connections: the first rank has one to each of the others, and these have one to it."""

    def __init__(self, connections: list[tuple[int, socket.socket]], members: list[_Member]) -> None:
        self.busy = False
        self._left = False
        self._connections = dict(connections)
        for rank in self._connections:
            thread = threading.Thread(target=self._wait, args=(rank, members[rank]), daemon=True)
            thread.start()
        atexit.register(self._leave)

    def _wait(self, rank: int, member: _Member) -> None:
        """Wait, on a thread, until the other side ends in order, is gone, or passes on which rank is gone."""
        try:
            message = self._connections[rank].recv(4096)
        except OSError:
            message = b""
        if message.startswith(_ENDED_WELL) or self._left:
            return
        gone = json.loads(message) if message else member
        self._tell(json.dumps(gone).encode())
        _end(gone)

    def _leave(self) -> None:
        """Say, as the process ends by itself, that it does; an error was printed before this."""
        self._left = True
        if not self.busy:
            self._tell(_ENDED_WELL)

    def _tell(self, what: bytes) -> None:
        for connection in self._connections.values():
            try:
                connection.sendall(what)
            except OSError:  # it is gone, too
                continue


_watching: list[_Watch] = []


def watch(ranks: Ranks) -> None:
    """Connect all ranks, and start watching on threads; every rank calls it at the same point."""
    own = _Member(rank=ranks.rank, host=socket.gethostname(), pid=os.getpid())
    members = ranks.gather(own)
    server = socket.create_server((os.environ["MASTER_ADDR"], 0)) if ranks.first else None
    where = ranks.from_first(lambda: (server.getsockname()[:2], secrets.token_bytes(16)) if server else None)
    assert where is not None
    address, token = where
    connections = _accept(server, token, ranks.world_size - 1) if server else [(0, _connect(address, token, own))]
    _watching.append(_Watch(connections, members))
    ranks.wait()


@contextmanager
def together() -> Iterator[None]:
    """Mark work that all ranks do together: one that leaves it by an error of its own ends them all."""
    for watching in _watching:
        watching.busy = True
    try:
        yield
    except SharedError:
        _mark_idle()
        raise
    _mark_idle()


def _mark_idle() -> None:
    for watching in _watching:
        watching.busy = False


def _connect(address: tuple[str, int], token: bytes, own: _Member) -> socket.socket:
    connection = socket.create_connection(address, timeout=_SECONDS)
    connection.sendall(token + own["rank"].to_bytes(4))
    return _keep_connection_alive(connection)


def _accept(server: socket.socket, token: bytes, count: int) -> list[tuple[int, socket.socket]]:
    found: dict[int, socket.socket] = {}
    with server:
        server.settimeout(_SECONDS)
        while len(found) < count:
            connection, _ = server.accept()
            connection.settimeout(_SECONDS)
            message = connection.recv(len(token) + 4, socket.MSG_WAITALL)
            if secrets.compare_digest(message[: len(token)], token) and len(message) == len(token) + 4:
                found[int.from_bytes(message[len(token) :])] = _keep_connection_alive(connection)
            else:
                connection.close()
    return list(found.items())


def _keep_connection_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # a machine that went away sends nothing: it is missed within half a minute
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _end(gone: _Member) -> NoReturn:
    """End the process: its main thread may wait inside a collective operation, where no exception reaches it."""
    print(
        f"error: rank {gone['rank']} (process {gone['pid']} on {gone['host']}) is gone; this rank ends too. "
        "Its own message, if it had one, is above. Go on from the last checkpoint with --resume.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
