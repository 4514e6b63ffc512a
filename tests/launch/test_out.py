"""Where a run's files go, and what may happen to a folder that exists."""

from pathlib import Path

import pytest

from opd.errors import ConfigError
from opd.launch.checks.loading import config_from, load_config
from opd.launch.run.out import choose, choose_out, default_name, remove_run, write_config
from opd.launch.settings.config import Config
from opd.launch.settings.reader import holds_run

SETTINGS = {"method": "opsd", "model": "tiny:lookup", "env": "opd/Lookup-v0"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_in(folder: Path) -> Path:
    return write_config(config(), folder)


def config(**settings: str) -> Config:
    return config_from({**SETTINGS, **settings}, check_machine=False)


def prepared(settings: Config) -> Path:
    return write_config(settings, choose_out(settings))


def chosen(out: str | None, *, resume: bool = False, overwrite: bool = False) -> Path:
    return choose(out, "opsd-lookup-tiny", resume=resume, overwrite=overwrite)


@pytest.mark.parametrize(
    ("env", "model", "name"),
    [
        ("opd/Lookup-v0", "tiny:lookup", "opsd-lookup-tiny"),
        ("my_package.envs:MyEnv", "Qwen/Qwen3-0.6B", "opsd-myenv-qwen3-0.6b"),
        ("opd/Arithmetic-v12", "/models/My Model/", "opsd-arithmetic-my-model"),
        ("CartPole-v1", "./a.Q4_1.gguf", "opsd-cartpole-a.q4-1"),
        ("x", "..", "opsd-x-"),
    ],
)
def test_a_run_is_named_after_method_environment_and_model(env, model, name):
    assert default_name("opsd", env, model) == name


def test_without_a_name_a_new_run_never_meets_an_old_one():
    assert chosen(None) == Path("runs/opsd-lookup-tiny")
    run_in(Path("runs/opsd-lookup-tiny"))
    assert chosen(None) == Path("runs/opsd-lookup-tiny-2")
    run_in(Path("runs/opsd-lookup-tiny-2"))
    assert chosen(None) == Path("runs/opsd-lookup-tiny-3")


def test_without_a_name_the_newest_run_is_resumed():
    with pytest.raises(ConfigError, match="holds no run to resume; without --resume a new one starts there"):
        chosen(None, resume=True)
    run_in(Path("runs/opsd-lookup-tiny"))
    assert chosen(None, resume=True) == Path("runs/opsd-lookup-tiny")
    run_in(Path("runs/opsd-lookup-tiny-2"))
    assert chosen(None, resume=True) == Path("runs/opsd-lookup-tiny-2")


def test_a_folder_that_holds_a_run_is_neither_mixed_nor_lost():
    run_in(Path("mine"))
    with pytest.raises(ConfigError, match=r"'mine' already holds a run\. Go on with it \(--resume\), delete it"):
        chosen("mine")
    assert chosen("mine", resume=True) == chosen("mine", overwrite=True) == Path("mine")
    assert holds_run(Path("mine"))


def test_files_that_are_not_a_runs_are_left_alone():
    Path("mine").mkdir()
    assert chosen("mine") == Path("mine")
    Path("mine/config.yaml").write_text("model: a\n")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(ConfigError, match="'mine' holds files that are not a run's"):
            chosen("mine", **options)
    with pytest.raises(ConfigError, match="holds no run, so nothing there is deleted"):
        remove_run(Path("mine"))
    assert Path("mine/config.yaml").is_file()


def test_what_cannot_be_written_is_found_beforehand():
    Path("file").write_text("")
    with pytest.raises(ConfigError, match="out = 'file' is a file; name a folder"):
        chosen("file")
    with pytest.raises(ConfigError, match="out = 'file/run' cannot be written: 'file' is not a folder"):
        chosen("file/run")


def test_a_link_to_nothing_is_found_beforehand():
    Path("link").symlink_to("elsewhere")
    with pytest.raises(ConfigError, match=r"out = 'link' is a link to 'elsewhere', which does not exist"):
        chosen("link")


def test_a_folder_without_write_permission_is_found_beforehand(monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # whoever runs the tests may be allowed everything
    with pytest.raises(ConfigError, match=r"out = 'a/b' cannot be written: '\.' is not writable"):
        chosen("a/b")


@pytest.mark.parametrize(
    ("out", "resume", "message"),
    [
        ("mine", True, "--resume goes on with a run and --overwrite deletes"),
        (None, False, "so say which: --out DIR"),
    ],
)
def test_overwriting_needs_a_folder_and_no_resume(out, resume, message):
    with pytest.raises(ConfigError, match=message):
        chosen(out, resume=resume, overwrite=True)


def test_a_run_is_deleted_whole(here):
    run_in(Path("mine/run"))
    Path("mine/run/metrics.jsonl").write_text("")
    Path("mine/run/checkpoints/step-1").mkdir(parents=True)
    Path("mine/run/export").symlink_to(here)
    Path("mine/run/run.lock").write_text("")
    remove_run(Path("mine/run"))
    assert [path.name for path in Path("mine/run").iterdir()] == ["run.lock"]  # whoever deletes holds it
    assert here.is_dir()
    remove_run(Path("mine/run"))


def test_the_folder_in_which_one_stands_is_not_deleted(here, monkeypatch):
    (run_in(here / "mine") / "deeper").mkdir()
    monkeypatch.chdir(here / "mine" / "deeper")
    with pytest.raises(ConfigError, match="holds the current folder, so it is not deleted"):
        remove_run(here / "mine")


def test_a_prepared_folder_holds_settings_that_load_as_the_same_run():
    folder = prepared(config(out="mine"))
    assert folder == Path("mine")
    assert holds_run(folder)
    assert load_config(folder, check_machine=False) == config(out="mine")


def test_a_run_that_was_moved_is_found_where_it_is():
    prepared(config()).rename("moved")
    assert load_config("moved", check_machine=False).out == "moved"


def test_preparing_twice_without_a_name_makes_two_runs():
    assert [str(prepared(config())) for _ in range(2)] == ["runs/opsd-lookup-tiny", "runs/opsd-lookup-tiny-2"]
    assert str(choose_out(config(), resume=True)) == "runs/opsd-lookup-tiny-2"


def test_what_a_killed_run_left_of_its_settings_is_no_file_of_another(here):
    """It was killed while it wrote its settings for the first time."""
    folder = here / "new"
    folder.mkdir()
    (folder / ".config.yaml.partial").write_text("# Settings of an op")
    assert chosen("new") == Path("new")
    run_in(folder)
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_run_that_is_half_deleted_can_still_be_told_for_one(here, monkeypatch):
    folder = run_in(here / "mine")
    for name in ("a.jsonl", "z.jsonl"):
        (folder / name).touch()
    gone, real = [], Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **options: gone.append(path.name) or real(path, **options))
    remove_run(folder)
    assert gone[-1] == "config.yaml"
    assert len(gone) == 3
