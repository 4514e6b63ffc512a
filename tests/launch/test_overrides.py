"""`--key.sub value` on the command line."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import ConfigError
from opd.launch.settings.config import all_settings
from opd.launch.settings.overrides import merge, put, split

SETTINGS = all_settings()
OPTIONS = ("--steps", "--out", "--resume", "-h", "--help")

TEXT = st.text("ab1.e é世:'\"\\\n\t#{}[],-&*!|>%@`=", max_size=8)
NAMES = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=6)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


def taken(*arguments: str) -> tuple[list[str], dict]:
    return split(arguments, options=OPTIONS, settings=SETTINGS)


@given(st.dictionaries(NAMES, VALUES, max_size=4), st.booleans())
def test_what_is_given_is_what_is_read(values, joined):
    arguments = []
    for name, value in values.items():
        key, text = f"--env.kwargs.{name}", json.dumps(value, ensure_ascii=False)
        arguments += [f"{key}={text}"] if joined else [key, text]
    left, read = taken("train", "x.yaml", *arguments)
    assert left == ["train", "x.yaml"]
    assert read == {f"env.kwargs.{name}": value for name, value in values.items()}


@given(st.recursive(st.dictionaries(NAMES, VALUES, max_size=3), lambda d: st.dictionaries(NAMES, d, max_size=3)))
def test_merging_every_leaf_into_nothing_gives_the_whole(tree):
    def leaves(node, prefix=""):
        for name, value in node.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    root = {"kwargs": tree}
    assert merge({}, dict(leaves(root))) == root


def test_the_command_keeps_its_own_options_and_its_file():
    left, values = taken("train", "--steps", "3", "--train.lr", "1e-4", "x.yaml", "--resume", "--seed=7", "--out", "d")
    assert left == ["train", "--steps", "3", "x.yaml", "--resume", "--out", "d"]
    assert values == {"train.lr": 1e-4, "seed": 7}


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--env.kwargs.x", "-1"], -1),
        (["--env.kwargs.x=-1"], -1),
        (["--env.kwargs.x=--a"], "--a"),
        (["--env.kwargs.x", "a=b"], "a=b"),
        (["--env.kwargs.x=a=b"], "a=b"),
        (["--env.kwargs.x", ""], ""),
        (["--env.kwargs.x="], ""),
        (["--env.kwargs.x", "null"], None),
        (["--env.kwargs.x", "no"], "no"),
        (["--env.kwargs.x", "[1, 2]"], [1, 2]),
        (["--env.kwargs.x", "{a: 1}"], {"a": 1}),
        (["--env.kwargs.x.y", "1"], 1),
    ],
)
def test_values_are_read_as_in_the_file(arguments, value):
    _, values = taken(*arguments)
    assert list(values.values()) == [value]
    assert type(next(iter(values.values()))) is type(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trian.lr", "1"], r'^command line: --trian\.lr is unknown\. Did you mean "--train\.lr"\?'),
        (["--lr", "1"], r'--lr is unknown\. Did you mean "--train\.lr"\?'),
        (["--stesp", "1"], r'--stesp is unknown\. Did you mean "--steps"\?'),
        (["--resum", "x.yaml"], r'--resum is unknown\. Did you mean "--resume"\?'),
        (["--model.lora.rank", "1"], r"--model\.lora\.rank is unknown\."),
        (["--section.clip", "1"], r"--section\.clip is unknown"),
        (["--sd_zero.divergence", "jsd"], r'--sd_zero\.divergence is unknown\. Did you mean "--sd_zero\.'),
        (["--train.lr"], r"--train\.lr needs a value: a number above 0$"),
        (["--train.lr", "--seed", "1"], r"--train\.lr needs a value: a number above 0$"),
        (["--env.kwargs.x"], r"--env\.kwargs\.x needs a value: any value$"),
        (["--env.kwargs.x", "[1"], r"^command line: --env\.kwargs\.x: line 1: "),
        (["--seed", "1", "--seed=2"], r"^command line: seed is given twice: 1 and 2\. Give one\.$"),
    ],
)
def test_mistakes_are_answered_with_the_mend(arguments, message):
    with pytest.raises(ConfigError, match=message):
        taken(*arguments)


def test_a_short_option_beside_its_setting_is_given_twice():
    values = {"train.steps": 3}
    with pytest.raises(ConfigError, match=r"train\.steps is given twice: 3 and 4"):
        put(values, "train.steps", 4)


@pytest.mark.parametrize(
    ("data", "overrides", "merged"),
    [
        ({"model": "a"}, {"model.lora.r": 8}, {"model": {"name": "a", "lora": {"r": 8}}}),
        ({"model": "a"}, {"model": "b"}, {"model": {"name": "b"}}),
        (
            {"opsd": {"divergence": "jsd"}},
            {"opsd.divergence.beta": 0.1},
            {"opsd": {"divergence": {"kind": "jsd", "beta": 0.1}}},
        ),
        (
            {"opsd": {"divergence": {"clip": None}}},
            {"opsd.divergence": "jsd"},
            {"opsd": {"divergence": {"kind": "jsd"}}},
        ),
        (
            {"opsd": {"divergence": {"kind": "jsd", "beta": 0.1, "clip": None}}},
            {"opsd.divergence.clip": 0.1, "opsd.divergence": "reverse_kl"},
            {"opsd": {"divergence": {"kind": "reverse_kl", "clip": 0.1}}},
        ),
        ({}, {"opsd.divergence": None}, {"opsd": {"divergence": {"kind": None}}}),
        ({}, {"env.kwargs.divergence": "x"}, {"env": {"kwargs": {"divergence": "x"}}}),
        ({"model": {"name": "a", "lora": {"r": 4}}}, {"model": "b"}, {"model": {"name": "b", "lora": {"r": 4}}}),
        ({"model": {"name": "a", "lora": {"r": 4}}}, {"model": {"name": "b"}}, {"model": {"name": "b"}}),
        ({"model": {"name": "a", "lora": {"r": 4}}}, {"model.lora": None}, {"model": {"name": "a", "lora": None}}),
        ({"model": {"name": "a", "lora": None}}, {"model.lora.r": 4}, {"model": {"name": "a", "lora": {"r": 4}}}),
        ({}, {"model.lora.r": 4, "model": "a"}, {"model": {"lora": {"r": 4}, "name": "a"}}),
        ({"env": "a"}, {"env.kwargs.n": 1}, {"env": {"id": "a", "kwargs": {"n": 1}}}),
        ({"train": None}, {"train.lr": 1}, {"train": {"lr": 1}}),
        ({"train": {"lr": 1, "steps": 2}}, {"train.lr": 3}, {"train": {"lr": 3, "steps": 2}}),
    ],
)
def test_overrides_are_laid_over_the_file(data, overrides, merged):
    before = copy.deepcopy(data)
    assert merge(data, overrides) == merged
    assert data == before
