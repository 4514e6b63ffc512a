"""Secrets in settings: written out or by the name of a variable, they reach what needs them and stand nowhere else.

Not covered: what wandb's service is sent, and a run of several machines.
"""

import os
import stat
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

from opd import secrets
from opd.errors import ConfigError
from opd.launch.checks.loading import config_from
from opd.launch.checks.outside import taken_by
from opd.launch.cli.main import main
from opd.launch.run.out import write_config
from opd.launch.settings.reader import read_settings
from opd.tracking import read_rows

FOLDER = Path(__file__).resolve().parents[1] / "zero"
OWN = "sk-proj-Q7tyHardWrittenInTheCode99"
"""What the code of `leaky_env` has written in it."""
PLAIN, BEHIND, LATER = "Xk9-plain-canary-4711", "hx%7+behind a variable/8", "a-new-value-of-it-0815"


@pytest.fixture(autouse=True)
def nothing_known():
    secrets.forget()
    yield
    secrets.forget()


@pytest.fixture
def leaky(settings, tmp_path, monkeypatch):
    """`leaky(value)`: the file of a short run of the leaky environment, and its folder."""

    monkeypatch.syspath_prepend(FOLDER)

    def make(value, **sections):
        monkeypatch.setenv("OPD_TEST_SOMETHING", value)
        monkeypatch.setenv("OPD_TEST_EXPECTED", f"{PLAIN} http://me:{value}@host")
        kwargs = {"api_key": PLAIN, "endpoint": "http://me:${env:OPD_TEST_SOMETHING}@host"}
        data = settings(
            "run",
            env={"id": "leaky_env:LeakyEnv", "kwargs": kwargs, "workers": "processes", "max_turns": 1, "probe": False},
            opsd={"privileged": "solution"},
            eval={"tasks": 2},
            tracking={"wandb": "offline", "console": True, "name": f"run with {PLAIN}"},
            rollout={"retries": 1, "max_tokens": 6, "max_length": 512},
            **sections,
        )
        file = tmp_path / "settings.yaml"
        file.write_text(yaml.safe_dump(data))
        return file, tmp_path / "run"

    return make


def holding(folder, *canaries):
    """The files below a folder that hold one of the texts."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {p.relative_to(folder).as_posix() for p in files if any(c.encode() in p.read_bytes() for c in canaries)}


def test_the_keys_of_an_environment_reach_it_and_stand_in_no_file_but_the_runs_settings(
    leaky, capfd, caplog, monkeypatch
):
    file, out = leaky(BEHIND)
    monkeypatch.setattr("sys.argv", ["opd", "train", str(file), f"--env.kwargs.api_key={PLAIN}"])
    assert main(["train", str(file), f"--env.kwargs.api_key={PLAIN}", "--train.steps", "1"]) == 0
    said = "".join(capfd.readouterr())
    assert "made with *** http://me:***@host ***" in said  # printed in another process
    assert "env.kwargs.api_key: a secret is written out. It stays in config.yaml" in said
    assert not any(canary in said for canary in (PLAIN, BEHIND, OWN, "hx%257%2Bbehind"))
    assert holding(out, PLAIN) == {"config.yaml"}
    assert holding(out, BEHIND, OWN, "hx%257%2Bbehind", PLAIN[:12]) == {"config.yaml"}
    assert holding(out, BEHIND, OWN) == set()
    assert stat.S_IMODE((out / "config.yaml").stat().st_mode) == 0o600
    rows = read_rows(out / "rollouts.jsonl")
    assert any("***" in str(row["messages"]) for row in rows)
    failed = [row["failed"] for row in rows if row["failed"]]
    assert failed
    assert all("ConnectionError: GET https://host/v1?***" in reason for reason in failed)

    file, out = leaky(LATER, train={"steps": 2})
    assert main(["train", str(out), "--resume", "--train.steps", "2", "--env.workers", "processes"]) == 0
    assert read_rows(out / "metrics.jsonl")[-1]["step"] == 2
    said = "".join(capfd.readouterr())
    assert "these are not the keys" not in said
    assert LATER not in said
    assert main(["eval", str(out), "--tasks", "2", "--env.workers", "threads"]) == 0
    said = "".join(capfd.readouterr())
    assert "made with *** http://me:***@host ***" in said  # printed in this one
    assert "the key is *** http://me:***@host ***" in caplog.messages
    assert not any(canary in said for canary in (PLAIN, LATER, OWN))
    assert holding(out, LATER) == set()


def test_a_variable_that_is_not_set_is_refused_by_name_before_anything_else(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPD_TEST_NONE", raising=False)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(BASE | {"env": {"id": "opd/Lookup-v0", "kwargs": {"a": ["${env:OPD_TEST_NONE}"]}}}))
    for more in ([], ["--dry-run"], ["--resume"]):
        assert main(["train", str(file), *more]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {file}: env.kwargs.a.0: the environment variable OPD_TEST_NONE is not set")
    assert list(tmp_path.iterdir()) == [file]


BASE = {"method": "opsd", "model": "tiny:lookup", "env": "opd/Lookup-v0", "opsd": {"privileged": "solution"}}


def config(**sections):
    return config_from(BASE | sections, check_machine=False)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"train": {"steps": "${env:OPD_A}"}},
            r'train.steps = "\$\{env:OPD_A\}" is not allowed. Allowed: a whole number',
        ),
        ({"train": {"steps": "${env:OPD_A}"}}, "The value of a variable can stand where any text may"),
        ({"rollout": {"engine": "${env:OPD_A}"}}, r'rollout.engine = "\$\{env:OPD_A\}": the value of a variable can'),
        ({"method": "${env:OPD_A}"}, r"method = .*the value of a variable can stand where any text may"),
        (
            {"env": {"id": "a", "kwargs": {"x": "${ENV:OPD_A}"}}},
            r"env.kwargs.x: what begins with \$\{ENV is no variable",
        ),
        (
            {"env": {"id": "a", "kwargs": {"x": "${env:OPD A}"}}},
            r"env.kwargs.x: what begins with \$\{env is no variable",
        ),
        ({"env": {"id": "a", "kwargs": {"${env:OPD_A}": 1}}}, "a variable cannot give a setting its name"),
        ({"env": {"id": "a", "kwargs": {"api_key": "***"}}}, r"env.kwargs.api_key: \*\*\* stands for a secret"),
        ({"rollout": {"vllm": {"servers": ["http://u:${env:OPD_A}@h"]}}}, r"servers: 'http://u:\*\*\*@h'"),
    ],
)
def test_a_variable_where_no_text_may_stand_is_refused_without_its_value(sections, message, monkeypatch):
    monkeypatch.setenv("OPD_A", "value-of-the-variable")
    with pytest.raises(ConfigError, match=message) as caught:
        config(**sections)
    assert "value-of-the-variable" not in str(caught.value)


@pytest.mark.parametrize(
    "sections",
    [
        {"out": "${HOME}/runs"},
        {"model": "$MODELS/a"},
        {"model": {"name": "${MODELS}/a"}},
        {"env": {"id": "opd/Dataset-v0", "kwargs": {"path": "${HOME}/tasks.jsonl"}}},
        {"env": {"id": "opd/Dataset-v0", "kwargs": {"path": {"eval": "$HOME/tasks.jsonl"}}}},
        {"env": "opd/Lookup-v0", "eval": {"tasks": 1, "env_kwargs": {"folder": "$DATA"}}},
        {"deepspeed": "$HOME/zero.json", "backend": "deepspeed"},
        {"opsd": {"privileged": "solution", "teacher": {"weights": "external", "model": "${MODELS}/t"}}},
        {"method": "sft", "opsd": None, "sft": {"source": "file", "file": "$DATA/rows.jsonl"}},
        {
            "method": "lightning_opd",
            "lightning_opd": {"teacher": {"weights": "external", "model": "a"}, "data": "$X/a"},
        },
        {"tracking": {"name": "${USER}"}},
    ],
    ids=str,
)
def test_a_variable_as_a_shell_has_it_is_refused_by_name_wherever_a_name_may_stand(sections):
    data = {key: value for key, value in (BASE | sections).items() if value is not None}
    with pytest.raises(ConfigError, match=r"does not know the variable \$\{?[A-Z]+\}?; write \$\{env:[A-Z]+\}"):
        config_from(data, check_machine=False)


def test_texts_that_hold_dollars_and_name_no_path_are_taken_as_they_are():
    kwargs = {"a": "costs $5 or $x$", "b": "Solve ${question} for $USD/EUR now", "c": "$ref", "d": "a$HOME/b"}
    assert config(env={"id": "opd/Lookup-v0", "kwargs": kwargs}).env.kwargs == kwargs


def test_a_variable_stands_in_any_text_and_what_is_written_holds_its_name(monkeypatch, tmp_path):
    monkeypatch.setenv("OPD_A", "value-of-the-variable")
    monkeypatch.setenv("OPD_FOLDER", str(tmp_path))
    written = {
        "out": "${env:OPD_FOLDER}/run",
        "model": "${env:OPD_FOLDER}/model",
        "env": {"id": "a-${env:OPD_A}", "kwargs": {"rewards": [{"judge": {"key": "${env:OPD_A}"}}]}},
        "tracking": {"project": "${env:OPD_A}", "name": "x-${env:OPD_A}"},
        "rollout": {"chat_template_kwargs": {"a": ["${env:OPD_A}"]}},
        "opsd": {"privileged": "${env:OPD_A}"},
    }
    made = config(**written)
    assert made.out == f"{tmp_path}/run"
    assert made.model.name == f"{tmp_path}/model"
    assert made.tracking.name == "x-value-of-the-variable"
    assert made.rollout.chat_template_kwargs == {"a": ["value-of-the-variable"]}
    assert made.env.kwargs == {"rewards": [{"judge": {"key": "${env:OPD_A}"}}]}  # read where it is made
    write_config(made, tmp_path / "run")
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "value-of-the-variable" not in text
    assert text.count("${env:OPD_") == 8
    assert stat.S_IMODE((tmp_path / "run" / "config.yaml").stat().st_mode) == 0o666 & ~umask()
    again = config_from(read_settings(tmp_path / "run" / "config.yaml"), check_machine=False)
    assert again == made
    monkeypatch.setenv("OPD_A", "another-value-of-it")
    changed = config(**written)
    assert changed.fingerprint == made.fingerprint
    assert changed.differs_for_resume(made.shown()) == []


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_another_secret_is_no_other_setting_and_another_setting_is_one(tmp_path):
    def with_key(key, **sections):
        return config(env={"id": "opd/Lookup-v0", "kwargs": {"api_key": key, "url": f"http://u:{key}@h"}}, **sections)

    saved = with_key("the-first-key")
    assert saved.plain_secrets == ["env.kwargs.api_key", "env.kwargs.url"]
    assert saved.shown()["env"]["kwargs"] == {"api_key": "***", "url": "http://u:***@h"}
    assert with_key("the-second-key").differs_for_resume(saved.shown()) == []
    assert with_key("the-second-key").differs_for_resume(saved.dump()) == []  # as earlier versions saved it
    assert with_key("the-second-key", seed=1).differs_for_resume(saved.shown()) == ["seed"]
    assert with_key("the-second-key").fingerprint == saved.fingerprint
    (tmp_path / "config.yaml").write_text("of an earlier version, which others may read")
    write_config(saved, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert stat.S_IMODE((tmp_path / "config.yaml").stat().st_mode) == 0o600
    assert config_from(read_settings(tmp_path / "config.yaml"), check_machine=False) == saved.at(tmp_path)


def test_settings_are_printed_without_secrets(tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_text(
        yaml.safe_dump(BASE | {"env": {"id": "opd/Lookup-v0", "kwargs": {"password": PLAIN, "note": PLAIN}}})
    )
    assert main(["config", str(file)]) == 0
    said = capsys.readouterr().out
    assert PLAIN not in said
    assert yaml.safe_load(said)["env"]["kwargs"] == {"password": "***", "note": "***"}


def test_the_check_of_an_environment_shows_no_key(capfd, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("OPD_TEST_SOMETHING", BEHIND)
    monkeypatch.setenv("OPD_TEST_EXPECTED", f"{PLAIN} http://me:{BEHIND}@host")
    kwargs = f"{{api_key: {PLAIN}, endpoint: 'http://me:${{env:OPD_TEST_SOMETHING}}@host'}}"
    assert main(["envs", "check", "leaky_env:LeakyEnv", "--kwargs", kwargs]) == 1  # it breaks
    said = "".join(capfd.readouterr())
    assert "raised ConnectionError: GET https://host/v1?***" in said
    assert "*** http://me:***@host ***" in said  # in the episode that is shown
    assert not any(canary in said for canary in (PLAIN[:9], BEHIND, OWN, "hx%257"))
    monkeypatch.delenv("OPD_TEST_SOMETHING")
    assert main(["envs", "check", "leaky_env:LeakyEnv", "--kwargs", kwargs]) == 2
    assert "env.kwargs.endpoint: the environment variable OPD_TEST_SOMETHING is not set" in capfd.readouterr().err


def test_a_file_behind_a_variable_is_watched_and_written_down_by_its_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_FOLDER", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("a row\n")
    made = config(env={"id": "opd/Lookup-v0", "kwargs": {"path": "${env:OPD_FOLDER}/rows.jsonl"}})
    [taken] = [one for one in taken_by(made) if one.setting == "env.kwargs.path"]
    assert taken.origin.file == "${env:OPD_FOLDER}/rows.jsonl"
    assert taken.origin.address == "rows.jsonl"
    assert taken.origin.sha256 == sha256(b"a row\n").hexdigest()
