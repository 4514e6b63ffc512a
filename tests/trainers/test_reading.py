"""Reading samples without training on them: where it ends early."""

import pytest

from opd.errors import Interrupted
from opd.trainers.loop import reading


def test_the_scoring_by_a_teacher_is_left_between_two_micro_batches(monkeypatch):
    asked = []

    def batches(*_):
        for number in range(9):
            asked.append(number)
            yield [], [(), (), ()]

    monkeypatch.setattr(reading, "evaluate_in_batches", batches)
    with pytest.raises(Interrupted):
        reading.with_teacher_scores(None, [], stopping=lambda: len(asked) == 2)
    assert asked == [0, 1]
    assert reading.with_teacher_scores(None, []) == ([], {})
