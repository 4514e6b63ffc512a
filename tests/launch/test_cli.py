"""The `opd` command, in this process and in a real one; training itself is replaced."""

import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import opd
from opd.errors import ModelError
from opd.launch.checks.loading import load_config
from opd.launch.cli.main import main
from opd.launch.run.out import Resume, choose_out, remove_run, write_config
from opd.launch.settings.config import Config, all_settings
from opd.launch.settings.reader import holds_run
from opd.trainers.loop.registry import methods

GOOD = "method: opsd\nmodel: tiny:lookup\nenv: opd/Lookup-v0\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(GOOD)
    return tmp_path


@pytest.fixture
def trained(monkeypatch):
    """What the command hands to training, call by call; the folder is prepared as by training itself."""
    calls = []

    def train(config: Config, *, resume: Resume = False, overwrite: bool = False) -> types.SimpleNamespace:
        calls.append((config, resume))
        folder = choose_out(config, resume=resume, overwrite=overwrite)
        if overwrite:
            remove_run(folder)
        write_config(config, folder)
        stopped = config.train.steps == 13
        return types.SimpleNamespace(steps=config.train.steps, interrupted=stopped, exit_code=143 if stopped else 0)

    monkeypatch.setitem(sys.modules, "opd.launch.run.training", types.SimpleNamespace(train=train))
    return calls


@pytest.mark.parametrize(
    "command",
    [[], ["train"], ["eval"], ["demo"], ["envs"], ["methods"], ["config"], ["precompute"], ["store"], ["skills"]],
)
def test_help_is_short_and_every_command_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) <= 26
    assert (f"example: opd {command[0]}" if command else "opd demo") in said


def test_without_a_command_help_is_shown_and_the_exit_code_is_that_of_a_mistake(capsys):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"opd {opd.__version__}\n"


def test_train_hands_over_the_settings_of_file_and_command_line(trained, capsys):
    assert main(["train", "run.yaml", "--steps", "3", "--out", "here", "--train.lr=1e-4", "--model.lora.r", "8"]) == 0
    [(config, resume)] = trained
    assert (config.train.steps, config.out, config.train.lr, config.model.lora.r) == (3, "here", 1e-4, 8)
    assert resume is False
    assert "at most 65,536 sampled tokens" in capsys.readouterr().out.replace("\n", " ")


def test_an_out_that_looks_like_a_number_stays_a_name(trained):
    assert main(["train", "run.yaml", "--out", "007"]) == 0
    assert holds_run(Path("007"))


def test_a_quiet_run_prints_no_plan(trained, capsys):
    assert main(["train", "run.yaml", "--tracking.console", "false"]) == 0
    assert capsys.readouterr().out == ""


def test_a_dry_run_prints_the_plan_and_touches_nothing(trained, here, capsys):
    assert main(["train", "run.yaml", "--dry-run", "--train.tasks_per_step", "5"]) == 0
    said = capsys.readouterr().out
    assert "5 tasks x 1 = 5 episodes" in said
    assert "runs/opsd-lookup-tiny/" in said
    assert trained == []
    assert [path.name for path in here.iterdir()] == ["run.yaml"]


def test_a_second_run_into_the_same_folder_is_refused_resumed_or_starts_over(trained, capsys):
    command = ["train", "run.yaml", "--out", "mine"]
    assert main(command) == 0
    Path("mine/metrics.jsonl").write_text("{}")
    assert main(command) == 2
    assert "error: out = 'mine' already holds a run. Go on with it (--resume)" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert trained[-1][1] is True
    assert Path("mine/metrics.jsonl").is_file()
    assert main([*command, "--overwrite", "--dry-run"]) == 0
    assert Path("mine/metrics.jsonl").is_file()
    assert main([*command, "--overwrite"]) == 0
    assert not Path("mine/metrics.jsonl").exists()
    assert len(trained) == 3


def test_a_run_is_resumed_by_its_folder_alone(trained):
    assert main(["train", "run.yaml", "--out", "mine", "--seed", "5"]) == 0
    Path("mine").rename("moved")
    assert main(["train", "moved", "--resume"]) == 0
    config, resume = trained[-1]
    assert (config.out, config.seed, resume) == ("moved", 5, True)


def test_a_run_that_was_stopped_says_how_to_go_on(trained, capsys):
    assert main(["train", "run.yaml", "--out", "mine", "--steps", "13"]) == 143
    assert capsys.readouterr().err == "stopped after step 13; go on with: opd train mine --resume\n"


def test_a_mistake_is_a_line_without_a_traceback(trained, capsys):
    assert main(["train", "run.yaml", "--steps", "many", "--rollout.top_p", "2"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert sorted(said.err.splitlines()) == [
        "error: command line: rollout.top_p = 2 is not allowed. Allowed: a number above 0 and at most 1.",
        'error: command line: train.steps = "many" is not allowed. Allowed: a whole number of at least 1.',
    ]
    assert trained == []


def test_a_setting_given_by_two_names_is_refused(capsys):
    assert main(["train", "run.yaml", "--steps", "3", "--train.steps", "4"]) == 2
    assert capsys.readouterr().err == "error: command line: train.steps is given twice: 4 and 3. Give one.\n"


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [(ModelError("no\nmodel"), 2, "error: no\nerror: model\n"), (KeyboardInterrupt(), 130, "interrupted\n")],
)
def test_what_ends_a_run_early_is_said_without_a_traceback(monkeypatch, capsys, raised, code, said):
    def train(*_, **__):
        raise raised

    monkeypatch.setitem(sys.modules, "opd.launch.run.training", types.SimpleNamespace(train=train))
    assert main(["train", "run.yaml"]) == code
    assert capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback(monkeypatch):
    def train(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setitem(sys.modules, "opd.launch.run.training", types.SimpleNamespace(train=train))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["train", "run.yaml"])


def test_eval_takes_a_run_or_a_file(monkeypatch, trained, capsys):
    calls = []

    def evaluate_run(config: Config, *, run: Path | None) -> types.SimpleNamespace:
        calls.append((config.eval.tasks, run))
        return types.SimpleNamespace(played=config.eval.tasks if config.eval.tasks < 50 else 0)

    monkeypatch.setitem(sys.modules, "opd.launch.run.evaluate", types.SimpleNamespace(evaluate_run=evaluate_run))
    assert main(["eval", "run.yaml", "--tasks", "30"]) == 0
    assert main(["train", "run.yaml", "--out", "mine"]) == 0
    assert main(["eval", "mine", "--eval.tasks", "40"]) == 0
    assert calls == [(30, None), (40, Path("mine"))]
    assert main(["eval", "mine", "--eval.tasks", "50"]) == 1  # nothing was measured
    assert main(["eval", "mine"]) == 2
    assert "mine: eval.tasks = 0, so there is nothing to evaluate. Give --tasks N." in capsys.readouterr().err


def test_demo_takes_seeds_and_a_folder(monkeypatch, capsys):
    calls = []
    monkeypatch.setitem(
        sys.modules, "opd.launch.cli.demo", types.SimpleNamespace(demo=lambda *, seeds, out: calls.append((seeds, out)))
    )
    assert main(["demo"]) == 0
    assert main(["demo", "--seeds", "3", "--out", "d"]) == 0
    assert calls == [(1, Path("runs/demo")), (3, Path("d"))]
    with pytest.raises(SystemExit) as end:
        main(["demo", "--seeds", "0"])
    assert end.value.code == 2
    assert "'0' is not a whole number of at least 1" in capsys.readouterr().err


def test_environments_are_listed(capsys):
    for command in (["envs"], ["envs", "list"]):
        assert main(command) == 0
        assert "opd/Lookup-v0" in capsys.readouterr().out.splitlines()


def test_an_environment_is_checked(capsys):
    assert main(["envs", "check", "opd/Lookup-v0"]) == 0
    assert capsys.readouterr().out.endswith("opd/Lookup-v0 keeps the contract of an environment\n")
    assert main(["envs", "check", "opd/Lokup-v0"]) == 2


def test_an_environment_is_checked_with_arguments_of_its_constructor(capsys):
    assert main(["envs", "check", "opd/Arithmetic-v0", "--kwargs", "{digits: 0}"]) == 2
    assert "digits = 0 must be at least 1" in capsys.readouterr().err
    assert main(["envs", "check", "opd/Arithmetic-v0", "--kwargs", "digits"]) == 2
    assert "--kwargs: 'digits' must be settings" in capsys.readouterr().err


def test_the_libraries_whose_environments_can_be_named_are_listed(capsys):
    assert main(["envs"]) == 0
    assert "gymnasium:NAME" in capsys.readouterr().out


def test_an_environment_that_breaks_its_contract_fails(monkeypatch, capsys):
    from opd.envs import Finding, checker_process

    broken = checker_process.Report([Finding("error", "reset returns nothing")], ["  user | Hello."])
    monkeypatch.setattr(checker_process, "check_within", lambda *_, time_limit: broken)
    assert main(["envs", "check", "opd/Lookup-v0", "--time-limit", "5"]) == 1
    assert capsys.readouterr().out.startswith("  user | Hello.\nerror: reset returns nothing\n")


def test_every_method_is_listed_with_what_it_is(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(methods())
    assert all(len(line.split()) > 3 for line in lines)


def test_config_prints_settings_that_load_as_the_same(capsys):
    assert main(["config", "run.yaml", "--train.lr", "1e-4"]) == 0
    Path("resolved.yaml").write_text(capsys.readouterr().out)
    assert load_config("resolved.yaml") == load_config("run.yaml", {"train.lr": 1e-4})


def test_config_explains_one_setting_a_section_or_all(capsys):
    assert main(["config", "--explain", "opsd.teacher.weights"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        'opsd.teacher.weights = "frozen"',
        "    allowed: live, frozen, ema, synced, trust_region, external",
    ]
    assert main(["config", "--explain", "rollout"]) == 0
    assert "rollout.top_k = 0" in capsys.readouterr().out
    assert main(["config", "--explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(not line.startswith(" ") for line in lines) == len(all_settings())
    assert main(["config", "--explain", "rollout.topk"]) == 2
    assert 'rollout.topk is unknown. Did you mean "rollout.top_k"?' in capsys.readouterr().err
    assert main(["config", "--explain", "opd.trainers.opsd:Opsd.teacher.rate"]) == 0
    assert capsys.readouterr().out.startswith("opsd.teacher.rate = null")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "takes a FILE, or --explain KEY"), (["nowhere.yaml", "--explain", "seed"], "nowhere.yaml")],
)
def test_config_needs_something_to_print(arguments, message, capsys):
    assert main(["config", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_misspelt_command_is_a_mistake(capsys):
    with pytest.raises(SystemExit) as end:
        main(["trian", "run.yaml"])
    assert end.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def in_a_new_process(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "opd.launch.cli", *arguments], capture_output=True, text=True, check=False, **options
    )


def test_the_command_answers_in_well_under_a_second():
    in_a_new_process("--version")  # compiles what was never imported before
    since = time.perf_counter()
    done = in_a_new_process("--version")
    assert done.returncode == 0
    assert time.perf_counter() - since < 1.0


def test_asking_for_help_imports_neither_torch_nor_numpy():
    program = (
        "import sys\nfrom opd.launch.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_a_mistake_in_a_real_process_is_two_on_stderr_alone(here):
    (here / "bad.yaml").write_text(GOOD + "sed: 1")
    done = in_a_new_process("train", "bad.yaml", cwd=here)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith('error: bad.yaml: sed is unknown. Did you mean "seed"?')


def test_a_reader_that_leaves_early_is_no_error(here):
    command = f"{sys.executable} -m opd.launch.cli config --explain | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith("method (required)")
    assert done.returncode == 0


def test_a_plan_for_many_ranks_is_refused_where_the_backend_is_one_process(capsys):
    assert main(["train", "run.yaml", "--dry-run", "--ranks", "4"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: --ranks 4 plans for so many processes, and backend = local is one. Leave it out, or give --backend"
    )
    assert main(["train", "run.yaml", "--dry-run", "--ranks", "1"]) == 0


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({}, "error: RANK = 0, WORLD_SIZE = 2, but no LOCAL_RANK, MASTER_ADDR, MASTER_PORT: a launcher sets all"),
        (
            {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"},
            "error: backend = local is one process, but a launcher started 2",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "precompute"])
def test_processes_that_cannot_train_together_are_told_so_before_they_wait(monkeypatch, capsys, told, message, command):
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"WORLD_SIZE": "2", "RANK": "0"} | told).items():
        monkeypatch.setenv(name, value)
    assert main([command, "run.yaml"]) == 2
    assert capsys.readouterr().err.startswith(message)
