"""What a server says in a result reaches the model; the results are those that the SDK's own types describe."""

import mcp.types as t
import pytest

from opd.envs.adapters.mcp import RemoteTool
from opd.envs.tools import ToolError

MENU = t.TextResourceContents(uri="file:///menu.txt", mime_type="text/plain", text="soup 4, bread 1")
SCAN = t.BlobResourceContents(uri="file:///scan.pdf", mime_type="application/pdf", blob="JVBERg==")


class Told:
    """Stands in the place of a session whose server answers what it is told to."""

    def __init__(self, *content, **rest):
        self.result = t.CallToolResult(content=list(content), **rest)

    def call(self, name, arguments):
        return self.result


def said(*content, **rest):
    listed = t.Tool(name="failed", input_schema={"type": "object"})
    return RemoteTool(listed, Told(*content, **rest))({})


def text(words):
    return t.TextContent(type="text", text=words)


@pytest.mark.parametrize(
    ("content", "rest", "expected"),
    [
        ([t.EmbeddedResource(type="resource", resource=MENU)], {}, "soup 4, bread 1"),
        ([t.EmbeddedResource(type="resource", resource=SCAN)], {}, "[resource file:///scan.pdf, application/pdf]"),
        (
            [t.ResourceLink(type="resource_link", name="menu", uri="file:///m", description="What there is to eat")],
            {},
            "[resource file:///m: menu. What there is to eat]",
        ),
        ([t.AudioContent(type="audio", data="UklGRg==", mime_type="audio/wav")], {}, "[audio audio/wav]"),
        ([t.ImageContent(type="image", data="iVBORw==", mime_type="image/png")], {}, "[image image/png]"),
        ([], {"structured_content": {"price": 3, "unit": "€"}}, '{"price": 3, "unit": "€"}'),
        ([text("Found one.")], {"structured_content": {"price": 3}}, 'Found one.\n{"price": 3}'),
        ([text('{"price":  3}')], {"structured_content": {"price": 3}}, '{"price":  3}'),
        ([text("3")], {"structured_content": {"result": "3"}}, "3"),
        ([text("3")], {"structured_content": {"result": 3}}, "3"),
        ([text("a"), text("b")], {"structured_content": {"result": ["a", "b"]}}, "a\nb"),
        ([], {"structured_content": {"result": None}}, "(no output)"),
        ([], {}, "(no output)"),
        ([text("")], {"structured_content": {"left": []}}, '{"left": []}'),
    ],
)
def test_all_that_a_result_says_is_told_once(content, rest, expected):
    assert said(*content, **rest) == expected


@pytest.mark.parametrize(
    ("content", "rest", "expected"),
    [
        ([], {}, "the server says that the call failed, and not why"),
        ([t.EmbeddedResource(type="resource", resource=MENU)], {}, "soup 4, bread 1"),
        ([], {"structured_content": {"code": 404, "why": "no such item"}}, '{"code": 404, "why": "no such item"}'),
    ],
)
def test_an_error_tells_what_the_server_said_of_it(content, rest, expected):
    with pytest.raises(ToolError) as raised:
        said(*content, is_error=True, **rest)
    assert str(raised.value) == expected
