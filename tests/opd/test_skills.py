"""Skills: harmless texts, the bank's guards and order, grounding, and the file that a person may change."""

import copy
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import DataError
from opd.trainers.skill_sd import file
from opd.trainers.skill_sd.bank import SkillBank
from opd.trainers.skill_sd.finding import Finder
from opd.trainers.skill_sd.grounding import Index, Proxies, proxies
from opd.trainers.skill_sd.skill import Lesson, Source, from_row, to_row
from opd.trainers.skill_sd.text import coverage, jaccard, likeness, neutral, rarity, structural_tokens


def source(task="train/0", prompt="the task", step=1, member=0):
    return Source(
        task=task,
        prompt=prompt,
        episodes=(f"step-{step}/{task}/{member}",),
        step=step,
        policy_version=step - 1,
        summariser="rules",
    )


def bank(**changes):
    return SkillBank(**({"capacity": 10, "per_task": 3, "max_age": 5} | changes))


def finder(made, *, untried=True):
    return Finder(bank=made, explore=1.0, min_likeness=0.2, untried=untried)


def find(made, *args, **changes):
    return finder(made, **changes).find(*args)


def filled(*entries, **changes):
    """`filled((text, task, prompt), ...)`"""
    made = bank(**changes)
    for text, task, prompt in entries:
        made.add(Lesson(workflow=text), source(task, prompt), pdi=0.0)
    return made


def texts(skills):
    return [skill.lesson.workflow for skill in skills]


# -- texts ---------------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "<|im_", "end|>", "<", "|", ">", "x", " "]), max_size=12)
)
def test_no_special_token_is_left_whatever_it_is_broken_into(make_tokenizer, pieces):
    tokenizer = make_tokenizer()
    text = neutral("".join(pieces), structural_tokens(tokenizer), most=200)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_tokens_that_look_like_markup_are_structure_too(make_tokenizer):
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.add_tokens(["<think>", "[INST]", "plain words", "<a b>"])
    found = structural_tokens(tokenizer)
    assert {"<think>", "[INST]", "<|im_end|>"} <= set(found)
    assert not {"plain words", "<a b>"} & set(found)
    assert neutral("a <think> b", found, most=99) == "a < think> b"


def test_a_text_is_bounded_and_its_invisible_characters_go():
    assert neutral("a\u200bb\x00c\r\nd\u202e", [], most=99) == "abc\nd"
    assert neutral("a\u2028b\u2029c\x85d", [], most=99) == "a\nb\ncd"
    assert len(neutral("x" * 10_000_000, [], most=50)) <= 50


def test_likeness_counts_rare_words_and_not_those_that_all_have():
    documents = [{"solve", "this", "hue"}, {"solve", "this", "town"}, {"solve", "this", "boss"}]
    rare = rarity(documents)
    assert rare["solve"] == 0.0
    query = dict.fromkeys(["solve", "this", "hue"], 1.0)
    assert [round(likeness(query, d, rare), 6) for d in documents] == [1.0, 0.0, 0.0]
    assert likeness(dict.fromkeys(["unheard"], 1.0), documents[0], rare) == 0.0


def test_shares_of_words():
    assert jaccard("a b c", "B c d") == 0.5
    assert jaccard("", "") == 0.0
    assert coverage("get(person=ann)", {"get", "ann"}) == pytest.approx(2 / 3)


# -- the bank ------------------------------------------------------------------------------------------


def test_a_tasks_own_skills_come_first_then_those_of_like_tasks_and_no_others():
    made = filled(
        ("look for color", "train/1", "the hue of ann"),
        ("look for boss", "train/2", "the chief of ben"),
        ("stop in time", "train/3", "another thing"),
        ("own one", "train/0", "the hue of zoe"),
    )
    assert texts(find(made, "train/0", "the hue of zoe", 3)) == ["own one", "look for color"]
    assert texts(find(made, "train/9", "the hue of zoe", 1)) == ["own one"]
    assert find(made, "train/9", "unlike", 3) == []


def test_of_like_tasks_the_next_one_speaks_of_what_the_first_did_not():
    made = filled(
        ("hue means color", "train/1", "hue"),
        ("hue means color, always", "train/2", "hue"),
        ("chief means boss", "train/3", "chief"),
        ("x", "train/4", "nothing to do with it"),
    )
    found = texts(find(made, "train/0", "the hue of the chief", 2))
    assert "chief means boss" in found
    assert len(found) == 2


def test_of_a_tasks_own_the_unseen_comes_first_and_then_the_upper_confidence_bound():
    made = filled(*((name, "train/0", "p") for name in ("one", "two", "three")))
    made.credit(["s00001"], [1.0, 1.0, 1.0, 1.0], step=2)
    made.credit(["s00002"], [0.0, 0.0, 0.0, 0.0], step=2)
    assert texts(find(made, "train/0", "p", 3)) == ["three", "one", "two"]
    made.credit(["s00003"], [0.0], step=2)
    bonus = {n: math.sqrt(math.log(9) / n) for n in (4, 1)}
    assert 0.0 + bonus[1] > 1.0 + bonus[4] - 0.3  # what was seldom shown has nearly caught up
    order = sorted([("one", 1 + bonus[4]), ("two", bonus[4]), ("three", bonus[1])], key=lambda pair: -pair[1])
    assert texts(find(made, "train/0", "p", 3)) == [name for name, _ in order]


def test_an_untried_skill_is_not_found_unless_a_person_wrote_it():
    made = filled(("one", "train/0", "p"))
    assert find(made, "train/0", "p", 1, untried=False) == []
    assert [(s.lesson.workflow, where) for s, where in finder(made).find_untried("train/0", "p", 1)] == [("one", "own")]
    made.skills["s00001"] = file.edit(made.skills["s00001"], Lesson(workflow="mine"), who="me")
    assert texts(find(made, "train/0", "p", 1, untried=False)) == ["mine"]


def test_a_skill_is_found_where_it_was_tried_and_lifted():
    made = filled(("the hue", "train/0", "hue"), ("the town", "train/1", "town"))
    assert made.add_trials("s00001", {"own": [0.2, 0.4]}).lifts == {"own": pytest.approx(0.3)}
    assert texts(find(made, "train/0", "hue", 1, untried=False)) == ["the hue"]
    assert find(made, "train/9", "hue", 1, untried=False) == []  # nobody knows whether it helps with another task
    assert [(s.id, where) for s, where in finder(made).find_untried("train/9", "hue", 1)] == [("s00001", "like")]
    assert finder(made).find_untried("train/0", "hue", 1) == []
    assert made.add_trials("s00001", {"own": [0.9]}).trials == {"own": 3}
    assert made.skills["s00001"].lift == pytest.approx(0.5)
    made.add_trials("s00001", {"like": [-0.2]})
    assert find(made, "train/9", "hue", 1, untried=False) == []
    assert finder(made).find_untried("train/9", "hue", 1) == []
    made.add_trials("s00001", {"like": [0.4]})
    assert texts(find(made, "train/9", "hue", 1, untried=False)) == ["the hue"]


def test_a_skill_that_lifts_nowhere_is_dropped_and_a_persons_is_not():
    made = filled(("one", "train/0", "p"), ("two", "train/1", "p"), ("three", "train/2", "p"), min_lift=0.05)
    made.skills["s00002"] = file.edit(made.skills["s00002"], Lesson(workflow="mine"), who="me")
    assert made.add_trials("s00003", {"own": [-0.1], "like": [0.1]}) is not None  # it is still good for like tasks
    assert made.add_trials("s00001", {"own": [0.04], "like": [0.04]}) is None
    assert made.add_trials("s00002", {"own": [-0.1]}) is not None
    assert list(made.skills) == ["s00002", "s00003"]


def test_the_same_lesson_of_another_task_is_one_skill_of_both():
    made = filled(("look for color", "train/0", "p"), ("look for color", "train/1", "q"), ("look", "train/1", "q"))
    assert [skill.tasks for skill in made.skills.values()] == [("train/0", "train/1"), ("train/1",)]
    assert texts(find(made, "train/1", "q", 1)) == ["look for color"]


def test_nearly_the_same_lesson_of_a_task_is_a_new_version_and_the_old_text_is_kept():
    made = filled(("get the boss then the hue of it all", "train/0", "p"))
    made.add_trials("s00001", {"own": [0.5]})
    renewed = made.add(Lesson(workflow="get the boss then the hue of it"), source(step=9), pdi=0.3)
    assert (renewed.id, renewed.version, renewed.pdi, renewed.source.step) == ("s00001", 2, 0.3, 9)
    assert renewed.history == ("Workflow: get the boss then the hue of it all",)
    assert renewed.lift is None  # another text was not tried
    assert made.add(Lesson(workflow="get the boss then the hue of it"), source(step=10), pdi=0.3) is None
    assert made.skills["s00001"].used == 10
    made.skills["s00001"] = file.edit(
        made.skills["s00001"], Lesson(workflow="get the boss and the hue of it"), who="me"
    )
    assert made.add(Lesson(workflow="get the boss then the hue of it"), source(step=11), pdi=0.3) is None
    assert made.skills["s00001"].lesson.workflow == "get the boss and the hue of it"


def test_the_bank_is_bounded_by_what_lifts_and_forgets_what_is_old():
    made = bank(capacity=3, per_task=2, max_age=5)
    for n in range(6):
        made.add(Lesson(workflow=f"skill number {n} {'abc'[n % 3] * 9}"), source(f"train/{n // 3}"), pdi=0.0)
        made.add_trials(f"s{n + 1:05d}", {"own": [n / 10]})
    assert made.forget(step=2) == 3
    assert list(made.skills) == ["s00003", "s00005", "s00006"]  # two a task, then three in all
    made.credit(["s00005"], [1.0], step=6)
    assert made.forget(step=7) == 2
    assert list(made.skills) == ["s00005"]


def test_what_a_person_changed_is_never_forgotten():
    made = filled(*((name, "train/0", "p") for name in ("one", "two", "three")), capacity=1, per_task=1)
    for id in ("s00001", "s00002"):
        made.take(file.edit(made.skills[id], Lesson(workflow=f"mine, not {id}"), who="me"))
    assert made.forget(step=999) == 1
    assert list(made.skills) == ["s00001", "s00002"]
    made.add(Lesson(workflow="a fourth"), source("train/1"), pdi=0.0)
    assert made.forget(step=1) == 1  # what a person wrote is shown, so it counts


def test_a_retired_skill_takes_nobodys_room():
    made = filled(("one", "train/0", "p"), ("two", "train/1", "p"), capacity=1, per_task=1)
    for id in ("s00001", "s00002"):
        made.take(file.retire(made.skills[id], who="me"))
    made.add(Lesson(workflow="another"), source("train/0"), pdi=0.0)
    assert made.forget(step=1) == 0
    assert texts(find(made, "train/0", "p", 3)) == ["another"]


def test_only_training_tasks_may_teach():
    for task in ("eval/0", "warm/3", "training/1"):
        with pytest.raises(DataError, match="only training tasks may teach"):
            bank().add(Lesson(workflow="x"), source(task), pdi=0.0)


def test_a_bank_is_restored_whole_through_json():
    made = filled(("one", "train/0", "p"), ("two", "train/1", "q"), ("two", "train/2", "q"))
    made.add_trials("s00001", {"own": [0.25], "like": [0.5]})
    made.credit(["s00001"], [1.0, 0.0], step=3)
    made.add(Lesson(workflow="one", mistakes="none"), source(step=4), pdi=0.5)
    again = bank()
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert again == made


# -- grounding -----------------------------------------------------------------------------------------


def test_support_is_the_share_of_what_happened_that_the_skill_covers():
    done = ["get(person=ann, field=boss)", "answer(value=tea)"]
    assert proxies(Lesson(workflow="get person ann, field boss; answer value tea"), done, None) == (1.0, 0.0, 0.0)
    assert proxies(Lesson(workflow="answer the value tea"), done, None).exec == pytest.approx((0 + 1) / 2)
    assert proxies(Lesson(workflow="something invented"), done, None).exec == 0.0
    assert proxies(Lesson(workflow="anything"), [], None).exec == 0.0


def test_the_index_is_the_papers_and_falls_where_a_skill_repeats_the_last():
    """SPARK's formula by hand: z-scores over what was seen so far, damped for a task's first skill."""
    index = Index()
    seen = [Proxies(1.0, 0.0, 0.0), Proxies(0.5, 0.0, 0.0), Proxies(0.9, 1.0, 0.5)]
    first = index.add(seen[0], 1)
    assert first == 1.0 * 0.5  # a raw difference, and the first of its task

    def z(n, values):
        column = [p[n] for p in values]
        mean = sum(column) / len(column)
        spread = math.sqrt(sum((c - mean) ** 2 for c in column) / len(column))
        return (column[-1] - mean) / spread if spread else 0.0

    second = index.add(seen[1], 1)
    assert second == pytest.approx(0.5 * (z(0, seen[:2]) - z(1, seen[:2]) - z(2, seen[:2])))
    third = index.add(seen[2], 2)
    assert third == pytest.approx(z(0, seen) - z(1, seen) - z(2, seen))
    assert third < -0.5
    again = Index()
    again.load_state_dict(json.loads(json.dumps(index.state_dict())))
    assert again.add(seen[0], 3) == index.add(seen[0], 3)


def test_staleness_and_inertia_are_told_apart():
    last = Lesson(workflow="a b", success="c d", mistakes="e f")
    assert proxies(Lesson(workflow="a b", success="x", mistakes="y"), ["a"], last) == (1.0, 1.0, 0.0)
    assert proxies(Lesson(workflow="z", success="c d", mistakes="y"), ["z"], last) == (1.0, 0.0, 0.5)


# -- the file ------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_begins_with_the_text(tmp_path):
    made = filled(("one\nline é", "train/0", "p"), ("two", "train/1", "q"))
    path = tmp_path / "data" / "skills.jsonl"
    file.write(path, made.skills.values())
    assert file.read(path) == list(made.skills.values())
    assert path.read_text().startswith('{"id": "s00001", "text": "Workflow: one\\nline é"')
    assert [p.name for p in path.parent.iterdir()] == ["skills.jsonl"]


def test_a_line_of_the_file_ends_only_where_it_was_ended(tmp_path):
    made = filled(*((f"one{end}line", f"train/{n}", "p") for n, end in enumerate("\u2028\u2029\x85\x1c\x0b\r")))
    file.write(tmp_path / "skills.jsonl", made.skills.values())
    assert file.read(tmp_path / "skills.jsonl") == list(made.skills.values())


def test_a_byte_order_mark_that_an_editor_left_is_no_part_of_a_skill(tmp_path):
    made = list(filled(("one", "train/0", "p")).skills.values())
    file.write(tmp_path / "skills.jsonl", made)
    (tmp_path / "skills.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "skills.jsonl").read_bytes())
    assert file.read(tmp_path / "skills.jsonl") == made


@pytest.mark.parametrize("line", ["{", "3", "null", "[]", '{"id": "s1"}', '{"text": "only"}', "\udcff", "[" * 100_000])
def test_a_file_that_is_no_bank_is_refused_with_its_line(tmp_path, line):
    path = tmp_path / "skills.jsonl"
    file.write(path, filled(("one", "train/0", "p")).skills.values())
    path.write_text(path.read_text() + line + "\n", errors="surrogateescape")
    with pytest.raises(DataError, match=r"skills\.jsonl, line 2\b"):
        file.read(path)


BROKEN_ROWS = [
    ({"lesson": {"workflow": 3}}, "lesson.workflow: Input should be a valid string"),
    ({"id": None}, "id: Input should be a valid string"),
    ({"id": "twelve"}, "id: String should match pattern"),
    ({"also": 5}, "also: Input should be a valid array"),
    ({"history": [1]}, "history.0: Input should be a valid string"),
    ({"colour": "red"}, "colour: Unexpected keyword argument"),
    ({"version": "2"}, "version: Input should be a valid integer"),
    ({"version": None}, "version: Input should be a valid integer"),
    ({"shown": True}, "shown: Input should be a valid integer"),
    ({"retired": "no"}, "retired: Input should be a valid boolean"),
    ({"lifts": None}, "lifts: Input should be an object"),
    ({"lifts": {"there": 0.5}, "trials": {"there": 1}}, "lifts.there"),
    ({"lifts": {"own": 0.5}}, "lifts and trials are not of the same places"),
    ({"source": {"task": "train/0"}}, "source.prompt: Field required"),
    ({"reward": {1}}, "Object of type set is not JSON serializable"),
]


def test_a_row_with_something_else_in_a_texts_place_is_refused():
    [skill] = filled(("one", "train/0", "p")).skills.values()
    row = to_row(skill)
    assert from_row(row) == skill
    for broken, message in BROKEN_ROWS:
        with pytest.raises(DataError, match=f"is no skill: {message}"):
            from_row(row | broken)
    with pytest.raises(DataError, match="only training tasks may teach"):
        from_row(row | {"also": ["eval/1"]})


def test_only_what_a_person_changed_is_taken_from_the_file(tmp_path):
    made = filled(("one", "train/0", "p"), ("two", "train/1", "q"))
    path = tmp_path / "skills.jsonl"
    assert file.read_edits(path, made) == []
    one, two = made.skills.values()
    changed = file.edit(one, Lesson(workflow="better"), who="me")
    by_machine = replace(two, version=7, lesson=Lesson(workflow="newer"))
    file.write(path, [changed, by_machine])
    assert file.read_edits(path, made) == [changed]
    assert (changed.source, changed.history, changed.edited) == (one.source, ("Workflow: one",), "me")
    made.skills[changed.id] = changed
    assert file.read_edits(path, made) == []


def test_a_persons_change_stands_also_where_the_run_renewed_the_skill_meanwhile(tmp_path):
    made = filled(("get the boss then the hue of it all", "train/0", "p"))
    path = tmp_path / "skills.jsonl"
    [before] = made.skills.values()
    file.write(path, [file.edit(before, Lesson(workflow="mine"), who="me")])
    made.credit(["s00001"], [1.0, 0.0], step=4)
    assert made.add(Lesson(workflow="get the boss then the hue of it"), source(step=4), pdi=0.3).version == 2
    [changed] = file.read_edits(path, made)
    made.take(changed)
    now = made.skills["s00001"]
    assert (now.version, now.lesson.workflow, now.edited) == (3, "mine", "me")
    assert (now.shown, now.reward, now.used) == (2, 1.0, 4)
    assert file.read_edits(path, made) == []


def test_the_number_of_a_skill_that_a_person_changed_is_not_given_to_another_one():
    """A bank that is restored from before the skill was made."""
    later = filled(("one", "train/0", "p"), ("two", "train/1", "q"), ("three", "train/2", "r"))
    made = filled(("one", "train/0", "p"))
    made.take(file.edit(later.skills["s00002"], Lesson(workflow="mine"), who="me"))
    assert made.add(Lesson(workflow="another"), source("train/5"), pdi=0.0).id == "s00003"
    assert made.skills["s00002"].lesson.workflow == "mine"


def test_a_skill_without_text_is_refused_and_one_that_stays_the_same_is_no_new_version():
    [skill] = filled(("one", "train/0", "p")).skills.values()
    with pytest.raises(DataError, match="s00001: a skill without text says nothing; retire it instead"):
        file.edit(skill, Lesson(), who="me")
    assert file.edit(skill, skill.lesson, who="me") is skill


def test_a_retired_skill_is_neither_shown_nor_made_again():
    made = filled(("look for it here and there", "train/0", "p"))
    made.skills["s00001"] = file.retire(made.skills["s00001"], who="me")
    assert find(made, "train/0", "p", 3) == []
    assert made.add(Lesson(workflow="look for it here and there!"), source(step=9), pdi=0.0) is None
    assert find(made, "train/0", "p", 3) == []
    assert made.forget(step=999) == 0
