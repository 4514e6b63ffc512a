"""The digest of the code that a result depends on: what changes it, and what does not.

Not covered: code that looks a name up by its text, or is replaced while it runs. The digest does not see that.
"""

import sys
from types import ModuleType

import pytest

from opd.launch.tiny.definitions import digest

ONE = """
from opd.two import helper, unused
import opd.three as three
from opd import four


def root(x, y=3):
    return helper(x) + three.value + four.other.value


def beside():
    return unused
"""
SOURCES = {
    "one": ONE,
    "two": "from opd.five import helper\n\n\ndef unused():\n    return 1\n",  # hands on what another defines
    "three": "value, more = 1, 2\n",
    "four": "import opd.three as other\napart = 1\n",
    "five": """
class Base:
    size = 4

    def grown(self):
        return self.size + 1


class Made(Base):
    pass


def deco(f):
    return f


TABLE = {}
for n in range(3):
    TABLE[n] = n


@deco
def helper(x):
    from opd.six import late

    return Made().grown() + late(x)


def apart():
    return 2
""",
    "six": "LIMIT: int = 7\n\n\ndef late(x):\n    return min(x, LIMIT)\n\n\nasync def apart():\n    return 1\n",
}


@pytest.fixture
def digest_of(tmp_path, monkeypatch):
    """`digest_of(module=text)`: of `opd.one.root`, with these texts in place of what stands in the modules."""

    def made(**changed):
        for name, text in (SOURCES | changed).items():
            (tmp_path / f"{name}.py").write_text(text)
            module = ModuleType(f"opd.{name}")
            module.__file__ = str(tmp_path / f"{name}.py")
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return digest([("opd.one", "root")])

    return made


def edited(module, old, new):
    assert old in SOURCES[module]
    return {module: SOURCES[module].replace(old, new)}


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        pytest.param("one", "y=3", "y=4", id="a default"),
        pytest.param("one", "helper(x) +", "helper(x) -", id="an operator"),
        pytest.param("one", "import helper, unused", "import unused as helper, unused", id="another of the same name"),
        pytest.param("three", "1, 2", "5, 2", id="an attribute of a module"),
        pytest.param("four", "opd.three", "opd.six", id="a module within a module"),
        pytest.param("five", "size = 4", "size = 5", id="a base class"),
        pytest.param("five", "return f", "return lambda x: x", id="a decorator"),
        pytest.param("five", "range(3)", "range(4)", id="a loop that fills a table"),
        pytest.param("six", "min(x, LIMIT)", "max(x, LIMIT)", id="what is imported within a function"),
        pytest.param("six", "int = 7", "int = 8", id="a constant with a type"),
        pytest.param("six", "LIMIT: int", "if so", id="a file that is no Python any more"),
    ],
)
def test_a_change_of_what_is_reached_changes_the_digest(digest_of, module, old, new):
    assert digest_of(**edited(module, old, new)) != digest_of()


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        pytest.param("one", "return unused", "return 2", id="another function"),
        pytest.param("one", "def root(x, y=3):\n", "def root(x, y=3):  # why\n", id="a comment"),
        pytest.param("one", "y=3):\n", 'y=3):\n    """What it is."""\n', id="a docstring"),
        pytest.param("one", "def root(x, y=3):", "def root(\n    x,\n    y=3,\n):", id="the layout"),
        pytest.param("one", "from opd.two", "import os\nfrom opd.two", id="an import that it does not use"),
        pytest.param("two", "return 1", "return 2", id="a function that is imported beside it"),
        pytest.param("four", "apart = 1", "apart = 2", id="another constant"),
        pytest.param("five", "    size = 4\n", '    size = 4\n    """How large."""\n', id="the docstring of a field"),
        pytest.param("five", "\nclass Base", '"""A module."""\n\n\nclass Base', id="the docstring of a module"),
        pytest.param("five", "return 2", "return 3", id="a function beside one in another module"),
        pytest.param(
            "two",
            "from opd",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from opd.one import beside\nfrom opd",
            id="what only types need",
        ),
        pytest.param("six", "return 1", "return 2", id="a function beside one that is imported late"),
    ],
)
def test_a_change_of_anything_else_does_not(digest_of, module, old, new):
    assert digest_of(**edited(module, old, new)) == digest_of()


@pytest.mark.parametrize("condition", ["not TYPE_CHECKING", "True", "TYPE_CHECKING:\n    pass\nelif True"])
def test_what_stands_under_a_condition_belongs_to_the_module(digest_of, condition):
    text = SOURCES["six"].replace("LIMIT: int", f"if {condition}:\n    LIMIT")
    assert digest_of(six=text) != digest_of(six=text.replace("= 7", "= 8"))


def test_a_module_that_is_not_loaded_yet_is_followed_as_one_that_is(digest_of, monkeypatch):
    text = "def root():\n    from opd.launch.tiny.muon import orthogonal\n    return orthogonal\n"
    loaded = digest_of(one=text)
    monkeypatch.delitem(sys.modules, "opd.launch.tiny.muon", raising=False)
    assert digest_of(one=text) == loaded
    assert digest_of(one=text.replace("orthogonal", "Muon")) != loaded


def test_what_is_not_there_or_not_of_the_package_is_refused(digest_of):
    digest_of()
    with pytest.raises(ValueError, match=r"opd\.one does not define 'rot' at its top level"):
        digest([("opd.one", "rot")])
    with pytest.raises(ValueError, match=r"json\.dumps is not of opd"):
        digest([("json", "dumps")])
