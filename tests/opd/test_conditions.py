"""Settings that are used under a condition: who says so, and what is refused where (`opd.config.setting`)."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field, ValidationError

from opd.config import Strict, condition_of, setting
from opd.launch.settings.schema import walk


class Section(Strict):
    form: Literal["exact", "sampled"] = "exact"
    share: float = 0.0
    name: str | None = None
    bound: float | None = setting(None, when={"form": ["sampled"]}, description="A bound.")
    size: int = setting(3, when={"form": ["sampled"], "share": True})
    file: str | None = setting(None, when={"name": ["a", "b"]}, needed="its path")
    unnamed: int = setting(0, when={"name": [None]})


class Below(Section):
    """Another default and another form by itself; the conditions are those of the class above."""

    form: Literal["exact", "sampled"] = "sampled"
    bound: float | None = Field(2.0, description="Another bound.")


class Outer(Strict):
    inner: Below = Below()


def wrong(section: type[Strict], **settings: object) -> dict[tuple[int | str, ...], str]:
    """What is said of each setting, by where it stands."""
    with pytest.raises(ValidationError) as caught:
        section(**settings)
    return {error["loc"]: error["msg"] for error in caught.value.errors()}


def test_a_setting_whose_condition_does_not_hold_must_be_at_its_default():
    found = wrong(Section, bound=1.0)
    assert found == {("bound",): "is used by form = sampled alone, but form = exact; remove it"}
    assert Section(form="sampled", bound=1.0).bound == 1.0
    assert Section(bound=None).bound is None


def test_the_first_condition_that_does_not_hold_is_told():
    assert wrong(Section, size=4) == {("size",): "is used by form = sampled alone, but form = exact; remove it"}
    said = "is used with share alone; set share, or remove it"
    assert wrong(Section, size=4, form="sampled") == {("size",): said}
    assert Section(size=4, form="sampled", share=0.1).size == 4


def test_a_setting_that_is_needed_must_be_there_and_only_then():
    assert wrong(Section, name="b") == {("file",): "is missing: name = b needs it (its path)"}
    assert wrong(Section, file="x") == {("file",): "is used by name = a or b alone, but name = null; remove it"}
    assert Section(name="a", file="x").file == "x"


def test_null_is_a_value_that_a_condition_may_ask_for():
    said = "is used by name = null alone, but name = a; remove it"
    assert wrong(Section, name="a", file="x", unnamed=1) == {("unnamed",): said}
    assert Section(unnamed=1).unnamed == 1


def test_every_setting_without_effect_is_told_at_once():
    assert set(wrong(Section, bound=1.0, size=4, file="x")) == {("bound",), ("size",), ("file",)}


def test_a_subclass_keeps_the_conditions_and_has_defaults_of_its_own():
    assert Below().bound == 2.0
    assert Below(form="exact").bound == 2.0  # it was not given
    assert set(wrong(Below, form="exact", bound=1.0)) == {("bound",)}
    assert condition_of(Below, "bound") == condition_of(Section, "bound")
    assert condition_of(Section, "form") is None


def test_a_nested_section_says_where_it_stands():
    found = wrong(Outer, inner={"form": "exact", "bound": 1.0})
    assert found == {("inner", "bound"): "is used by form = sampled alone, but form = exact; remove it"}


def test_a_condition_is_explained():
    told = {found.key: found.explanation() for found in walk(Below)}
    assert "    used by: form = sampled alone\n    Another bound." in told["bound"]
    assert "    used by: form = sampled and share alone" in told["size"]
    assert "    used by: name = a or b alone, and needed then" in told["file"]
    assert "used by" not in told["form"]
