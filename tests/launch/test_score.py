"""How a score reads. Its numbers are those of `opd.tracking.intervals`, tested in tests/opd/test_intervals.py."""

from pathlib import Path

from opd.launch.run.runner import RunResult
from opd.launch.run.score import Score

GOOD = Score((True,) * 293 + (False,) * 7)


def test_a_score_is_printed_as_a_person_would_say_it():
    said = "293 of 300 held-out tasks solved, which is 97.7% (95% interval: 95.3% to 98.9%)"
    assert str(GOOD) == said
    assert GOOD.short == "97.7% (95 to 99)"
    broken = Score((*GOOD.outcomes, None, None))
    assert str(broken) == f"{said}; 2 more not measured, their environment broke"
    nothing = Score((None, None))
    assert (str(nothing), nothing.short) == (
        "not measured: the environment broke in all of 2 episodes",
        "not measured",
    )


def test_a_result_is_printed_without_the_outcome_of_every_task():
    result = RunResult(out=Path("runs/a"), steps=3, before=None, after=GOOD)
    assert "after=<Score: 293 of 300 held-out tasks solved" in str(result)
    assert "True" not in str(result)
