"""`opd skills`: what it lists, what it refuses, and that a person's change keeps where a skill came from."""

import json

import pytest

from opd.launch.cli.main import main
from opd.trainers.skill_sd import file
from opd.trainers.skill_sd.bank import SkillBank
from opd.trainers.skill_sd.skill import Lesson, Source


@pytest.fixture
def run(tmp_path):
    """A run's folder with two skills."""
    bank = SkillBank(capacity=9, per_task=9, max_age=9)
    for n, text in enumerate(["look [red]twice[/]", "stop in time"]):
        task = f"train/{n}"
        source = Source(
            task=task,
            prompt=f"prompt {n}",
            episodes=(f"step-1/{task}/0",),
            step=1,
            policy_version=0,
            summariser="rules",
        )
        bank.add(Lesson(workflow=text, mistakes="hurry"), source, pdi=0.5)
    bank.add_trials("s00002", {"like": [0.25]})
    file.write(tmp_path / "data" / "skills.jsonl", bank.skills.values())
    return tmp_path


def skills(run):
    return {skill.id: skill for skill in file.read(run / "data" / "skills.jsonl")}


def test_the_list_begins_with_what_lifts_most_and_takes_nothing_for_markup(run, capsys):
    assert main(["skills", "list", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.index("s00002") < out.index("s00001")
    assert "[red]twice[/]" in out
    assert "2 skills, 1 tried" in out


def test_one_skill_is_shown_with_where_it_comes_from(run, capsys):
    assert main(["skills", "show", str(run), "s00002"]) == 0
    out = capsys.readouterr().out
    for part in (
        "stop in time",
        "Avoid: hurry",
        "tasks: train/1; episodes: step-1/train/1/0",
        "made by rules",
        "+0.250",
    ):
        assert part in out


def test_an_edit_is_a_new_version_with_its_provenance(run, capsys):
    before = skills(run)["s00001"]
    assert main(["skills", "edit", str(run), "s00001", "--workflow", "look three times"]) == 0
    assert "s00001 is now version 2" in capsys.readouterr().out
    after = skills(run)["s00001"]
    assert (after.lesson, after.source) == (Lesson(workflow="look three times", mistakes="hurry"), before.source)
    assert after.edited
    assert after.history == (before.lesson.text,)
    assert skills(run)["s00002"].version == 1


def test_an_editor_may_change_all_parts(run, monkeypatch):
    monkeypatch.setenv("EDITOR", "sed -i s/stop/pause/")
    monkeypatch.delenv("VISUAL", raising=False)
    assert main(["skills", "edit", str(run), "s00002"]) == 0
    assert skills(run)["s00002"].lesson.workflow == "pause in time"


MISTAKES = {
    "no such skill": (["show", "{run}", "s9"], "there is no skill 's9'; there are 2: s00001, s00002"),
    "no run": (["list", "{run}/nowhere"], "holds no skills"),
    "another ending": (["export", "{run}", "--to", "{run}/x.txt"], "must end in .jsonl or .md"),
    "retired with a text": (["edit", "{run}", "s00001", "--retire", "--success", "x"], "--retire takes no new text"),
    "no text left": (["edit", "{run}", "s00001", "--workflow", "", "--mistakes", ""], "retire it instead"),
    "no editor": (["edit", "{run}", "s00001"], "set $EDITOR, or give --workflow TEXT, --success TEXT"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_mend_and_changes_nothing(run, mistake, capsys, monkeypatch):
    monkeypatch.delenv("EDITOR", raising=False)
    monkeypatch.delenv("VISUAL", raising=False)
    before = skills(run)
    arguments, message = MISTAKES[mistake]
    assert main(["skills", *(argument.format(run=run) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert skills(run) == before


def test_an_editor_that_leaves_nonsense_changes_nothing(run, monkeypatch, capsys):
    before = skills(run)
    monkeypatch.setenv("VISUAL", "sed -i s/workflow/wokflow/")
    assert main(["skills", "edit", str(run), "s00001"]) == 2
    assert "it needs workflow, success, mistakes, each a text; nothing was changed" in capsys.readouterr().err
    assert skills(run) == before


@pytest.mark.parametrize(
    ("editor", "why"),
    [
        ("/nonexistent", "No such file or directory"),
        ("false", "returned non-zero exit status 1"),
        ('vi "', "No closing quotation"),
        ("rm", "what the editor left is no skill"),
        ("  ", "set $EDITOR"),
    ],
)
def test_an_editor_that_fails_is_named_and_changes_nothing(run, monkeypatch, capsys, editor, why):
    before = skills(run)
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", editor)
    assert main(["skills", "edit", str(run), "s00001"]) == 2
    assert why in capsys.readouterr().err
    assert skills(run) == before


def test_a_change_that_changes_nothing_is_no_new_version(run, monkeypatch, capsys):
    monkeypatch.setenv("VISUAL", "true")
    for arguments in ([], ["--mistakes", "hurry"]):
        assert main(["skills", "edit", str(run), "s00001", *arguments]) == 2
        assert "s00001 says this already; nothing was changed, it is still version 1" in capsys.readouterr().err
    assert main(["skills", "edit", str(run), "s00001", "--retire"]) == 0
    assert main(["skills", "edit", str(run), "s00001", "--retire"]) == 2
    assert "s00001 is retired already; nothing was changed, it is still version 2" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["md", "jsonl"])
def test_the_folder_of_an_export_is_made_and_where_that_cannot_be_it_is_said(run, capsys, suffix):
    assert main(["skills", "export", str(run), "--to", str(run / "new" / "deep" / f"x.{suffix}")]) == 0
    assert (run / "new" / "deep" / f"x.{suffix}").read_text()
    (run / "a file").touch()
    assert main(["skills", "export", str(run), "--to", str(run / "a file" / f"x.{suffix}")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(("trials", "count"), [(0, 2), (16, 1)])
@pytest.mark.parametrize("target", ["", "data/skills.jsonl"])
def test_what_is_usable_is_what_the_run_may_show(run, capsys, trials, count, target):
    (run / "config.yaml").write_text(f"method: skill_sd\nskill_sd: {{skills: {{trials: {trials}}}}}\n")
    assert main(["skills", "export", str(run / target), "--to", str(run / "good.md"), "--usable"]) == 0
    assert f"{count} skills in" in capsys.readouterr().out


def test_what_the_run_changed_meanwhile_is_not_overwritten(run, monkeypatch, tmp_path, capsys):
    path = run / "data" / "skills.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["version"] = 5
    (tmp_path / "newer").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "editor.sh").write_text(f"sed -i s/twice/thrice/ $1\ncp {tmp_path / 'newer'} {path}\n")
    monkeypatch.setenv("VISUAL", f"sh {tmp_path / 'editor.sh'}")
    assert main(["skills", "edit", str(run), "s00001"]) == 2
    assert "was changed by the run meanwhile" in capsys.readouterr().err
    assert skills(run)["s00001"].version == 5


def test_a_retired_skill_stays_in_the_file_and_out_of_what_is_usable(run, capsys):
    assert main(["skills", "edit", str(run), "s00002", "--retire"]) == 0
    assert skills(run)["s00002"].retired
    assert main(["skills", "export", str(run), "--to", str(run / "all.jsonl")]) == 0
    assert "2 skills in" in capsys.readouterr().out
    assert main(["skills", "export", str(run / "all.jsonl"), "--to", str(run / "good.md"), "--usable"]) == 0
    assert "0 skills in" in capsys.readouterr().out
    assert file.read(run / "all.jsonl") == list(skills(run).values())
