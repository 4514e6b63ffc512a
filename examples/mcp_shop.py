"""An MCP server to try: `opd envs check "mcp:python examples/mcp_shop.py" --kwargs "{data: ..., rewards: ...}"`."""

from mcp.server.mcpserver import MCPServer

PRICES = {"apple": 3, "pear": 5, "plum": 2}
server = MCPServer("shop")


@server.tool()
def price(item: str) -> str:
    """The price of one item."""
    if item not in PRICES:
        return f"There is no {item!r}; there are: {', '.join(PRICES)}."
    return str(PRICES[item])


if __name__ == "__main__":
    server.run("stdio")
