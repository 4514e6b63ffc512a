"""A real MCP server over stdio, for the tests; some of its tools misbehave as servers do."""

import os
import sys
import time

from mcp.server.mcpserver import MCPServer

server = MCPServer("shop")
notes: list[str] = []


@server.tool()
def price(item: str) -> str:
    """The price of an item."""
    return {"apple": "3", "pear": "5"}[item]


@server.tool()
def note(text: str) -> str:
    """Write a note."""
    notes.append(text)
    return f"{len(notes)} written"


@server.tool()
def variables() -> str:
    """The names of the environment variables."""
    return " ".join(sorted(os.environ))


@server.tool()
def long() -> str:
    """A long answer."""
    return "y" * 1_000_000


@server.tool()
def hang() -> str:
    """Never answer, and do not listen either."""
    while True:
        time.sleep(1)


@server.tool()
def die() -> str:
    """End the server."""
    os._exit(3)


@server.tool()
def flood() -> str:
    """Write without end, in no protocol."""
    while True:
        os.write(1, b"x" * 65536)


if __name__ == "__main__":
    with open(sys.argv[1], "a") as file:
        file.write(f"{os.getpid()}\n")
    server.run("stdio")
