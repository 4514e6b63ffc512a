"""Templates that do something that few do, each a small one of a published kind: what is learned, and what is refused.

Each has the turns of ChatML and one oddity. The tokenizer is that of Qwen3 (`tests/families.py`).
"""

import copy
import json

import pytest

from opd.errors import DataError
from opd.models.chat import ChatFormat
from opd.models.check import check_text
from opd.trainers.parts.conversations import read_conversations
from tests.families import FAMILIES, make_tokenizer

ASKED = {"role": "user", "content": "Where?"}
CALL = {"type": "function", "id": "call00001", "function": {"name": "look", "arguments": {"place": "box"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call00001", "content": "a key"}
ANSWER = {"role": "assistant", "content": "In the box."}
MORE = {"role": "user", "content": "Sure?"}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]

OTHERS = """{%- if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif -%}
{%- for message in messages -%}
{%- if message.role != 'assistant' %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- else -%}
"""
CALLS = """{%- for call in message.tool_calls or [] -%}
{{- '<tool_call>' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson + '</tool_call>' }}
{%- endfor -%}
"""
END = "{{ '<|im_end|>\\n' }}{%- endif -%}{%- endfor -%}"
PROMPT = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"
OPENS = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>' }}{% endif -%}"
SPEAKS = "{{- '<|im_start|>assistant\\n' }}"
SAYS = "{{- message.content or '' }}"

# GLM 4.7: a thought that is dropped leaves the marker that closes it.
CLOSES_ALONE = (
    "{%- set ns = namespace(last=0) -%}{%- for message in messages if message.role == 'user' -%}"
    + "{%- set ns.last = messages.index(message) -%}{%- endfor -%}"
    + OTHERS
    + "{{- '<|im_start|>assistant\\n' }}{% if message.reasoning_content and loop.index0 > ns.last %}"
    + "{{- '<think>' + message.reasoning_content }}{% endif %}{{ '</think>' }}"
    + SAYS
    + CALLS
    + END
    + OPENS
)
# Nemotron Nano 2: thoughts stand in the text, and the last message is written behind the prompt as it is.
OPENS_FOR_THE_TEXT = (
    OTHERS
    + "{{- '<|im_start|>assistant\\n' }}{% if loop.last and message.content %}{{ '<think>\\n' + message.content }}"
    + "{% else %}{{ message.content.split('</think>')[-1].strip() }}{% endif %}"
    + CALLS
    + END
    + OPENS.replace("<think>", "<think>\\n")
)
# Apriel 1.5: a call has its id once it is answered.
ID_WHEN_ANSWERED = (
    OTHERS
    + SPEAKS
    + SAYS
    + """{%- set last = loop.last -%}{%- for call in message.tool_calls or [] -%}
{{- '<tool_calls>[{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}]</tool_calls>' if last else ', "id": "' + call.id + '"}]</tool_calls>' }}
{%- endfor -%}"""
    + END
    + PROMPT
)
# Gemma 4: the text of a message stands behind its calls.
TEXT_BEHIND_CALLS = OTHERS + SPEAKS + CALLS + SAYS + END + PROMPT
# Solar Open: a thought is a message of its own, which ends as an answer does.
THOUGHT_ENDS_AS_THE_ANSWER = (
    OTHERS
    + "{%- if message.reasoning_content %}"
    + "{{- '<|im_start|>assistant\\n<think>' + message.reasoning_content + '</think><|im_end|>\\n' }}{% endif %}"
    + SPEAKS
    + SAYS
    + CALLS
    + END
    + PROMPT
)
# DeepSeek R1 as Unsloth publishes it: a message with calls and any content but none is two messages.
ANSWERS_BEHIND_CALLS = (
    OTHERS
    + "{%- if message.tool_calls %}{{ '<|im_start|>assistant\\n' }}"
    + CALLS
    + "{{ '<|im_end|>\\n' }}{% endif -%}{%- if message.content is not none %}{{ '<|im_start|>assistant\\n' }}"
    + "{{- message.content + '<|im_end|>\\n' }}{% endif -%}{%- endif -%}{%- endfor -%}"
    + PROMPT
)
# Ministral 3: a message of the assistant without content or calls is refused.
REFUSES_EMPTY = (
    OTHERS
    + "{%- if not message.content and not message.tool_calls %}{{ raise_exception('empty') }}{% endif -%}"
    + SPEAKS
    + SAYS
    + CALLS
    + END
    + PROMPT
)
# Pixtral: the system's words stand in the last message, where that is the user's; and there is no place for tools.
SYSTEM_IN_THE_LAST = (
    """{%- set rest = messages[1:] if messages[0].role == 'system' else messages -%}
{%- for message in rest -%}
{%- if message.role not in ('user', 'assistant') %}{{ raise_exception('role') }}{% endif -%}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if loop.last and message.role == 'user' and messages[0].role == 'system' %}
{{- messages[0].content + '\\n' }}{% endif -%}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor -%}
"""
    + PROMPT
)
# Apriel 1.6: the prompt begins the reply in words, which stored messages lack.
BEGINS_IN_WORDS = OTHERS + SPEAKS + SAYS + CALLS + END + PROMPT.replace("assistant\\n", "assistant\\nMy steps:\\n")


def chat_of(source):
    tokenizer = copy.deepcopy(make_tokenizer(FAMILIES["qwen3"]))
    tokenizer.chat_template = source
    return ChatFormat(tokenizer)


def report_of(source):
    chat = chat_of(source)
    return check_text(chat.tokenizer, lambda: chat)


@pytest.fixture
def read(tmp_path):
    """`read(source, message, ...)`: the whole conversation as text, and the turns that are learned as texts."""

    def read_one(source, *messages):
        chat = chat_of(source)
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"messages": messages, "tools": TOOLS}))
        [trajectory] = read_conversations(path, chat)
        decode = chat.tokenizer.decode
        whole = ""
        for turn in trajectory.turns:
            whole = ("" if turn.forked else whole) + decode(turn.prompt_ids) + decode(turn.completion_ids)
        return whole, [decode(turn.completion_ids) for turn in trajectory.turns]

    return read_one


def test_a_closing_marker_that_the_template_writes_alone_is_learned_once(read):
    whole, learned = read(CLOSES_ALONE, ASKED, CALLED, RESULT, {**ANSWER, "reasoning_content": "Hm."})
    call = '</think><tool_call>{"name": "look", "arguments": {"place": "box"}}</tool_call><|im_end|>'
    assert learned == [call, "Hm.</think>In the box.<|im_end|>"]
    assert whole.count("</think>") == whole.count("<think>") == 2


def test_a_closing_marker_that_is_left_of_a_dropped_thought_rewrites_nothing():
    assert report_of(CLOSES_ALONE).facts["forks"] is False


def test_an_answer_behind_a_prompt_that_opens_a_thought_stands_outside_of_it(read):
    thinking = {**ANSWER, "reasoning_content": "Hm."}
    assert read(OPENS_FOR_THE_TEXT, ASKED, ANSWER)[1] == ["\n</think>\n\nIn the box.<|im_end|>"]
    whole, learned = read(OPENS_FOR_THE_TEXT, ASKED, thinking)
    assert learned == ["Hm.\n</think>\n\nIn the box.<|im_end|>"]
    assert whole.count("<think>") == 1


def test_a_call_that_is_written_otherwise_once_it_is_answered_leaves_nothing_behind_it(read):
    whole, learned = read(ID_WHEN_ANSWERED, ASKED, CALLED, RESULT, ANSWER)
    assert learned[0] == '<tool_calls>[{"name": "look", "arguments": {"place": "box"}}]</tool_calls><|im_end|>'
    assert f"{learned[0]}\n<|im_start|>tool\na key<|im_end|>" in whole


def test_text_that_the_template_writes_behind_calls_is_refused(read):
    with pytest.raises(DataError, match="writes the text of this message behind its tool calls"):
        read(TEXT_BEHIND_CALLS, ASKED, {**CALLED, "content": "Let me look."}, RESULT, ANSWER)
    read(TEXT_BEHIND_CALLS, ASKED, CALLED, RESULT, ANSWER)


def test_a_template_whose_thoughts_end_as_answers_do_is_refused():
    [problem] = report_of(THOUGHT_ENDS_AS_THE_ANSWER).problems
    assert "ends a thought with the token that ends an answer, '<|im_end|>'" in problem


def test_a_message_of_calls_has_no_content_where_any_would_be_an_answer_of_its_own(read):
    call = '<tool_call>{"name": "look", "arguments": {"place": "box"}}</tool_call><|im_end|>'
    assert read(ANSWERS_BEHIND_CALLS, ASKED, CALLED, RESULT, ANSWER)[1] == [call, "In the box.<|im_end|>"]
    assert report_of(ANSWERS_BEHIND_CALLS).problems == []


def test_a_key_without_which_the_template_refuses_the_message_is_rendered(read):
    assert read(REFUSES_EMPTY, ASKED, CALLED, RESULT, ANSWER)[1][1] == "In the box.<|im_end|>"


def test_tools_told_in_a_system_message_that_moves_do_not_hide_the_reply(read):
    system = {"role": "system", "content": "Be brief."}
    _, learned = read(SYSTEM_IN_THE_LAST, system, ASKED, CALLED, RESULT, ANSWER, MORE, ANSWER)
    assert learned[1:] == ["In the box.<|im_end|>", "In the box.<|im_end|>"]
    report = report_of(SYSTEM_IN_THE_LAST)
    assert (report.problems, report.facts["forks"]) == ([], True)


def test_a_prompt_that_begins_the_reply_in_words_is_reported_with_the_mend(read):
    with pytest.raises(
        DataError, match=r"the prompt ends in '.*My steps:\\n', which the message is not written behind"
    ):
        read(BEGINS_IN_WORDS, ASKED, ANSWER)
    problems = "\n".join(report_of(BEGINS_IN_WORDS).problems)
    assert "Mend the template" in problems
