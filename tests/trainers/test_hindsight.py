"""What a teacher that looks back is shown, where it stands, and what never reaches it."""

import pytest

from opd.losses import Distill, Divergence, SampledDistill
from opd.teachers.config import TeacherConfig
from opd.trainers.sdpo import Sdpo, SdpoConfig
from opd.trainers.srpo import SrpoConfig
from opd.types import Task, TrajectoryGroup


def user(text):
    return [{"role": "user", "content": text}]


def result(text):
    return [{"role": "tool", "content": text}]


def annotate(chat, *episodes, **config):
    task = Task(index=0, seed=0)
    return Sdpo(SdpoConfig(**config), chat).annotate(TrajectoryGroup(task=task, trajectories=list(episodes)))


def seen(chat, sample):
    """The teacher's text: before, between and after the completions."""
    view, texts, last = sample.teacher_view, [], -1
    for row, target in zip(view.rows, sample.completion_ids, strict=True):
        if row != last:
            texts.append(chat.tokenizer.decode(view.token_ids[last + 1 : row + 1]))
        assert view.token_ids[row + 1] == target
        last = row + 1
    return texts


THREE = [
    (user("the task"), "look there", None),
    (result("found nothing"), "look again", "the second look was in vain"),
    (result("found it"), "it is here", None),
]


def test_feedback_stands_before_the_action_that_it_is_about_and_tool_results_in_their_places(make_chat, make_episode):
    chat = make_chat()
    [sample] = annotate(chat, make_episode(chat, *THREE))
    first, second, third = seen(chat, sample)
    assert "in vain" not in first
    assert "found nothing" in second
    assert "in vain" in second
    assert "found it" in third
    assert "in vain" not in third
    assert sample.teacher_view.shows == ("feedback",)


def test_before_the_first_thing_shown_nothing_is_distilled(make_chat, make_episode):
    chat = make_chat()
    [sample] = annotate(chat, make_episode(chat, *THREE))
    distilled = {turn for turn, weight in zip(sample.turn, sample.distill_weight, strict=True) if weight}
    assert distilled == {1, 2}
    sampled = {turn for turn, mask in zip(sample.turn, sample.completion_mask, strict=True) if mask}
    assert sampled == {0, 1, 2}


def test_feedback_at_the_start_stands_in_the_first_user_message_and_corrects_every_turn(make_chat, make_episode):
    chat = make_chat()
    turns = [THREE[0], THREE[1], (*THREE[2][:2], "here is wrong too")]
    [sample] = annotate(chat, make_episode(chat, *turns), feedback_at="start")
    first, second, third = seen(chat, sample)
    assert "the second look was in vain\nhere is wrong too" in first
    assert "vain" not in second + third
    assert set(sample.distill_weight) == {0.0, 1.0}
    assert [w for w, m in zip(sample.distill_weight, sample.completion_mask, strict=True) if m and not w] == []


@pytest.mark.parametrize("template", ["no_tools", "strict"])
def test_feedback_stands_at_its_turn_in_templates_without_a_tool_role(make_chat, make_episode, template):
    chat = make_chat(template)
    [sample] = annotate(chat, make_episode(chat, *THREE))
    second = seen(chat, sample)[1]
    assert "found nothing" in second
    assert "in vain" in second


def test_a_rollout_is_never_its_own_demonstration(make_chat, make_group):
    chat = make_chat()
    [alone] = annotate(chat, *make_group(chat, "R").trajectories)
    assert (alone.route, alone.teacher_view, set(alone.distill_weight)) == ("untaught", None, {0.0})
    first, second = annotate(chat, *make_group(chat, "RR").trajectories)
    assert "R says on the 1" in seen(chat, first)[0]
    assert "R says 0" not in seen(chat, first)[0]
    assert "R says 0" in seen(chat, second)[0]
    assert "R says on the 1" not in seen(chat, second)[0]


def test_the_first_right_sibling_demonstrates_and_a_broken_or_wrong_one_never(make_chat, make_group):
    chat = make_chat()
    samples = annotate(chat, *make_group(chat, "FWRRW").trajectories)
    assert [s.member for s in samples] == [1, 2, 3, 4]  # what broke is not trained
    shown = {s.member: seen(chat, s)[0] for s in samples}
    for member, sibling in ((1, 2), (2, 3), (3, 2), (4, 2)):
        assert f"R says {'on the ' * sibling}{sibling}\n" in shown[member]
        assert shown[member].count(" says ") == 1
    assert {s.route for s in samples} == {"distill"}


def test_a_demonstration_holds_every_action_and_result_and_no_thinking(make_chat, make_episode):
    chat = make_chat()
    right = make_episode(
        chat,
        (user("the task"), "<think>\nlet me see\n</think>\n\nlook there", None),
        (result("found it"), "still thinking</think>it is here", None),
        success=True,
        member=1,
    )
    sample, _ = annotate(chat, make_episode(chat, THREE[0]), right)
    text = seen(chat, sample)[0]
    assert "successful attempt:\nlook there\n> found it\nit is here\n" in text
    assert "thinking" not in text
    assert "see" not in text


@pytest.mark.parametrize(
    ("feedback", "with_sibling", "alone"),
    [
        ("without_demonstration", ("demonstration",), ("feedback",)),
        ("always", ("demonstration", "feedback"), ("feedback",)),
        ("never", ("demonstration",), None),
    ],
)
@pytest.mark.parametrize("at", ["turn", "start"])
def test_when_feedback_is_shown(make_chat, make_episode, feedback, with_sibling, alone, at):
    chat = make_chat()
    wrong = make_episode(chat, (user("the task"), "no", "it is not no"))
    right = make_episode(chat, (user("the task"), "yes", None), success=True, member=1)
    config = {"feedback": feedback, "feedback_at": at}
    sample = annotate(chat, wrong, right, **config)[0]
    assert sample.teacher_view.shows == with_sibling
    [first] = seen(chat, sample)
    assert ("it is not no" in first) == ("feedback" in with_sibling)
    assert "attempt:\nyes\n" in first
    assert first.index("the task") < first.index("yes")
    sample = annotate(chat, wrong, **config)[0]
    assert (sample.teacher_view.shows if sample.teacher_view else None) == alone


def test_each_sequence_of_a_forked_episode_is_shown_the_demonstration(make_chat, make_episode):
    chat = make_chat("forgetful", on_rewrite="fork")
    turns = [(user("the task"), "<think>hm</think>no", None), (user("sure?"), "<think>so</think>yes", "no again")]
    wrong = make_episode(chat, *turns)
    right = make_episode(chat, (user("the task"), "right", None), success=True, member=1)
    assert len(wrong.segments()) == 2
    first, second, _ = annotate(chat, wrong, right, feedback="always")
    assert ["attempt:\nright\n" in seen(chat, s)[0] for s in (first, second)] == [True, True]
    assert ["no again" in seen(chat, s)[0] for s in (first, second)] == [False, True]
    first, second = annotate(chat, wrong)
    assert (first.route, second.route) == ("untaught", "distill")


def test_what_an_environment_says_stays_text(make_chat, make_episode):
    chat = make_chat()
    said = "{prompt} {episode} {feedback} \\1 {0}"
    right = make_episode(chat, (user("{episode}"), "{feedback}", None), success=True, member=1)
    sample, _ = annotate(chat, make_episode(chat, (user("{episode}"), "no", said)), right, feedback="always")
    text = seen(chat, sample)[0]
    assert said in text
    assert "attempt:\n{feedback}\n" in text


def test_feedback_on_an_action_that_answers_nothing_becomes_a_message_of_its_own(make_chat, make_episode):
    chat = make_chat()
    [sample] = annotate(chat, make_episode(chat, THREE[0], ([], "and?", "and what")))
    assert "and what" in seen(chat, sample)[1]


def test_a_teacher_that_would_read_too_much_is_not_asked(make_chat, make_episode):
    chat = make_chat()
    wrong = make_episode(chat, (user("the task"), "no", "blah " * 500))
    [sample] = annotate(chat, wrong, max_teacher_tokens=600)
    assert (sample.route, sample.teacher_view, any(sample.distill_weight)) == ("too_long", None, False)
    [sample] = annotate(chat, wrong)
    size = len(sample.teacher_view.token_ids)
    assert annotate(chat, wrong, max_teacher_tokens=size)[0].route == "distill"
    assert annotate(chat, wrong, max_teacher_tokens=size - 1)[0].route == "too_long"


def test_the_teachers_template_may_differ_from_the_students(make_chat, make_group):
    chat = make_chat()
    samples = annotate(chat, *make_group(chat, "RW").trajectories, teacher_chat_template_kwargs={"no_thinking": True})
    assert seen(chat, samples[1])[0].endswith("<think>\n\n</think>\n\n")


def test_the_reward_from_which_an_episode_is_right_can_be_set(make_chat, make_group):
    chat = make_chat()
    group = make_group(chat, "WWW", rewards=[0.49, 0.5, 0.0])
    assert [s.route for s in annotate(chat, *group.trajectories)] == ["untaught"] * 3
    assert [s.route for s in annotate(chat, *group.trajectories, right_from=0.5)] == ["distill", "untaught", "distill"]


@pytest.mark.parametrize("config", [SdpoConfig, SrpoConfig])
def test_the_published_defaults(config):
    made = config()
    assert made.loss() == Distill(divergence=Divergence("jsd", beta=0.5, top_k=100, support="student"), max_ratio=2.0)
    assert (made.teacher.weights, made.teacher.rate) == ("ema", 0.05)


@pytest.mark.parametrize("config", [SdpoConfig, SrpoConfig])
def test_a_rate_alone_is_that_of_the_default_teacher(config):
    assert config(teacher={"rate": 0.01}).teacher == TeacherConfig(weights="ema", rate=0.01)
    assert config(teacher={"weights": "frozen"}).teacher == TeacherConfig(weights="frozen")
    with pytest.raises(
        ValueError, match=r"teacher\.every\s+is used by weights = synced alone, but weights = ema; remove it"
    ):
        config(teacher={"every": 5})


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        (
            {"divergence": {"kind": "forward_kl", "top_k": None}},
            Distill(divergence=Divergence("forward_kl")),
        ),
        (
            {"divergence": "reverse_kl"},
            Distill(divergence=Divergence("reverse_kl", top_k=100, support="student")),
        ),
        ({"form": "sampled"}, SampledDistill()),
        ({"form": "sampled", "baseline": "full"}, SampledDistill(baseline="full")),
        (
            {"form": "sampled", "baseline": "top_k", "baseline_top_k": 7},
            SampledDistill(baseline="top_k", top_k=7, renormalise=True),
        ),
    ],
)
def test_the_forms_of_the_divergence(settings, loss):
    assert SdpoConfig(**settings, max_ratio=None).loss() == loss


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"form": "sampled", "divergence": "reverse_kl"},
            r"divergence\s+is used by form = exact alone, but form = sampled",
        ),
        ({"form": "sampled", "baseline_top_k": 5}, r"baseline_top_k\s+is used by baseline = top_k alone, .* = null"),
        ({"baseline_top_k": 5}, r"baseline_top_k\s+is used by form = sampled alone, but form = exact; remove it"),
        ({"divergence": {"top_k": None, "tail": False}}, "divergence.tail is used with top_k alone"),
        ({"baseline": "full"}, r"baseline\s+is used by form = sampled alone, but form = exact; remove it"),
        ({"max_advantage": 3.0}, r"max_advantage\s+is used by form = sampled alone, but form = exact; remove it"),
        ({"divergence": {"kind": "forward_kl", "beta": 0.1}}, "beta is used by kind = .* alone"),
        ({"demonstration_template": "{prompt}"}, r"needs \['prompt'\] but was given \['episode', 'prompt'\]"),
        ({"feedback_template": "{prompt} {episode}"}, "the template needs"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SdpoConfig(**settings)
