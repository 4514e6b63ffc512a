"""Messages to token ids over many turns, for templates with habits: the fixtures are in `tests/conftest.py`."""

import pytest

from opd.errors import ModelError
from opd.types import End, StopReason, Task, Trajectory, Turn

USER = {"role": "user", "content": "How many?"}
_SCHEMA = {"name": "look_up", "description": "Looks.", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": _SCHEMA}]


def said(text):
    return {"role": "assistant", "content": text}


def user(text):
    return {"role": "user", "content": text}


def tool(text):
    return {"role": "tool", "content": text}


@pytest.fixture
def decode(make_tokenizer):
    return lambda ids: make_tokenizer().decode(ids, skip_special_tokens=False)


@pytest.fixture
def encode(make_tokenizer):
    return lambda text: make_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_a_first_prompt_ends_where_the_assistant_speaks(make_chat, decode):
    ids = make_chat().start([{"role": "system", "content": "Be brief."}, USER])
    assert decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_tool_aware_template_gets_the_schemas(make_chat, decode):
    assert '"look_up"' in decode(make_chat().start([USER], TOOLS))


# -- what ends a turn ---------------------------------------------------------------------------------


def test_the_end_of_turn_token_is_the_one_that_the_template_puts_after_the_assistant(make_chat, make_tokenizer):
    chat = make_chat()
    assert chat.end_id == make_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert chat.stop_ids == {chat.end_id}


def test_white_space_before_the_end_of_turn_is_not_taken_for_it(make_chat, make_tokenizer, decode):
    chat = make_chat("spaced")
    assert chat.end_id == make_tokenizer().convert_tokens_to_ids("<|im_end|>")
    stopped = chat.extend([USER, said("b")], [user("c")], None, last_id=chat.end_id)
    assert decode(stopped.token_ids) == "<|im_start|>c [/INST]"
    cut = chat.extend([USER, said("b")], [user("c")], None, last_id=5)
    assert decode(cut.token_ids) == " <|im_end|><|im_start|>c [/INST]"


def test_a_template_that_ends_a_turn_with_plain_text_is_refused(make_chat):
    with pytest.raises(ModelError, match="ends an assistant's turn with no token of its own"):
        make_chat("endless")


def test_the_models_own_stop_ids_stop_too(make_chat):
    chat = make_chat(stop_ids=[7])
    assert chat.stop_ids == {chat.end_id, 7}


def test_the_action_is_the_text_without_its_end_of_turn_token_and_with_its_markup(make_chat, encode):
    chat = make_chat()
    ids = encode('<tool_call>{"name": "look_up"}</tool_call>')
    assert chat.text([*ids, chat.end_id]) == '<tool_call>{"name": "look_up"}</tool_call>'
    assert chat.text(ids) == '<tool_call>{"name": "look_up"}</tool_call>'
    assert chat.text([chat.end_id]) == ""


# -- between two completions --------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chatml", "no_tools", "trimming", "strict"])
def test_a_completion_that_ended_its_turn_is_followed_by_the_rest_of_the_template(make_chat, decode, template):
    chat = make_chat(template)
    added = chat.extend([USER, said("Four.")], [user("Sure?")], None, last_id=chat.end_id)
    assert not added.forked
    assert decode(added.token_ids) == "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"


def test_a_completion_that_the_limit_cut_gets_the_end_of_turn_token_from_the_prompt(make_chat, decode):
    chat = make_chat()
    whole = chat.extend([USER, said("Four.")], [user("Sure?")], None, last_id=chat.end_id)
    cut = chat.extend([USER, said("Four.")], [user("Sure?")], None, last_id=9)
    assert cut.token_ids == [chat.end_id, *whole.token_ids]


def test_a_conversation_of_encoded_texts_grows_into_what_the_template_renders(make_chat, encode, decode):
    chat = make_chat()
    history = [USER, said("abba"), tool("<ok> 12"), said("the end"), user("on")]
    ids = chat.start(history[:1], TOOLS)
    for n in (1, 3):
        ids += [*encode(history[n]["content"]), chat.end_id]
        ids += chat.extend(history[: n + 1], [history[n + 1]], TOOLS, last_id=chat.end_id).token_ids
    rendered = chat.tokenizer.apply_chat_template(history, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert decode(ids) == rendered


def test_what_an_environment_says_cannot_stand_for_the_completion(make_chat, decode):
    chat = make_chat()
    added = chat.extend([USER, said("x")], [user("a \u2063opd\u2063 b \u2063opd\u2063")], None, last_id=chat.end_id)
    assert decode(added.token_ids).startswith("\n<|im_start|>user\na ")


def test_several_messages_may_come_between_two_completions(make_chat, decode):
    added = make_chat().extend([USER, said("x")], [tool("1"), tool("2"), user("go")], TOOLS, last_id=0)
    assert decode(added.token_ids) == (
        "<|im_end|>\n<|im_start|>tool\n1<|im_end|>\n<|im_start|>tool\n2<|im_end|>\n"
        "<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n"
    )


# -- templates that rewrite the past ------------------------------------------------------------------


def test_dropped_thinking_forks_the_conversation(make_chat, decode):
    chat = make_chat("forgetful", on_rewrite="fork")
    history = [USER, said("<think>hm</think>Four.")]
    forked = chat.extend(history, [user("Sure?")], None, last_id=chat.end_id)
    assert forked.forked
    assert decode(forked.token_ids) == (
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_thinking_that_the_template_keeps_does_not_fork(make_chat):
    chat = make_chat("forgetful")
    assert not chat.extend([USER, said("<think>hm</think>Four.")], [tool("4")], None, last_id=chat.end_id).forked
    assert not chat.extend([USER, said("Four.")], [user("Sure?")], None, last_id=chat.end_id).forked


def test_a_fork_two_turns_later_is_seen_too(make_chat):
    chat = make_chat("forgetful", on_rewrite="fork")
    history = [USER, said("<think>hm</think>a"), tool("1"), said("b")]
    assert chat.extend(history, [user("Sure?")], None, last_id=chat.end_id).forked


def test_appending_can_be_asked_for_where_a_template_rewrites(make_chat, decode):
    chat = make_chat("forgetful", on_rewrite="append")
    added = chat.extend([USER, said("<think>hm</think>Four.")], [user("Sure?")], None, last_id=chat.end_id)
    assert not added.forked
    assert decode(added.token_ids) == "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("text", [" Four.\n\n", "\n Four.", "Four. ", "", "  "])
def test_trimmed_white_space_is_not_a_rewrite(make_chat, text):
    chat = make_chat("trimming")
    assert not chat.extend([USER, said(text)], [user("Sure?")], None, last_id=chat.end_id).forked


def test_a_generation_prompt_that_history_does_not_repeat_is_a_rewrite(make_chat):
    chat = make_chat(template_kwargs={"no_thinking": True}, on_rewrite="fork")
    assert chat.extend([USER, said("Four.")], [user("Sure?")], None, last_id=chat.end_id).forked


# -- what a template does not know --------------------------------------------------------------------


def test_a_system_text_goes_before_the_first_user_message_where_the_template_refuses_it(make_chat, decode):
    ids = make_chat("strict").start([{"role": "system", "content": "Be brief."}, USER])
    assert decode(ids) == "<|im_start|>user\nBe brief.\n\nHow many?<|im_end|>\n<|im_start|>assistant\n"


def test_tools_go_into_the_system_message_in_plain_text_where_the_template_has_no_place_for_them(make_chat, decode):
    text = decode(make_chat("no_tools").start([{"role": "system", "content": "Be brief."}, USER], TOOLS))
    system = text.split("<|im_end|>")[0]
    assert system.startswith("<|im_start|>system\nBe brief.\n\nYou may call these tools")
    assert '"name": "look_up"' in system
    alone = decode(make_chat("no_tools").start([USER], TOOLS))
    assert alone.startswith("<|im_start|>system\nYou may call these tools")


def test_without_a_system_role_the_tools_stand_in_the_first_user_message(make_chat, decode):
    text = decode(make_chat("strict").start([USER], TOOLS))
    assert text.startswith("<|im_start|>user\nYou may call these tools")
    assert text.endswith("\n\nHow many?<|im_end|>\n<|im_start|>assistant\n")


def test_a_tool_result_is_a_user_message_where_there_is_no_tool_role(make_chat, decode):
    chat = make_chat("no_tools")
    added = chat.extend([USER, said("x")], [tool("42")], TOOLS, last_id=chat.end_id)
    assert not added.forked
    assert decode(added.token_ids) == "\n<|im_start|>user\n42<|im_end|>\n<|im_start|>assistant\n"


def test_the_results_of_several_calls_are_one_message_where_roles_must_alternate(make_chat, decode):
    chat = make_chat("strict")
    history = [{"role": "system", "content": "s"}, USER, said("x")]
    added = chat.extend(history, [tool("1"), tool("2")], TOOLS, last_id=chat.end_id)
    assert decode(added.token_ids) == "\n<|im_start|>user\n1\n2<|im_end|>\n<|im_start|>assistant\n"
    again = chat.extend([*history, tool("1"), tool("2"), said("y")], [tool("3")], TOOLS, last_id=chat.end_id)
    assert decode(again.token_ids) == "\n<|im_start|>user\n3<|im_end|>\n<|im_start|>assistant\n"


def test_helping_out_leaves_the_messages_themselves_alone(make_chat):
    messages = [{"role": "system", "content": "s"}, dict(USER)]
    make_chat("strict").start(messages, TOOLS)
    assert messages == [{"role": "system", "content": "s"}, USER]


def test_messages_of_the_user_are_joined_where_roles_must_alternate(make_chat, decode):
    assert decode(make_chat("strict").start([USER, user("Please.")])) == (
        "<|im_start|>user\nHow many?\n\nPlease.<|im_end|>\n<|im_start|>assistant\n"
    )
    chat = make_chat("strict")
    added = chat.extend([USER, said("x")], [tool("42"), user("Go on.")], TOOLS, last_id=chat.end_id)
    assert decode(added.token_ids) == "\n<|im_start|>user\n42\n\nGo on.<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_refuses_the_roles_says_which(make_chat):
    with pytest.raises(ModelError, match=r"refuses the roles assistant, user: roles must alternate"):
        make_chat("strict").start([said("Hello."), USER])


def test_a_tokenizer_without_a_template_is_refused(make_chat):
    with pytest.raises(ModelError, match="has no chat template"):
        make_chat(None)


def test_a_template_that_ignores_what_the_assistant_said_is_refused(make_chat):
    with pytest.raises(ModelError, match="does not render an assistant's content"):
        make_chat("{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}")


# -- the teacher's view -------------------------------------------------------------------------------


def spoken(chat, *turns, tools=None):
    """A trajectory of (new messages, completion ids) turns, as the scheduler would build it."""
    history, made = [], []
    for messages, completion in turns:
        if made:
            added = chat.extend(history, messages, tools, last_id=made[-1].completion_ids[-1])
            prompt, forked = added.token_ids, added.forked
        else:
            prompt, forked = chat.start(messages, tools), False
        history = [*history, *messages]
        made.append(
            Turn(
                prompt_ids=prompt,
                completion_ids=completion,
                logprobs=[0.0] * len(completion),
                stop_reason=StopReason.STOP,
                messages=list(history) if forked else messages,
                text=chat.text(completion),
                forked=forked,
            )
        )
        history.append(said(made[-1].text))
    return Trajectory(task=Task(index=0, seed=0), member=0, turns=made, end=End.FINISHED, tools=tools)


def whisper(turn, messages):
    """What the teacher reads: the same, with something more before the first user message of a turn."""
    return [{**m, "content": f"psst {turn}. {m['content']}"} if m["role"] == "user" else m for m in messages]


def test_a_view_that_changes_nothing_is_the_students_sequence(make_chat):
    chat = make_chat()
    trajectory = spoken(chat, ([USER], [4, 5, chat.end_id]), ([tool("1")], [6]), ([user("on")], [7]), tools=TOOLS)
    [segment] = trajectory.segments()
    view = chat.view(trajectory, segment, lambda _, messages: messages)
    assert view.token_ids == [i for t in segment.turns for i in t.prompt_ids + t.completion_ids]
    assert view.targets == [4, 5, chat.end_id, 6, 7]


def test_a_view_holds_the_sampled_ids_between_the_teachers_own_prompts(make_chat, decode):
    chat = make_chat()
    # 5 is cut by the limit, so that the glue supplies its end of turn on both sides.
    trajectory = spoken(chat, ([USER], [4, chat.end_id]), ([user("on")], [5]), ([tool("2")], [6, chat.end_id]))
    view = chat.view(trajectory, trajectory.segments()[0], whisper)
    assert view.targets == [4, chat.end_id, 5, 6, chat.end_id]
    assert decode(view.token_ids) == (
        f"<|im_start|>user\npsst 0. How many?<|im_end|>\n<|im_start|>assistant\n{decode([4])}<|im_end|>\n"
        f"<|im_start|>user\npsst 1. on<|im_end|>\n<|im_start|>assistant\n{decode([5])}<|im_end|>\n"
        f"<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n{decode([6])}<|im_end|>"
    )


def test_ids_that_a_reply_begins_with_stand_before_its_first_completion_and_are_not_scored(make_chat):
    chat = make_chat()
    trajectory = spoken(chat, ([USER], [4, chat.end_id]), ([user("on")], [5]))
    [segment] = trajectory.segments()
    first, second = segment.turns
    view = chat.view(trajectory, segment, lambda _, messages: messages, opening=[8, 9])
    assert view.token_ids == [*first.prompt_ids, 8, 9, 4, chat.end_id, *second.prompt_ids, 5]
    assert view.targets == [4, chat.end_id, 5]
    told = chat.view(trajectory, segment, lambda n, m: whisper(n, m) if n == 0 else m, opening=[8, 9])
    prompt = chat.start(whisper(0, first.messages))
    assert told.token_ids == prompt + view.token_ids[len(first.prompt_ids) :]
    assert told.targets == view.targets


def test_tool_results_reach_the_teacher_to_the_letter(make_chat):
    chat = make_chat()
    trajectory = spoken(chat, ([USER], [4, chat.end_id]), ([tool("the result 123")], [5]))
    view = chat.view(trajectory, trajectory.segments()[0], lambda n, m: whisper(n, m) if n == 0 else m)
    glue = trajectory.turns[1].prompt_ids
    assert view.token_ids[-len(glue) - 1 : -1] == glue


def test_each_segment_of_a_forked_conversation_has_its_own_view(make_chat, make_tokenizer, encode, decode):
    chat = make_chat("forgetful", on_rewrite="fork")
    thought = [*encode("<think>hm</think>a"), chat.end_id]
    trajectory = spoken(chat, ([USER], thought), ([user("on")], [5]), ([tool("1")], [6]))
    first, second = trajectory.segments()
    assert chat.view(trajectory, first, whisper).targets == thought
    view = chat.view(trajectory, second, lambda n, m: whisper(n, m) if n == second.start else m)
    assert view.targets == [5, 6]
    assert decode(view.token_ids).startswith(
        "<|im_start|>user\npsst 1. How many?<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\npsst 1. on<|im_end|>"
    )


def test_the_teachers_own_template_settings_hold_at_every_turn(make_chat, decode):
    chat = make_chat(template_kwargs={"no_thinking": True}, on_rewrite="append")
    trajectory = spoken(chat, ([USER], [4, chat.end_id]), ([tool("2")], [5]))
    [segment] = trajectory.segments()
    student = [i for t in segment.turns for i in t.prompt_ids + t.completion_ids]
    assert decode(student).count("<think>") == 2
    view = chat.view(trajectory, segment, lambda _, messages: messages, no_thinking=False)
    assert decode(view.token_ids) == decode(student).replace("<think>\n\n</think>\n\n", "")
    assert view.targets == [4, chat.end_id, 5]


def test_tools_reach_the_teacher(make_chat, decode):
    chat = make_chat()
    trajectory = spoken(chat, ([USER], [4]), tools=TOOLS)
    assert "look_up" in decode(chat.view(trajectory, trajectory.segments()[0], whisper).token_ids)


def test_half_a_call_is_no_rewrite(make_chat):
    chat = make_chat()
    for text in ('green"}}</tool_call>', "<tool_call>", "</think>", "a <think> b"):
        assert not chat.extend([USER, said(text)], [user("Sure?")], TOOLS, last_id=chat.end_id).forked


def test_a_template_that_wants_parts_is_given_parts(make_chat, decode):
    parts = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{% for part in m.content %}{% if part.type == 'text' %}"
        "{{ '\\n' + part.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    chat = make_chat(parts)
    assert decode(chat.start([USER])) == "<|im_start|>user\nHow many?<|im_end|><|im_start|>assistant"
    added = chat.extend([USER, said("Four.")], [user("Sure?")], None, last_id=chat.end_id)
    assert decode(added.token_ids) == "<|im_start|>user\nSure?<|im_end|><|im_start|>assistant"
