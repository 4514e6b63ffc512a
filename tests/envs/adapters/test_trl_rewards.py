"""Reward functions of TRL in `trl:` get what its `GRPOTrainer` gives them: parsed messages, columns, whole groups."""

import json
import sys
import types

import pytest
from trl.chat_template_utils import parse_response, qwen3_template

from opd.envs import make
from opd.errors import ConfigError, EnvError
from opd.types import End

SEEN = []


class Box:
    """Opens once the right number is said to it."""

    def reset(self, **row):
        self.opened = 0

    def open(self, number: int) -> str:
        """Open the box.

        Args:
            number: the one on its lid.
        """
        self.opened += number
        return f"opened by {number}"


class Unsure(Box):
    def get_reward(self):
        return None if self.opened == 0 else float(self.opened)


class Locked(Box):
    """Holds what no process can be sent."""

    def __init__(self):
        import threading

        self.lock = threading.Lock()


def keep(prompts, completions, completion_ids=None, **kwargs):
    SEEN.append({"prompts": prompts, "completions": completions, "ids": completion_ids, **kwargs})
    return [0.0] * len(completions)


def calls_open(completions, **kwargs):
    """Reward a call of the tool, as a function for TRL finds it."""
    return [
        float(any(call["function"]["name"] == "open" for m in said for call in m.get("tool_calls") or []))
        for said in completions
    ]


def ranked(completions, **kwargs):
    """Rank the completions of a group by the length of what they say last."""
    sizes = [len(said[-1]["content"]) for said in completions]
    return [float(sum(other < size for other in sizes)) for size in sizes]


def ranked_by_state(environments, **kwargs):
    best = max(env.opened for env in environments)
    return [float(env.opened == best) for env in environments]


async def later(completions, **kwargs):
    return [float(len(completions)) for _ in completions]


def sometimes(completions, **kwargs):
    return [None if said[-1]["content"] == "unclear" else 1.0 for said in completions]


def never(completions, **kwargs):
    return [None for _ in completions]


def broken(completions, **kwargs):
    raise ValueError("no judge today")


def logs(completions, trainer_state, log_extra, log_metric, **kwargs):
    log_metric("size", len(completions))
    log_extra("place", list(range(len(completions))))
    return [trainer_state.global_step + trainer_state.max_steps / 100] * len(completions)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    module = types.ModuleType("trl_boxes")
    things = (Box, Unsure, Locked, keep, calls_open, ranked, ranked_by_state, later, sometimes, never, broken, logs)
    for thing in things:
        setattr(module, thing.__name__, thing)
    monkeypatch.setitem(sys.modules, "trl_boxes", module)
    SEEN.clear()


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": [{"role": "user", "content": f"Open {n}."}], "target": n} for n in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def call(**arguments):
    return f"<tool_call>{json.dumps({'name': 'open', 'arguments': arguments})}</tool_call>"


@pytest.fixture
def group(play, make_tokenizer, scripted_engine):
    """`group(kwargs, [texts of an episode, ...])` plays a group whose episodes say these texts."""

    def run(kwargs, spoken, cls="Box", **options):
        tokenizer = make_tokenizer()
        turns = [[[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts] for texts in spoken]
        settings = {"max_tokens": 512, "max_length": 4096, "max_turns": 4, **options}
        settings |= {"tasks": 1, "group_size": len(spoken), "engine": scripted_engine(turns)}
        [played] = play(lambda: make(f"trl:trl_boxes:{cls}", kwargs), **settings)
        return played

    return run


def test_completions_are_messages_with_their_calls_parsed(rows):
    env = make("trl:trl_boxes:Box", {"data": rows, "rewards": ["trl_boxes:keep", "trl_boxes:calls_open"]})
    env.reset(seed=0, options={"split": "train", "index": 0})
    env.step(f"<think>The lid says 4.</think>Let me see.{call(number=4)}")
    _, reward, _, _, info = env.step("It is open.")
    [seen] = SEEN
    assert seen["completions"] == [
        [
            {
                "role": "assistant",
                "content": "Let me see.",
                "reasoning_content": "The lid says 4.",
                "tool_calls": [{"type": "function", "function": {"name": "open", "arguments": {"number": 4}}}],
            },
            {"role": "tool", "content": "opened by 4", "name": "open"},
            {"role": "assistant", "content": "It is open."},
        ]
    ]
    assert seen["prompts"] == [[{"role": "user", "content": "Open 3."}]]
    assert (seen["target"], [one.opened for one in seen["environments"]]) == ([3], [4])
    assert (reward, info["rewards"]) == (1.0, {"trl_boxes:keep": 0.0, "trl_boxes:calls_open": 1.0})


@pytest.mark.parametrize(
    "text",
    [
        "It is open.",
        f"Let me see.\n{call(number=4)}",
        f"{call(number=4)}\n{call(number=5)}",
        "<think>\nThe lid says 4.\n</think>\n\nIt is 4.",
        f"<think>\nThe lid says 4.\n</think>\n\n{call(number=4)}",
        "<think>\n\n</think>\n\nIt is 4.",
        '<tool_call>{"name": "open"</tool_call>',
    ],
)
def test_a_message_is_the_one_that_trl_parses(text, rows, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.response_template = qwen3_template
    expected = parse_response(tokenizer, tokenizer.encode(text), prefix=tokenizer.encode("<|im_start|>assistant\n"))
    env = make("trl:trl_boxes:Box", {"data": rows, "rewards": ["trl_boxes:keep"]})
    said = env.spoken(text)
    assert {key: value for key, value in expected.items() if value} == {
        key: value for key, value in said.items() if value
    }


def test_a_call_that_cannot_be_read_leaves_the_text_as_it_is(rows):
    env = make("trl:trl_boxes:Box", {"data": rows, "rewards": ["trl_boxes:keep"]})
    env.reset(seed=0)
    text = 'Wait.<tool_call>{"name": "open", "arguments": </tool_call>'
    env.step(text)
    env.step("done")
    assert SEEN[0]["completions"][0][0] == {"role": "assistant", "content": text}


def test_arguments_that_a_format_writes_as_text_have_the_types_of_the_schema(rows):
    env = make("trl:trl_boxes:Box", {"data": rows, "rewards": ["trl_boxes:keep"], "tool_format": "qwen_coder"})
    env.reset(seed=0)
    env.step("<tool_call>\n<function=open>\n<parameter=number>\n7\n</parameter>\n</function>\n</tool_call>")
    env.step("done")
    assert SEEN[0]["completions"][0][0]["tool_calls"][0]["function"]["arguments"] == {"number": 7}


def test_a_function_that_compares_sees_the_whole_group_and_one_that_is_async_too(group, rows):
    played = group(
        {"data": rows, "rewards": {"trl_boxes:ranked": 1.0, "trl_boxes:later": 0.1}}, [["aaa"], ["a"], ["aa"]]
    )
    assert [t.reward for t in played.trajectories] == pytest.approx([2.3, 0.3, 1.3])
    assert [t.reward_parts["trl_boxes:ranked"] for t in played.trajectories] == [2.0, 0.0, 1.0]
    assert [t.success for t in played.trajectories] == [True, False, True]


def test_a_function_for_one_episode_is_called_with_one(group, rows):
    rewards = {"one": {"reward": "trl_boxes:ranked", "group": False}}
    played = group({"data": rows, "rewards": rewards}, [["aaa"], ["a"]])
    assert [t.reward for t in played.trajectories] == [0.0, 0.0]


def test_environments_of_a_group_are_those_of_its_episodes_as_they_ended(group, rows):
    played = group(
        {"data": rows, "rewards": ["trl_boxes:ranked_by_state", "trl_boxes:keep"]},
        [[call(number=2), "x"], [call(number=5), "x"], ["x"]],
        concurrency=1,  # one environment plays all three, one behind the other
    )
    assert [t.reward for t in played.trajectories] == [0.0, 1.0, 0.0]
    [seen] = SEEN
    assert [t.completion_ids for t in played.trajectories] == seen["ids"]
    first = played.trajectories[0]
    assert seen["ids"][0] == [
        *first.turns[0].completion_ids,
        *first.turns[1].prompt_ids,
        *first.turns[1].completion_ids,
    ]


def test_get_reward_that_abstains_leaves_the_episode_without_a_reward(group):
    played = group({}, [["done"], [call(number=3), "done"]], cls="Unsure")
    first, second = played.trajectories
    assert (first.end, first.failed, first.unscored, first.success, first.reward) == (
        End.FINISHED, None, True, False, 0.0)  # fmt: skip
    assert first.reward_parts == {"get_reward": None}
    assert (second.unscored, second.reward) == (False, 3.0)


def test_of_several_functions_one_may_abstain_and_its_weight_adds_nothing(group, rows):
    rewards = {"trl_boxes:sometimes": 1.0, "trl_boxes:later": 0.5}
    played = group({"data": rows, "rewards": rewards}, [["unclear"], ["clear"]])
    assert [(t.unscored, t.reward) for t in played.trajectories] == [(False, 1.0), (False, 2.0)]


def test_where_all_functions_of_a_group_abstain_from_an_episode_it_is_unscored(group, rows):
    played = group({"data": rows, "rewards": ["trl_boxes:sometimes", "trl_boxes:never"]}, [["unclear"], ["clear"]])
    assert [(t.unscored, t.reward) for t in played.trajectories] == [(True, 0.0), (False, 1.0)]


def test_a_group_that_cannot_be_scored_fails_by_name(group, rows):
    played = group({"data": rows, "rewards": ["trl_boxes:broken"]}, [["a"], ["b"]])
    assert [t.end for t in played.trajectories] == [End.BROKEN, End.BROKEN]
    assert "reward trl_boxes:broken raised ValueError: no judge today" in played.trajectories[0].failed
    assert played.usable == []


def test_what_a_function_logs_is_kept_and_the_state_is_that_of_the_trainer(group, rows):
    played = group({"data": rows, "rewards": ["trl_boxes:logs"]}, [["a"], ["b"]])
    assert [(t.metrics, t.notes) for t in played.trajectories] == [
        ({"size": 2.0}, {"place": 0}),
        ({"size": 2.0}, {"place": 1}),
    ]
    assert [t.reward for t in played.trajectories] == [0.0, 0.0]


def test_completion_ids_are_for_a_trainer_alone(rows):
    def needs(completions, completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    env = make("trl:trl_boxes:Box", {"data": rows, "rewards": [needs]})
    env.reset(seed=0)
    with pytest.raises(EnvError, match="reward needs takes completion_ids, which only a trainer has"):
        env.step("done")
    with pytest.raises(ConfigError, match="leave out group: false"):
        make("trl:trl_boxes:Box", {"data": rows, "rewards": {"n": {"reward": needs, "group": False}}})


class Parts(Box):
    def reset(self, image=False, **row):
        super().reset()
        return [{"type": "image", "image": "x"} if row.get("seed") == 1 else {"type": "text", "text": " Now."}]


def test_a_reset_that_tells_in_parts_is_read_as_text(monkeypatch):
    monkeypatch.setattr(sys.modules["trl_boxes"], "Parts", Parts, raising=False)
    env = make("trl:trl_boxes:Parts", {"rewards": ["trl_boxes:never"]})
    assert env.reset(seed=0)[0] == " Now."
