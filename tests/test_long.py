"""The parts of `make long`: what they cover, what is kept of them, and that a stop in the middle costs one part."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("one", "two")
TESTS = """
import pytest

@pytest.mark.parametrize("n", range(3))
def test_good(n):
    pass

def test_skipped():
    pytest.skip("not here")
"""


def script():
    spec = importlib.util.spec_from_file_location("ci_long", ROOT / ".ci" / "long.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def long(monkeypatch, tmp_path):
    """The script, in a repository of its own with two parts; `long.call(*arguments)` is its exit code."""
    module = script()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results" / "long")
    options = ("-q", "-p", "no:cacheprovider")
    monkeypatch.setattr(module, "PARTS", {name: module.Part("a part", (*options, f"test_{name}.py")) for name in PARTS})
    for name in PARTS:
        (tmp_path / f"test_{name}.py").write_text(TESTS)
    (tmp_path / ".gitignore").write_text("__pycache__\n")
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["long.py", *arguments])
        return module.main()

    module.call = call
    return module


def git(folder, *arguments):
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder):
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "--message", "x")


def kept(long, name):
    return json.loads((long.RESULTS / f"{name}.json").read_text())


def test_a_result_says_what_ran_where_and_what_came_out(long, capsys):
    assert long.call("one") == 0
    found = kept(long, "one")
    assert (found["passed"], found["failed"], found["skipped"], found["exit_code"]) == (3, 0, 1, 0)
    assert found["commit"] == long.code()
    assert found["command"] == "python -m pytest -q -p no:cacheprovider test_one.py"
    assert {"cores", "vectors", "python", "torch", "transformers"} <= found["machine"].keys()
    assert sorted(found["slowest"]) == [*(f"test_one::test_good[{n}]" for n in range(3)), "test_one::test_skipped"]
    assert not (long.RESULTS / "two.json").exists()


def test_only_what_has_no_result_for_this_code_is_run(long, tmp_path, monkeypatch):
    ran, run = [], long.run
    monkeypatch.setattr(long, "run", lambda name, *rest: ran.append(name) or run(name, *rest))
    assert long.call("one") == 0
    commit(tmp_path)  # of a result alone
    assert long.call() == 0
    assert ran == ["one", "two"]
    assert long.call() == 0
    assert ran == ["one", "two"]
    assert long.call("two") == 0
    assert ran == ["one", "two", "two"]
    (tmp_path / "test_one.py").write_text(TESTS + "\n# other code\n")
    assert long.call() == 0
    assert ran == ["one", "two", "two", "one", "two"]
    commit(tmp_path)
    (tmp_path / "new.py").touch()
    assert long.call() == 0
    assert len(ran) == 7


def test_a_failure_is_told_at_the_end_and_by_the_exit_code_as_long_as_it_stands(long, tmp_path, capsys):
    (tmp_path / "test_one.py").write_text("def test_bad():\n    assert False\n")
    assert long.call() == 1
    assert long.call() == 1
    rows = {line.split()[0]: line.split()[2:] for line in capsys.readouterr().out.splitlines() if line[:3] in PARTS}
    assert rows == {"one": ["0", "1", "0", "FAILED"], "two": ["3", "0", "1"]}
    (tmp_path / "test_one.py").write_text(TESTS)
    assert long.call() == 0


def test_a_part_that_cannot_even_be_collected_is_a_failure(long, tmp_path):
    (tmp_path / "test_one.py").write_text("import nothing_of_that_name\n")
    assert long.call("one") == 1
    assert kept(long, "one")["failed"] == 1


def test_a_part_that_is_stopped_has_no_result_and_is_run_again(long, tmp_path):
    (tmp_path / "test_one.py").write_text(
        "import os, signal\ndef test_it():\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert long.call() == 1
    assert list(tmp_path.glob("results/long/*")) == []
    (tmp_path / "test_one.py").write_text(TESTS)
    assert long.call() == 0
    assert sorted(path.stem for path in long.RESULTS.iterdir()) == ["one", "two"]


def test_an_unknown_part_is_refused_with_those_that_exist(long, capsys):
    with pytest.raises(SystemExit):
        long.call("three")
    assert "part 'three' is unknown. Allowed: one, two" in capsys.readouterr().err


def test_the_parts_cover_every_test_that_is_long_and_the_readme_names_them():
    parts = script().PARTS
    covered = []
    for part in parts.values():
        if "long" in part.arguments:
            inside = {ROOT / a for a in part.arguments if a.startswith("tests")}
            outside = {ROOT / a.removeprefix("--ignore=") for a in part.arguments if a.startswith("--ignore=")}
            covered += [
                file
                for file in (ROOT / "tests").rglob("test_*.py")
                if inside & {file, *file.parents} and not outside & {file, *file.parents}
            ]
    assert sorted(covered) == sorted((ROOT / "tests").rglob("test_*.py"))  # each once
    for name in parts:
        assert f"\n| `{name}` |" in (ROOT / "results" / "long" / "README.md").read_text()
