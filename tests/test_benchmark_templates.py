"""The benchmark of chat templates: its tokenizers, and the episodes that its models are warm-started on.

Not covered: what the models learn, which takes minutes.
"""

import importlib.util
import json
import re
import sys
from datetime import date
from pathlib import Path

import pytest

from opd.envs.worlds.lookup import LookupEnv
from opd.episodes.answers import messages_of
from opd.episodes.tasks import task
from opd.formats import read_reply
from opd.launch.tiny.build import EpisodeWriter, warm_start
from opd.launch.tiny.recipes import LOOKUP
from opd.models.chat import ChatFormat
from opd.trainers.parts.conversations import read_conversations

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "templates.py"
ENDS = {"chatml": "<|im_end|>", "glm": "<|observation|>", "gpt-oss": "<|call|>"}
"""What ends a call in each dialect."""


@pytest.fixture(scope="module")
def templates():
    spec = importlib.util.spec_from_file_location("benchmark_templates", FILE)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # which a dataclass looks for
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(params=list(ENDS))
def name(request):
    return request.param


@pytest.fixture
def write(templates, name):
    made = templates.make_writer(name)
    if made is None:
        pytest.skip(f"TRL's {templates.FAMILIES[name].template}.jinja is not installed")
    return made


def chat_of(templates, writer):
    stops = writer.stop_ids if isinstance(writer.stop_ids, list) else [writer.stop_ids]
    return ChatFormat(writer.tokenizer, date=date.fromisoformat(templates.DAY), stop_ids=stops)


def completions(sample):
    """The ids of what the assistant says, turn by turn."""
    said, last = [], 0
    for token, mask in zip(sample.token_ids, sample.completion_mask, strict=True):
        if mask and not last:
            said.append([])
        if mask:
            said[-1].append(token)
        last = mask
    return said


def test_an_episode_is_what_the_template_renders_and_the_environment_reads(templates, name, write):
    writer = write(LOOKUP, 0)
    chat, env = chat_of(templates, writer), LOOKUP.env()
    for number in range(6):
        sample = writer.sample("plain")
        goal = task(number, split="warm", run_seed=0)
        observation, info = env.reset(seed=goal.seed, options={"split": "warm", "index": number})
        env.read_calls_as(chat.format.name, starts_thinking=chat.starts_thinking)
        history, tools, scripted = messages_of(observation, info), info["tools"], env.oracle()
        said = completions(sample)
        assert len(said) == len(scripted)
        for ids, action in zip(said, scripted, strict=True):
            assert writer.tokenizer.convert_ids_to_tokens(ids[-1]) == ENDS[name]
            native = chat.text(ids)
            [call], [wanted] = read_reply(native, chat.format.name).calls, read_reply(action, "hermes").calls
            assert (call.name, call.arguments) == (wanted.name, wanted.arguments)
            observation, reward, over, _, info = env.step(native)
            function = {"name": call.name, "arguments": call.arguments}
            calls = [{"type": "function", "id": "call00001", "function": function}]
            history.append({"role": "assistant", "content": "", "tool_calls": calls})
            history += [] if over else messages_of(observation, info)
        assert (reward, over) == (1.0, True)
        dated = {"strftime_now": date.fromisoformat(templates.DAY).strftime}
        whole = writer.tokenizer.apply_chat_template(history, tools=tools, tokenize=False, **dated)
        decoded = writer.tokenizer.decode(sample.token_ids)
        assert decoded in (whole.rstrip("\n"), whole + ENDS[name])  # GLM's next message would begin with the end


def test_the_tokenizer_has_the_control_tokens_and_short_prompts(templates, name, write):
    writer = write(LOOKUP, 0)
    if name != "chatml":
        family = templates.FAMILIES[name]
        for text in family.special:
            assert len(writer.tokenizer(text, add_special_tokens=False)["input_ids"]) == 1, text
        assert writer.tokenizer.convert_ids_to_tokens(writer.stop_ids) == list(family.ends)
    sample = writer.sample("plain")
    assert sample.completion_mask.index(1) <= 40


def test_markup_that_a_message_quotes_becomes_no_control_token(templates, name, write):
    writer = write(LOOKUP, 0)
    sample = writer.sample("demonstration")
    family = templates.FAMILIES.get(name)
    controls = set(writer.tokenizer.all_special_ids)
    controls |= set(writer.tokenizer.convert_tokens_to_ids(list(family.special) if family else []))
    prompts = [s.token_ids[: s.completion_mask.index(1)] for s in (sample, writer.sample("plain"))]
    quoting, plain = ([token for token in prompt if token in controls] for prompt in prompts)
    assert quoting == plain
    assert "Here is a successful attempt" in writer.tokenizer.decode(prompts[0])


@pytest.mark.slow
def test_two_batches_of_a_warm_start_run_and_the_model_ends_as_its_family_does(name, write):
    model, tokenizer = warm_start(LOOKUP, seed=0, steps=2, quiet=True, write=write)
    ends = model.generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids(ENDS[name]) in (ends if isinstance(ends, list) else [ends])


def test_the_rows_are_right_episodes_of_training_tasks_that_a_model_can_learn(templates, name, write, tmp_path):
    path = tmp_path / "rows.jsonl"
    templates.write_rows(path, 6)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 6
    env = LookupEnv()
    for number, row in enumerate(rows):
        goal = task(number, split="train", run_seed=1)
        question, _ = env.reset(seed=goal.seed, options={"split": "train", "index": number})
        assert row["messages"][1] == {"role": "user", "content": question}
        said = [m for m in row["messages"] if m["role"] == "assistant"]
        assert all(m["content"] is None and isinstance(m["tool_calls"][0]["function"]["arguments"], str) for m in said)
        results = [m["tool_call_id"] for m in row["messages"] if m["role"] == "tool"]
        assert results == [m["tool_calls"][0]["id"] for m in said[:-1]]
        assert json.loads(said[-1]["tool_calls"][0]["function"]["arguments"]) == {
            "value": row["messages"][-2]["content"]
        }
    writer = write(LOOKUP, 0)
    read = read_conversations(path, chat_of(templates, writer))
    assert [len(episode.turns) for episode in read] == [
        sum(m["role"] == "assistant" for m in r["messages"]) for r in rows
    ]
    assert all(
        writer.tokenizer.convert_ids_to_tokens(t.completion_ids[-1]) == ENDS[name] for e in read for t in e.turns
    )


def test_chatml_is_the_tiny_model_as_it_is(templates):
    assert templates.make_writer("chatml") is EpisodeWriter


def test_a_template_that_is_not_installed_is_told_by_name(templates, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(templates, "find_spec", lambda _: None)
    monkeypatch.setattr("sys.argv", ["templates.py", "--only", "glm", "--out", str(tmp_path), "--rows", "0"])
    templates.main()
    assert re.search(r"glm is skipped: TRL's glm4moe.jinja is not installed", capsys.readouterr().out)
