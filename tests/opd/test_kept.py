"""What is worked out of the texts of a conversation is kept for its next turn, and not for the rest of the run."""

import tracemalloc

from opd.models.encoding import Guard
from opd.models.kept import KeptByText


def test_what_was_worked_out_is_kept_until_later_texts_take_its_room():
    asked = []
    kept = KeptByText(lambda text, n=0: asked.append(text) or (text.upper(), n), most=2000)
    assert kept("a" * 300) == kept("a" * 300) == ("A" * 300, 0)
    assert kept("b" * 300, 1) == ("B" * 300, 1)
    assert asked == ["a" * 300, "b" * 300]
    kept("a" * 300)  # asked for last
    kept("c" * 300)
    kept("a" * 300)
    assert len(asked) == 3
    kept("b" * 300, 1)
    assert len(asked) == 4


def test_the_same_text_with_other_things_beside_it_is_another():
    kept = KeptByText(lambda text, names: (text, names))
    assert kept("x", ("a",)) != kept("x", ("b",))


def test_a_text_larger_than_all_room_is_worked_out_and_not_kept():
    kept = KeptByText(len, most=10)
    assert kept("x" * 100) == kept("x" * 100) == 100
    assert not kept._kept


def test_large_results_of_tools_do_not_stay_in_memory():
    """2,000 results of 100 kB: an earlier cache, of 4,096 texts of any size, held all 200 MB of them, twice."""
    guard = Guard(["<|im_end|>"])
    tracemalloc.start()
    for number in range(2000):
        guard.guard(f"{number} <|im_end|>" + "x" * 100_000)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 60e6
