"""Tiny models: their tokenizer and template, what their warm start shows, and how they are built and kept.

Whether a whole warm start teaches what it should is in the one test at the end, which is slow, and long for most.
"""

import ast
import dataclasses
import importlib
import importlib.util
import itertools
import re
import sys
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from opd.engines.base import Sampling
from opd.engines.transformers import TransformersEngine
from opd.envs.text_env import task_split
from opd.envs.worlds.arithmetic import ArithmeticEnv
from opd.envs.worlds.countdown import CountdownEnv
from opd.envs.worlds.lookup import MEANING, LookupEnv
from opd.envs.worlds.sokoban import SokobanPushEnv, note, offset
from opd.episodes.answers import messages_of
from opd.episodes.config import RolloutConfig
from opd.episodes.scheduler import RolloutScheduler
from opd.episodes.tasks import task
from opd.errors import ConfigError
from opd.launch.tiny import build as tiny
from opd.launch.tiny.build import EpisodeWriter, build_tiny, warm_start
from opd.launch.tiny.exam import Exam, Marks
from opd.launch.tiny.learning import cross_entropy
from opd.launch.tiny.names import TINY_ENVS
from opd.launch.tiny.skills import RECIPES
from opd.launch.tiny.tokenizer import END, build_tokenizer
from opd.losses import CrossEntropy, Losses
from opd.models.causal import CausalModel
from opd.models.chat import ChatFormat
from opd.objective.collate import collate, normalise
from opd.objective.objective import objective
from opd.teachers.privileged import in_first_user_message, with_skill, with_solution
from opd.trainers.skill_sd.makers import by_rules

NAMES = sorted(RECIPES)
FORMS = [(name, form) for name in NAMES for form in RECIPES[name].forms]
WRITERS = {name: EpisodeWriter(RECIPES[name], seed=0) for name in NAMES}
LOOKUP = WRITERS["lookup"]


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OPD_CACHE", str(tmp_path))
    return tmp_path / "tiny"


def prompt_of(writer, sample):
    """The text up to the first completion."""
    return writer.tokenizer.decode(sample.token_ids[: sample.completion_mask.index(1)])


def actions_of(writer, sample):
    """The completions as text, cut at their end-of-turn tokens."""
    return writer.tokenizer.decode(sample.completion_ids).split(END)[:-1]


def test_the_names_that_settings_accept_are_those_that_can_be_built():
    assert sorted(TINY_ENVS) == NAMES


# -- tokenizer and template ---------------------------------------------------------------------------


@given(st.text(max_size=40))
def test_any_text_survives_the_tokenizer(text):
    tokenizer = LOOKUP.tokenizer
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("name", NAMES)
def test_a_word_keeps_its_one_id_wherever_it_stands(name):
    tokenizer = WRITERS[name].tokenizer
    for word in RECIPES[name].words:
        [alone] = tokenizer(word, add_special_tokens=False)["input_ids"]
        for text in (f"x {word}", f'"{word}"', f"\n{word}.", f"near {word} now"):
            assert tokenizer(text, add_special_tokens=False)["input_ids"].count(alone) == 1, text


def test_a_phrase_that_the_decoder_would_garble_is_refused():
    with pytest.raises(ValueError, match="must be ASCII: 'é'"):
        build_tokenizer(["word"], ["é"])


def test_ending_a_turn_and_padding_are_two_tokens():
    tokenizer = LOOKUP.tokenizer
    assert tokenizer.eos_token == END
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_template_shows_tools_by_their_signatures_after_the_system_text():
    tools = [
        {"type": "function", "function": {"name": "get", "parameters": {"properties": {"person": {}, "field": {}}}}},
        {"type": "function", "function": {"name": "stop", "parameters": {"type": "object"}}},
    ]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    shown = LOOKUP.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert shown == (
        "<|im_start|>system\nBe brief.\nTools: get(person, field), stop()<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    shown = LOOKUP.tokenizer.apply_chat_template(messages[1:], tools=tools, tokenize=False)
    assert shown == (
        "<|im_start|>system\nTools: get(person, field), stop()<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


def test_a_call_in_structured_form_is_rendered_as_the_model_writes_it():
    call = {"type": "function", "function": {"name": "get", "arguments": {"person": "ann", "field": "boss"}}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    shown = LOOKUP.tokenizer.apply_chat_template(messages, tokenize=False)
    written = '<tool_call>{"name": "get", "arguments": {"person": "ann", "field": "boss"}}</tool_call>'
    assert shown.endswith(f"<|im_start|>assistant\n{written}<|im_end|>\n")


def test_the_template_never_rewrites_what_it_rendered():
    conversation = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "<think>t</think> a "},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "u"},
    ]
    render = LOOKUP.tokenizer.apply_chat_template
    texts = [render(conversation[:n], tokenize=False) for n in range(2, len(conversation) + 1)]
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))


# -- what the warm start shows ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_episode_has_the_ids_that_a_rollout_of_it_would_have(name):
    perfect = dataclasses.replace(RECIPES[name], plain=lambda env, _: env.oracle())
    writer, env = EpisodeWriter(perfect, seed=0), RECIPES[name].env()
    chat = ChatFormat(writer.tokenizer)
    for _ in range(6):
        goal = task(writer.written, split="warm", run_seed=0)
        sample = writer.sample("plain")
        observation, info = env.reset(seed=goal.seed, options={"split": "warm", "index": goal.index})
        fresh, tools = messages_of(observation, info), info.get("tools")
        ids = chat.start(fresh, tools)
        mask, history = [0] * len(ids), list(fresh)
        for action in env.oracle():
            said = [*writer.tokenizer(action, add_special_tokens=False)["input_ids"], chat.end_id]
            history.append({"role": "assistant", "content": action})
            observation, reward, over, _, info = env.step(action)
            ids, mask = ids + said, mask + [1] * len(said)
            if not over:
                prompt = chat.extend(history, messages_of(observation, info), tools, last_id=said[-1])
                assert not prompt.forked
                ids, mask = ids + prompt.token_ids, mask + [0] * len(prompt.token_ids)
                history += messages_of(observation, info)
        assert reward == 1.0
        assert sample.token_ids == ids
        assert sample.completion_mask == mask
        assert sample.ce_weight == [float(m) for m in mask]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_every_form_shows_its_text_around_the_question_and_the_same_perfect_actions(name, form):
    perfect = dataclasses.replace(RECIPES[name], plain=lambda env, _: env.oracle())
    writer = EpisodeWriter(perfect, seed=1)
    plain = EpisodeWriter(perfect, seed=1).sample("plain")
    sample = writer.sample(form)
    assert actions_of(writer, sample) == actions_of(writer, plain)
    question, _, rest = prompt_of(writer, plain).rpartition(END)
    assert prompt_of(writer, sample).startswith(question)
    assert prompt_of(writer, sample).endswith(END + rest)
    sign = {
        "plain": "",
        "demonstration": "Here is a successful attempt:\n" + actions_of(writer, plain)[0],
        "feedback": "failed with this feedback:\n",
        "attempt_right": actions_of(writer, plain)[-1] + "\nLet me rephrase the above solution.",
        "attempt_wrong": "\nWait, this response is not correct, let me start over.",
        "skill": "A skill from earlier episodes that may help:\n",
        "other_skill": "A skill from earlier episodes that may help:\nFrom a like task: Solve this puzzle:",
    }.get(form, "Here is a reference solution to this problem:\n")
    assert sign in prompt_of(writer, sample)


def test_a_shown_mistake_is_one_and_comes_with_feedback():
    for name in NAMES:
        env = RECIPES[name].env()
        rng = np.random.default_rng(0)
        for seed in range(100):
            options = {"split": "warm", "index": seed}
            env.reset(seed=seed, options=options)
            actions = env.blunder(rng)
            env.reset(seed=seed, options=options)
            for action in actions:
                _, reward, over, _, info = env.step(action)
            assert (reward, over) == (0.0, True)
            assert info["feedback"]


def test_the_warm_start_sees_no_task_that_is_trained_on_or_evaluated():
    questions = {re.search("What is the .*?\\?", prompt_of(LOOKUP, LOOKUP.sample()))[0] for _ in range(50)}
    assert {task_split(question) for question in questions} == {"warm"}


def test_a_third_of_the_words_mean_anything_but_mostly_not_what_they_really_mean():
    env, meant = RECIPES["lookup"].env(), []
    for seed in range(600):
        env.reset(seed=seed, options={"split": "warm", "index": seed})
        meant.append(dict(env.slang))
    right = {word: sum(m[word] == field for m in meant) / len(meant) for word, field in MEANING.items()}
    settled = [word for word in MEANING if right[word] == 1.0]
    slang = [word for word in MEANING if right[word] < 1.0]
    assert (len(settled), len(slang)) == (24, 12)
    for word in slang:
        drawn = [m[word] for m in meant]
        shares = {field: drawn.count(field) / len(drawn) for field in set(drawn)}
        assert len(shares) == 6
        assert min(shares, key=shares.get) == MEANING[word]
        assert 0.05 < right[word] < 0.14  # 1 in 11
        assert all(0.12 < share < 0.25 for field, share in shares.items() if field != MEANING[word])


def success_of(name, play, *, index):
    """How often `play(env, rng)` solves the warm tasks whose index leaves this rest when divided by 3."""
    env, rng, solved = RECIPES[name].env(), np.random.default_rng(0), []
    for n in range(index, 300, 3):
        env.reset(seed=n, options={"split": "warm", "index": n})
        for action in play(env, rng):
            *_, info = env.step(action)
        solved.append(info["success"])
    return np.mean(solved)


def test_what_is_shown_plain_is_play_that_knows_the_rules_and_succeeds_by_luck():
    play = RECIPES["sokoban"].plain
    assert 0.3 < success_of("sokoban", play, index=0) < 0.6  # one push
    assert 0.05 < success_of("sokoban", play, index=2) < 0.25  # three
    assert 0.2 < success_of("countdown", RECIPES["countdown"].plain, index=0) < 0.45


def test_a_skill_of_sokoban_tells_the_pushes_of_this_puzzle_among_those_of_others():
    env, rng = RECIPES["sokoban"].env(), np.random.default_rng(0)
    for seed in range(50):
        env.reset(seed=seed, options={"split": "warm", "index": seed})
        notes = re.findall(r"^Goal ([\w, ]+) of the box: push ([\w, ]+)\.$", env.skill(rng), re.MULTILINE)
        assert len(dict(notes)) == 3
        right = note(*offset(env.room, env.state), [push.direction for push in env.pushes(env.state)])
        others = [n for n in notes if f"Goal {n[0]} of the box: push {n[1]}." != right]
        assert len(others) == 2
        for where, pushes in others:
            told = re.findall(r"(\d) (\w+)", where)
            assert sorted(pushes.split(", ")) == sorted(side for n, side in told for _ in range(int(n)))


def test_a_skill_explains_every_word_that_cannot_be_known():
    env, rng = RECIPES["lookup"].env(), np.random.default_rng(0)
    for seed in range(50):
        env.reset(seed=seed, options={"split": "warm", "index": seed})
        notes = dict(re.findall(r"(\w+) means (\w+)\.", env.skill(rng)))
        assert all(env.slang[word] == field for word, field in notes.items())
        unknown = {word for word in env.question.words if word not in MEANING or env.slang[word] != MEANING[word]}
        assert unknown <= set(notes)


# -- building and keeping -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_built_model_is_a_plain_folder_of_half_a_million_weights_or_more(cache):
    folder = build_tiny("lookup", steps=2, quiet=True)
    assert folder.parent == cache
    assert [path.name for path in cache.iterdir()] == [folder.name]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert 500_000 <= model.num_parameters() <= 5_000_000
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    settings = GenerationConfig.from_pretrained(folder)
    assert (settings.eos_token_id, settings.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.chat_template == LOOKUP.tokenizer.chat_template
    text = prompt_of(LOOKUP, LOOKUP.sample())
    assert tokenizer(text)["input_ids"] == LOOKUP.tokenizer(text)["input_ids"]


@pytest.mark.slow
def test_a_built_model_knows_4096_positions_which_changes_none_of_its_numbers():
    ids = torch.randint(0, len(LOOKUP.tokenizer), (1, 900), generator=torch.Generator().manual_seed(0))
    found = []
    for positions in (4096, 1024):
        torch.manual_seed(0)
        model = tiny._new_model(LOOKUP.tokenizer)
        assert model.config.max_position_embeddings == 4096
        model.config.max_position_embeddings = positions
        torch.manual_seed(0)
        model = type(model)(model.config)
        with torch.no_grad():
            found.append((model.state_dict(), model(ids).logits))
    (weights, logits), (before, logits_before) = found
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    assert torch.equal(logits, logits_before)


@pytest.fixture
def course(monkeypatch):
    """`course(*marks)`: exams of a warm start of two steps with these marks; returns the steps of its rounds."""

    def take(*marks, steps=None):
        rounds, left = [], iter([Marks(*each) for each in marks])
        monkeypatch.setattr(Exam, "marks", lambda *_: next(left))
        monkeypatch.setattr(tiny, "steps_of", lambda *a: rounds.append(a[-2:]) or [])
        aims = dataclasses.replace(RECIPES["lookup"].aims, tasks=1, steps=3, rounds=2, informed=0.9, plain=(0.3, 0.6))
        warm_start(dataclasses.replace(RECIPES["lookup"], steps=2, aims=aims), seed=0, quiet=True, steps=steps)
        assert next(left, None) is None
        return rounds

    return take


def test_a_warm_start_goes_on_until_the_model_can_teach_and_no_longer(course, caplog):
    assert course((0.9, 0.3)) == [(2, 1.0)]
    assert course((0.89, 0.5), (0.95, 0.6)) == [(2, 1.0), (3, 0.5)]
    assert course((0.95, 0.61), (0.89, 0.5), (0.9, 0.5)) == [(2, 1.0), (3, 0.5), (3, 0.5)]
    assert caplog.messages == []
    assert course((0.5, 0.5), (0.8, 0.5), (0.95, 0.2)) == [(2, 1.0), (3, 0.5), (3, 0.5)]
    assert caplog.messages[0].startswith("after 8 steps the warm start has not come to what it is to")


def test_a_shortened_warm_start_takes_its_steps_whatever_came_of_them(course):
    assert course(steps=1) == [(1, 1.0)]


class Reader:
    """A student that says what stands in the episodes, but for its first `wrong` tokens."""

    def __init__(self, wrong):
        self.wrong = wrong

    def __call__(self, ids, rows):
        said = ids.flatten()[rows + 1]
        said[: self.wrong] += 1
        return torch.nn.functional.one_hot(said)

    def logits(self, hidden):
        return hidden


def test_an_exam_counts_the_episodes_that_are_right_to_the_last_token_on_tasks_of_its_own():
    aims = dataclasses.replace(RECIPES["lookup"].aims, tasks=4)
    writer = EpisodeWriter(dataclasses.replace(RECIPES["lookup"], env=aims.env), seed=0)
    exam = Exam(aims, writer)
    assert writer.written == (1 << 24) + 8
    plan = "Here is a reference solution to this problem:\n"
    shown = [plan in prompt_of(LOOKUP, sample) for sample in (*exam._informed, *exam._plain)]
    assert shown == [True] * 4 + [False] * 4
    first = len(exam._informed[0].completion_ids)
    assert exam.marks(Reader(0)) == (1, 1)
    assert exam.marks(Reader(1)) == (0.75, 0.75)
    assert exam.marks(Reader(first)).informed == 0.75
    assert exam.marks(Reader(first + 1)).informed == 0.5


def test_a_model_is_built_once_for_each_seed_and_length(cache, monkeypatch):
    built = []
    monkeypatch.setattr(tiny, "warm_start", lambda *a, **k: built.append(k["seed"]) or warm_start(*a, **k))
    first = build_tiny("lookup", steps=1, quiet=True)
    assert build_tiny("lookup", steps=1, quiet=True) == first
    assert built == [0]
    assert (
        len({first, build_tiny("lookup", seed=1, steps=1, quiet=True), build_tiny("lookup", steps=2, quiet=True)}) == 3
    )
    assert built == [0, 1, 0]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(cache):
    one, two = (warm_start(RECIPES["lookup"], seed=3, steps=3, quiet=True)[0].state_dict() for _ in range(2))
    other = warm_start(RECIPES["lookup"], seed=4, steps=3, quiet=True)[0].state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_build_that_fails_leaves_nothing_behind(cache, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of patience")

    monkeypatch.setattr(tiny, "warm_start", fail)
    with pytest.raises(RuntimeError, match="out of patience"):
        build_tiny("lookup", steps=1, quiet=True)
    assert list(cache.iterdir()) == []


@pytest.mark.slow
def test_who_finishes_second_takes_the_folder_of_who_finished_first(cache, monkeypatch):
    def beaten(*args, **options):
        monkeypatch.setattr(tiny, "warm_start", warm_start)
        other = build_tiny("lookup", steps=1, quiet=True)
        (other / "first").touch()
        return warm_start(*args, **options)

    monkeypatch.setattr(tiny, "warm_start", beaten)
    folder = build_tiny("lookup", steps=1, quiet=True)
    assert (folder / "first").exists()
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_an_environment_that_changed_is_not_served_from_the_cache(tmp_path):
    source = tmp_path / "changing.py"
    fingerprints = []
    for reward in (1, 2):
        source.write_text(
            f"from opd.envs.worlds.lookup import LookupEnv\nclass Mine(LookupEnv):\n    worth = {reward}\n"
        )
        spec = importlib.util.spec_from_file_location("opd.envs.changing", source)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        recipe = dataclasses.replace(RECIPES["lookup"], env=module.Mine)
        fingerprints.append(tiny._fingerprint(recipe, 0, 1))
    del sys.modules["opd.envs.changing"]
    assert fingerprints[0] != fingerprints[1]


@pytest.mark.parametrize(("name", "module"), [("sokoban", "sokoban_board"), ("countdown", "countdown_solver")])
def test_a_solver_that_changed_makes_a_new_model(name, module, monkeypatch, tmp_path):
    before = tiny._fingerprint(RECIPES[name], 0, 1)
    changed = tmp_path / "changed.py"
    changed.write_text("another solver")
    monkeypatch.setattr(sys.modules[f"opd.envs.worlds.{module}"], "__file__", str(changed))
    assert tiny._fingerprint(RECIPES[name], 0, 1) != before


@lru_cache
def as_it_stands(name):
    """The fingerprint of a recipe under the sources as they are; to be asked before a test changes one."""
    return tiny._fingerprint(RECIPES[name], 0, 1)


def source(module):
    return Path(sys.modules[module].__file__).read_text()


@pytest.fixture
def stands(monkeypatch, tmp_path):
    """`stands(module, text)`: the module's file holds this text from now on."""

    def write(module, text):
        file = tmp_path / f"{module}.py"
        file.write_text(text)
        monkeypatch.setattr(sys.modules[module], "__file__", str(file))

    return write


class OtherWords(ast.NodeTransformer):
    """Every docstring says something else."""

    def visit_Expr(self, node):
        bare = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return ast.Expr(ast.Constant("Something else.")) if bare else node


SOURCES = [
    "opd.launch.tiny.build",
    "opd.launch.tiny.exam",
    "opd.launch.tiny.learning",
    "opd.launch.tiny.recipes",
    "opd.launch.tiny.skills",
    "opd.launch.tiny.tokenizer",
    "opd.launch.tiny.muon",
    "opd.envs.worlds.lookup",
    "opd.envs.worlds.sokoban_board",
    "opd.envs.text_env",
    "opd.envs.tool_env",
    "opd.tool_calls",
    "opd.trainers.skill_sd.makers",
    "opd.episodes.answers",
    "opd.models.chat",
    "opd.objective.collate",
    "opd.maths.head",
    "opd.maths.logprobs",
    "opd.models.causal",
    "opd.teachers.privileged",
    "opd.episodes.tasks",
    "opd.types",
]


@pytest.mark.parametrize("name", NAMES)
def test_comments_docstrings_and_layout_are_nothing_that_a_model_depends_on(name, stands):
    before = as_it_stands(name)
    for module in SOURCES:
        tree = OtherWords().visit(ast.parse(source(module)))
        stands(module, "# A comment.\n" + ast.unparse(tree))  # which drops those that there were
    assert tiny._fingerprint(RECIPES[name], 0, 1) == before


@pytest.mark.slow
def test_a_comment_builds_no_model_anew_and_another_optimiser_does(cache, stands, monkeypatch):
    built = []
    monkeypatch.setattr(tiny, "warm_start", lambda *a, **k: built.append(k["seed"]) or warm_start(*a, **k))
    first = build_tiny("lookup", steps=1, quiet=True)
    stands("opd.launch.tiny.muon", source("opd.launch.tiny.muon") + "\n# A comment.\n")
    assert build_tiny("lookup", steps=1, quiet=True) == first
    assert built == [0]
    stands(
        "opd.launch.tiny.muon",
        source("opd.launch.tiny.muon").replace("momentum: float = 0.95", "momentum: float = 0.9"),
    )
    assert build_tiny("lookup", steps=1, quiet=True) != first
    assert built == [0, 0]


@pytest.mark.parametrize(
    ("name", "module", "old", "new"),
    [
        ("lookup", "opd.launch.tiny.build", '"hidden_size": 128', '"hidden_size": 64'),
        ("lookup", "opd.launch.tiny.learning", "(step + 1) / 20", "(step + 1) / 10"),
        ("lookup", "opd.launch.tiny.learning", "betas=(0.9, 0.95)", "betas=(0.9, 0.99)"),
        ("lookup", "opd.launch.tiny.exam", "marks.informed >=", "marks.informed >"),
        ("lookup", "opd.launch.tiny.build", "model.save_pretrained", "model.half().save_pretrained"),
        ("lookup", "opd.launch.tiny.muon", "-4.7750", "-4.7"),
        ("lookup", "opd.launch.tiny.tokenizer", "'Tools: '", "'You have: '"),
        ("lookup", "opd.launch.tiny.recipes", "1 if other == field else 2", "1 if other == field else 3"),
        ("lookup-skills", "opd.launch.tiny.skills", "rng.random() < 0.9", "rng.random() < 0.8"),
        ("sokoban-skills", "opd.trainers.skill_sd.makers", "MOST_WRONG = ", "MOST_WRONG = 1 + "),
        ("lookup", "opd.envs.worlds.lookup", "one field of one person", "one field"),
        ("arithmetic", "opd.envs.worlds.arithmetic", "Answer with the number only.", "Answer in digits."),
        ("countdown", "opd.envs.tool_runs", '"tool"', '"user"'),
        ("sokoban", "opd.envs.text_env", "def ", "async def "),
        ("sokoban", "opd.envs.worlds.sokoban_board", "return None", "return 0"),
        ("arithmetic", "opd.teachers.privileged", "Here is a reference solution", "This is a solution"),
        ("arithmetic", "opd.teachers.privileged", 'f"> {', 'f">> {'),
        ("arithmetic", "opd.episodes.tasks", '"warm": 1 << 30', '"warm": 1 << 31'),
        ("arithmetic", "opd.episodes.answers", '"role": "user"', '"role": "tool"'),
        ("arithmetic", "opd.models.encoding", "add_special_tokens=False", "add_special_tokens=True"),
        ("arithmetic", "opd.objective.collate", "[pad_id] * (width - len(ids))", "[0] * (width - len(ids))"),
        ("arithmetic", "opd.maths.logprobs", "class _LogProbTile:", "class _LogProbTile(dict):"),
        ("arithmetic", "opd.maths.head", "HALF_WEIGHT = ", "HALF_WEIGHT = 1 + "),
        ("arithmetic", "opd.models.causal", "return ", "return 1 and "),
        ("arithmetic", "opd.types", "row", "line"),
    ],
)
def test_code_that_the_samples_or_the_arithmetic_depend_on_makes_a_new_model(name, module, old, new, stands):
    before = as_it_stands(name)
    assert old in source(module)
    stands(module, source(module).replace(old, new))
    assert tiny._fingerprint(RECIPES[name], 0, 1) != before


@pytest.mark.slow
def test_code_that_a_warm_start_never_runs_makes_no_new_model(stands):
    names = ["lookup-skills", "sokoban", "arithmetic"]
    before = [as_it_stands(name) for name in names]
    for module in (
        "opd.objective.objective",
        "opd.losses",
        "opd.maths.divergence",
        "opd.config",
        "opd.trainers.loop.method",
        "opd.envs.worlds.sql",
    ):
        importlib.import_module(module)
        stands(module, "a = 1")
    assert [tiny._fingerprint(RECIPES[name], 0, 1) for name in names] == before


@pytest.mark.slow
def test_what_one_world_depends_on_is_nothing_to_the_others(stands):
    names = ["arithmetic", "countdown", "lookup", "sokoban", "sokoban-skills"]
    before = {name: as_it_stands(name) for name in names}
    stands("opd.envs.worlds.sokoban_board", source("opd.envs.worlds.sokoban_board").replace("return None", "return 0"))
    changed = [name for name in names if tiny._fingerprint(RECIPES[name], 0, 1) != before[name]]
    assert changed == ["sokoban", "sokoban-skills"]


@pytest.mark.slow
def test_every_value_of_a_recipe_makes_a_new_model():
    lookup = RECIPES["lookup"]
    recipes = [
        lookup,
        dataclasses.replace(lookup, batch=17),
        dataclasses.replace(lookup, steps=501),
        dataclasses.replace(lookup, rates=(0.02, 2e-3)),
        dataclasses.replace(lookup, words=lookup.words[:-1]),
        dataclasses.replace(lookup, phrases=[*lookup.phrases, " and "]),
        dataclasses.replace(lookup, forms=lookup.forms | {"plain": 0.37}),
        dataclasses.replace(lookup, forms=dict(reversed(lookup.forms.items()))),
        dataclasses.replace(lookup, env=RECIPES["lookup-expert"].env),
        dataclasses.replace(lookup, plain=RECIPES["countdown"].plain),
        dataclasses.replace(lookup, aims=None),
        dataclasses.replace(lookup, aims=dataclasses.replace(lookup.aims, informed=0.97)),
        dataclasses.replace(lookup, aims=dataclasses.replace(lookup.aims, env=RECIPES["sokoban"].env)),
    ]
    found = {tiny._fingerprint(recipe, 0, 1) for recipe in recipes}
    others = {tiny._fingerprint(lookup, 1, 1), tiny._fingerprint(lookup, 0, 2), tiny._fingerprint(lookup, 0, None)}
    assert len(found | others) == len(recipes) + 3


@pytest.mark.parametrize("package", ["torch", "transformers", "tokenizers", "numpy"])
def test_another_version_of_what_computes_makes_a_new_model(package, monkeypatch):
    before = as_it_stands("lookup")
    monkeypatch.setattr(f"{package}.__version__", "0.0.1")
    assert tiny._fingerprint(RECIPES["lookup"], 0, 1) != before


@pytest.mark.slow
def test_the_warm_starts_loss_is_the_objectives_of_supervised_training(cache):
    writer = EpisodeWriter(RECIPES["lookup"], 0)
    samples, losses = [writer.sample() for _ in range(3)], Losses(ce=CrossEntropy())
    student = CausalModel(AutoModelForCausalLM.from_pretrained(build_tiny("lookup", steps=1, quiet=True)))
    found = cross_entropy(student, collate(samples, writer.pad_id))
    expected = objective(student, collate(normalise(samples, losses, list), writer.pad_id), losses, None).loss
    assert found.item() == expected.item() > 1


def test_an_unknown_name_is_refused_with_those_that_exist():
    with pytest.raises(
        ConfigError, match=r"'tiny:chess' is unknown\. Allowed: tiny:lookup, tiny:arithmetic, tiny:sokoban"
    ):
        build_tiny("chess")


WARM = [
    pytest.param("lookup", 0.3, 0.7, marks=pytest.mark.slow),
    pytest.param("arithmetic", 0.0, 0.5, marks=pytest.mark.slow),
    pytest.param("sokoban", 0.1, 0.45, marks=pytest.mark.long),
    pytest.param("countdown", 0.05, 0.4, marks=pytest.mark.long),
    pytest.param("lookup-skills", 0.3, 0.7, marks=pytest.mark.long),
    pytest.param("sokoban-skills", 0.1, 0.45, marks=pytest.mark.long),
]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("name", "low", "high"), WARM)
def test_a_warm_start_leaves_the_plain_task_open_and_makes_the_solution_useful(name, low, high):
    folder = build_tiny(name)
    chat = ChatFormat(AutoTokenizer.from_pretrained(folder))
    model = CausalModel(AutoModelForCausalLM.from_pretrained(folder))
    config = RolloutConfig(max_tokens=32, max_length=512, concurrency=200)
    env = {"lookup": LookupEnv, "arithmetic": ArithmeticEnv, "sokoban": SokobanPushEnv, "countdown": CountdownEnv}
    world = env[name.removesuffix("-skills")]  # the one that the warm start was a variant of
    scheduler = RolloutScheduler(TransformersEngine(model), chat, world, config, max_turns=8)

    def success(rewrite=None):
        tasks = [task(i, split="eval") for i in range(200)]
        groups = scheduler.run(tasks, group_size=1, sampling=Sampling(temperature=0.0), seed=0, rewrite=rewrite)
        return np.mean([group.trajectories[0].success for group in groups])

    def shown(key):
        return lambda messages, texts: in_first_user_message(messages, lambda p: with_solution(p, texts[key]))

    plain = success()
    assert low <= plain <= high
    assert success(shown("solution")) >= 0.93
    if name.endswith("-skills"):
        assert success(partial(with_own_skill, world)) >= plain + 0.2


def with_own_skill(world, messages, texts):
    """The first messages with a skill by the rules, of an episode that solved the very task."""
    twin = world()
    seen = [m["content"] for m in messages if m["role"] == "user"]
    for index in range(200):
        goal = task(index, split="eval")
        observation, _ = twin.reset(seed=goal.seed, options={"split": "eval", "index": index})
        if observation == seen[0]:
            text = by_rules(twin.oracle(), []).text
            return in_first_user_message(messages, partial(with_skill, skill=text))
    raise AssertionError("the task was not found")
