"""Tool episodes through chat templates that models are published with: the result is rendered, the next call read.

The templates of Qwen and Llama are those that trl ships; Mistral's is written here in its published form. The
tokenizer is one of bytes, with each family's special tokens.
"""

from pathlib import Path

import pytest
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd.engines.base import Sampling
from opd.envs import Start, ToolEnv, ToolError, format_call, tool
from opd.episodes.tasks import task
from opd.models.chat import ChatFormat
from tests.families import FAMILIES, template
from tests.families import make_tokenizer as family_tokenizer

SHIPPED = Path(trl.__file__).parent / "chat_templates"

# As Mistral publishes it: the tools before the last user message, the system text inside the first; results need
# an id of nine characters, which plain text has not, so that they are given as a user's message.
MISTRAL = """\
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message.role == 'user' %}
        {%- if (loop.index0 % 2) != 0 %}{{- raise_exception('roles must alternate user and assistant') }}{%- endif %}
        {%- if tools and loop.last %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
        {{- '[INST]' + (system + '\\n\\n' if system is defined and loop.first else '') + message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- message.content + eos_token }}
    {%- elif message.role == 'tool' %}
        {%- if message.tool_call_id is not defined or message.tool_call_id | length != 9 %}
            {{- raise_exception('a tool call id must have 9 characters') }}
        {%- endif %}
        {{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""

CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|eom_id|>", "<|eot_id|>")
MARKS = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "<s>", "</s>")
FUNCTION = "<tool_call>\n<function={}>\n<parameter={}>\n{}\n</parameter>\n</function>\n</tool_call>"


def hermes(name, key, value):
    return f"I will.\n{format_call(name, {key: value})}"


def thinking(name, key, value):
    return f"<think>\nIf I {format_call('open_safe', {'code': 0})} it fails.\n</think>\n\n{hermes(name, key, value)}"


def coder(name, key, value):
    return FUNCTION.format(name, key, value)


def llama(name, key, value):
    return format_call(name, {key: value}, "llama")


def python_tag(name, key, value):
    return f"<|python_tag|>{llama(name, key, value)}<|eom_id|>"


def mistral(name, key, value):
    return format_call(name, {key: value}, "mistral")


def mistral_list(name, key, value):
    return f'[TOOL_CALLS] [{{"name": "{name}", "arguments": {{"{key}": {value}}}}}]'


def make_tokenizer(template, special, eos):
    text = MISTRAL if template == "mistral" else (SHIPPED / f"{template}.jinja").read_text()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, bos_token=special[0], chat_template=text, pad_token=special[0]
    )


class SafeEnv(ToolEnv):
    """A digit of the code, then the safe."""

    def start(self, rng, split, index):
        self.code = 4711
        return Start(prompt="Open the safe.", system="You open safes.")

    @tool
    def peek(self, digit: int) -> str:
        """Look at a digit.

        Args:
            digit: which, from 0.
        """
        return f"digit {digit} is «{str(self.code)[digit]}»"

    @tool
    def open_safe(self, code: int) -> str:
        """Open the safe."""
        if code != self.code:
            raise ToolError(f"{code} is wrong")
        self.finish(1.0, success=True)
        return "open"


@pytest.mark.parametrize(
    ("template", "special", "eos", "write", "shown"),
    [
        ("qwen2_5", CHATML, "<|im_end|>", hermes, "<tool_response>\ndigit 1 is «7»\n</tool_response>"),
        ("qwen3", CHATML, "<|im_end|>", thinking, "<tool_response>\ndigit 1 is «7»\n</tool_response>"),
        ("qwen3_5_nothink", CHATML, "<|im_end|>", coder, "<tool_response>\ndigit 1 is «7»\n</tool_response>"),
        ("llama3_1", LLAMA, "<|eot_id|>", llama, "<|start_header_id|>ipython<|end_header_id|>"),
        ("llama3_1", LLAMA, "<|eot_id|>", python_tag, "<|start_header_id|>ipython<|end_header_id|>"),
        ("mistral", MARKS, "</s>", mistral, "[INST]digit 1 is «7»[/INST]"),
        ("mistral", MARKS, "</s>", mistral_list, "[INST]digit 1 is «7»[/INST]"),
    ],
)
def test_a_result_is_rendered_by_the_models_template_and_the_next_call_is_read(
    make_scheduler, scripted_engine, template, special, eos, write, shown
):
    tokenizer = make_tokenizer(template, special, eos)
    chat = ChatFormat(tokenizer)
    said = [write("peek", "digit", 1), write("open_safe", "code", 4711)]
    engine = scripted_engine([[[*chat.encode(text), chat.end_id] for text in said]])
    scheduler = make_scheduler(SafeEnv, chat=chat, engine=engine, max_tokens=400, max_length=16_000)
    [group] = scheduler.run([task(0, split="train")], group_size=1, sampling=Sampling(temperature=1.0), seed=0)
    [episode] = group.trajectories
    assert episode.failed is None
    assert [turn.text for turn in episode.turns] == said
    assert (episode.success, episode.reward) == (True, 1.0)
    first, second = (tokenizer.decode(turn.prompt_ids) for turn in episode.turns)
    assert "Look at a digit." in first  # the schemas are in the prompt, in the template's own words
    assert shown in second
    assert "«7»" in second.replace("\\u00ab", "«").replace("\\u00bb", "»")  # Llama's template shows results as JSON


def test_a_mistaken_call_is_told_and_the_next_is_read(make_scheduler, scripted_engine):
    chat = ChatFormat(make_tokenizer("qwen3", CHATML, "<|im_end|>"))
    said = ["<tool_call>{'name': 'peek'}</tool_call>", hermes("open_safe", "code", 4711)]
    engine = scripted_engine([[[*chat.encode(text), chat.end_id] for text in said]])
    scheduler = make_scheduler(SafeEnv, chat=chat, engine=engine, max_tokens=400, max_length=16_000)
    [group] = scheduler.run([task(0, split="train")], group_size=1, sampling=Sampling(temperature=1.0), seed=0)
    [episode] = group.trajectories
    assert "Error: the tool call is not valid JSON" in chat.tokenizer.decode(episode.turns[1].prompt_ids)
    assert episode.turns[0].feedback.startswith("Error: the tool call is not valid JSON")
    assert episode.success


# DeepSeek's older templates write one block of several results, and Mistral's older ones show the system message only
# as long as the user's is the last.
REWRITING = ("deepseek-v3", "deepseek-r1-distill", "mistral-v0.3", "mistral-nemo")


@pytest.mark.parametrize("name", FAMILIES)
def test_an_agent_of_each_family_acts_in_its_own_format(make_scheduler, scripted_engine, name):
    """The calls are written as the family's template writes them, and read by the environment that was told so."""
    family = FAMILIES[name]
    if template(family) is None:
        pytest.skip(f"the template of {name} ({family.source}) is absent here")
    tokenizer = family_tokenizer(family)
    chat = ChatFormat(tokenizer, stop_ids=tokenizer.convert_tokens_to_ids(list(family.ends)))
    asked = [{"role": "user", "content": "x"}]
    tools = SafeEnv().tool_schemas()
    calls = [("peek", {"digit": 1}), ("peek", {"digit": 9}), ("open_safe", {"code": 4711})]
    said = [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": tool, "arguments": arguments}}]}
        for tool, arguments in calls
    ]
    engine = scripted_engine([[chat.spoken(asked, message, tools) for message in said]])

    def make():
        env = SafeEnv()
        env.read_calls_as(chat.format.name, starts_thinking=chat.starts_thinking)
        return env

    scheduler = make_scheduler(make, chat=chat, engine=engine, max_tokens=400, max_length=16_000)
    [group] = scheduler.run([task(0, split="train")], group_size=1, sampling=Sampling(temperature=1.0), seed=0)
    [episode] = group.trajectories
    assert episode.failed is None
    assert any(turn.forked for turn in episode.turns) == (name in REWRITING)
    assert (episode.success, episode.reward) == (True, 1.0)
    shown = tokenizer.decode(episode.turns[1].prompt_ids).replace("\\u00ab", "«").replace("\\u00bb", "»")
    assert "digit 1 is «7»" in shown
    assert "peek failed" in episode.turns[1].feedback


def test_a_reply_of_gpt_oss_is_scored_by_what_it_says(make_scheduler, scripted_engine, scripted_env):
    family = FAMILIES["gpt-oss"]
    if template(family) is None:
        pytest.skip("the template of gpt-oss is absent here")
    tokenizer = family_tokenizer(family)
    chat = ChatFormat(tokenizer, stop_ids=tokenizer.convert_tokens_to_ids(list(family.ends)))
    got = []

    def play(env, action):
        got.append(action)
        return "", 1.0, True, False, {}

    answer = {"role": "assistant", "content": '{"answer": 42}', "reasoning_content": "6 * 7"}
    engine = scripted_engine([[chat.spoken([{"role": "user", "content": "x"}], answer, None)]])
    scheduler = make_scheduler(lambda: scripted_env(play), chat=chat, engine=engine, max_tokens=400, max_length=16_000)
    [group] = scheduler.run([task(0, split="train")], group_size=1, sampling=Sampling(temperature=1.0), seed=0)
    assert got == ['<think>\n6 * 7\n</think>\n\n{"answer": 42}']
    assert group.trajectories[0].turns[0].text.startswith("<|channel|>analysis<|message|>6 * 7<|end|>")
