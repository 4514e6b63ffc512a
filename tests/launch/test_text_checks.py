"""What a model's tokenizer and template do is looked at before anything is loaded, by `opd check` and by every run."""

import datetime
import json

import pytest

from opd.errors import ModelError
from opd.launch.checks.loading import config_from
from opd.launch.checks.text import _REPORTS, check_model_text, refuse_problems
from opd.launch.cli.main import main
from opd.launch.run.out import day_of, write_config
from opd.launch.train import train
from opd.models.chat import ChatFormat
from opd.models.check import check_text

ENDLESS = "{% for m in messages %}{{ '\n' + m.role + ': ' + m.content }}{% endfor %}"
OWN_CALLS = """\
{%- for tool in tools or [] %}{{ '<|im_start|>tools ' + (tool | tojson) + '<|im_end|>' }}{% endfor %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}{% set f = call.function %}
{{- 'CALLING ' + f.name + ' WITH ' + (f.arguments | tojson) }}
{%- endfor %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


@pytest.fixture(autouse=True)
def _no_report_is_kept():
    _REPORTS.clear()


@pytest.fixture
def folder(tmp_path, make_model, make_tokenizer):
    """`folder(template, name)`: a model's folder with a tokenizer of this template."""

    def made(template="chatml", name="model", ends=None):
        path = tmp_path / name
        model = make_model().model
        model.generation_config.eos_token_id = ends
        model.save_pretrained(path)
        make_tokenizer(template).save_pretrained(path)
        return path

    return made


def settings(model, tmp_path, **sections):
    return {
        "method": "opsd",
        "model": str(model),
        "env": "opd/Lookup-v0",
        "rollout": {"max_tokens": 8, "max_length": 1200},
        "train": {"steps": 1, "tasks_per_step": 1, "threads": 1},
        "eval": {"tasks": 0},
        "tracking": {"wandb": "disabled", "console": False},
        "out": str(tmp_path / "run"),
        "opsd": {"privileged": "plan"},
        **sections,
    }


def test_a_command_shows_how_a_models_turns_are_written_read_and_ended(folder, capsys):
    assert main(["check", str(folder()), "--env", "opd/Lookup-v0"]) == 0
    said = capsys.readouterr().out
    for row in ("tokenizer", "format", "ends", "stops", "thoughts", "rewrites", "markup"):
        assert f"\n{row} " in f"\n{said}"
    assert "an answer ends with '<|im_end|>'" in said
    assert "the first prompt of opd/Lookup-v0" in said
    assert "<|im_start|>user\n" in said


def test_a_file_of_settings_is_checked_with_its_own_template_settings(folder, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    data = settings(folder(), tmp_path, chat={"date": "2026-01-02"})
    data["rollout"]["chat_template_kwargs"] = {"no_thinking": True}
    file.write_text(json.dumps(data))
    assert main(["check", str(file)]) == 0
    assert "goes on with them, in one sequence" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ENDLESS, "ends an assistant's turn with no token of its own"),
        (None, "has no chat template"),
        (OWN_CALLS, 'the chat template writes a call as CALLING opd_probe WITH {"opd_key": "opdValue"}'),
    ],
)
def test_what_a_run_cannot_go_on_with_is_refused_before_it_begins(folder, tmp_path, capsys, template, message):
    model = folder(template)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings(model, tmp_path)))
    assert main(["check", str(model)]) == 1
    assert message in " ".join(capsys.readouterr().out.split())
    assert main(["train", str(file), "--dry-run"]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ModelError) as error:
        train(config_from(settings(model, tmp_path)))
    assert message in str(error.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


CHATML = """\
{%- for m in MESSAGES %}{{- '<|im_start|>' + m.role + '\\n' + CONTENT + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


@pytest.mark.parametrize(
    ("messages", "content", "lost"),
    [
        ("messages", "m.content[:200]", "4 are not shown whole (system, question0, result0, answer0)"),
        ("messages", "m.content[-500:]", "4 are not shown whole (system, question0, result0, answer0)"),
        ("messages", "(m.content | truncate(900))", "4 are not shown whole"),
        ("messages", "(m.content[:99] if m.role == 'assistant' else m.content)", "1 are not shown whole (answer0)"),
        ("messages[-8:]", "m.content", "(system, question0, "),
        ("([messages[0]] + messages[-8:])", "m.content", "(question0, result0, answer0, "),
        ("(messages | unique(attribute='role'))", "m.content", "(answer0, question1, "),
        ("messages", "m.content[:90000]", "4 are not shown whole"),
    ],
)
def test_a_template_that_cuts_or_drops_messages_is_refused(make_tokenizer, messages, content, lost):
    tokenizer = make_tokenizer(CHATML.replace("MESSAGES", messages).replace("CONTENT", content))
    report = check_text(tokenizer, lambda: ChatFormat(tokenizer))
    said = [problem for problem in report.problems if "cuts or drops messages" in problem]
    assert lost in said[0]
    assert report.facts["whole"] is False


def test_a_template_that_shows_every_message_whole_is_not(make_tokenizer):
    tokenizer = make_tokenizer(CHATML.replace("MESSAGES", "messages").replace("CONTENT", "m.content"))
    assert check_text(tokenizer, lambda: ChatFormat(tokenizer)).facts["whole"] is True


def test_a_format_that_a_person_has_set_is_believed(folder, tmp_path):
    sections = {"env": {"id": "opd/Lookup-v0", "kwargs": {"tool_format": "json"}}}
    report = check_model_text(config_from(settings(folder(OWN_CALLS), tmp_path, **sections)))
    refuse_problems(report)
    assert dict(report.rows)["format"].startswith("json")


def test_a_tokenizer_that_is_built_otherwise_than_its_file_says_is_refused(folder, tmp_path, make_tokenizer):
    config = config_from(settings(folder(), tmp_path))
    assert check_model_text(config).facts["as_its_file"]
    described = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    described["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": ""}
    file = tmp_path / "other.json"
    file.write_text(json.dumps(described))
    report = check_text(make_tokenizer(), lambda: ChatFormat(make_tokenizer()), file=file)
    assert not report.facts["as_its_file"]
    assert "is built otherwise than its tokenizer.json says" in report.problems[0]


def test_a_template_setting_that_the_template_does_not_look_at_is_refused(folder, tmp_path):
    data = settings(folder(), tmp_path)
    data["rollout"]["chat_template_kwargs"] = {"no_thinking": True}
    refuse_problems(check_model_text(config_from(data)))
    data["rollout"]["chat_template_kwargs"] = {"no_thinkng": True}
    with pytest.raises(ModelError, match=r"rollout\.chat_template_kwargs\.no_thinkng: .* does not look at it"):
        refuse_problems(check_model_text(config_from(data)))


def test_the_plan_tells_of_formats_and_ends(folder, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings(folder(ends=7), tmp_path)))
    assert main(["train", str(file), "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "an answer ends with '<|im_end|>'" in said
    assert "generation_config.json does not name '<|im_end|>'" in said


def test_a_teacher_that_ends_its_turns_otherwise_is_told_of(folder, tmp_path):
    other = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|endoftext|>' }}{%- endfor %}"
    sections = {"method": "opd", "opd": {"teacher": {"weights": "external", "model": str(folder(other, "teacher"))}}}
    data = {key: value for key, value in settings(folder(), tmp_path, **sections).items() if key != "opsd"}
    report = check_model_text(config_from(data))
    assert any("ends its turns with '<|im_end|>', and" in note for note in report.notes)
    refuse_problems(report)


# -- dates ----------------------------------------------------------------------------------------------


def test_a_run_keeps_the_day_on_which_it_began(tmp_path):
    config = config_from(settings("tiny:lookup", tmp_path), check_machine=False)
    folder = tmp_path / "run"
    today = datetime.date.today().isoformat()
    assert config.chat.date is None
    assert day_of(folder, resumed=False) == today
    write_config(config.on_the_day("2026-01-02"), folder)
    assert day_of(folder, resumed=True) == "2026-01-02"
    assert config.on_the_day("2026-01-02").on_the_day(today).chat.date == "2026-01-02"


@pytest.mark.parametrize("date", ["tomorrow", "2026-13-01", "26-1-1"])
def test_what_is_no_day_is_refused_by_its_key(tmp_path, date):
    with pytest.raises(Exception, match=r"chat\.date"):
        config_from(settings("tiny:lookup", tmp_path, chat={"date": date}), check_machine=False)
