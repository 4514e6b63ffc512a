"""Files of tasks and of conversations that were hurt at random are read, or refused in a message that a person can use.

They go through what a run reads them with: the environment of a table, each of whose tasks begins, and the reader of
`sft`. That what is read is right is told by `tests/opd/test_rows.py` and the tests of both readers.
"""

import json
import time
from collections import Counter

import pytest

from opd.envs import make
from opd.errors import ConfigError, DataError, OpdError
from opd.trainers.parts.conversations import check_conversations, read_conversations
from tests.mutants import FILES, SUMS, TALKS, mutant, well_formed

FEW, MANY, AT_ONCE = 60, 2_000, 100
SECONDS = 15  # 5, on a machine three times slower


def read(file, path, chat):
    """Read a file as a run does; return how many tasks or conversations it has."""
    if file.kind == "chat":
        found = read_conversations(path, chat)
        try:
            check_conversations(path)
        except OpdError as error:
            raise AssertionError("the check before a model is loaded refuses what the run reads") from error
        return len(found)
    env = make(
        "opd/Dataset-v0",
        {"path": str(path), "rewards": ["exact_match"], "privileged_columns": {"solution": "proof"}},
    )
    tasks = env.get_wrapper_attr("metadata")["tasks"]
    for split, count in tasks.items():
        for index in range(count):
            env.reset(seed=0, options={"split": split, "index": index})
    env.close()
    return sum(tasks.values())


def problem_of(file, path, chat):
    """Say what is wrong with how a file was taken; None where it was read, or refused as it should be."""
    path.write_bytes(file.data)
    since, outcome = time.monotonic(), "read"
    try:
        read(file, path, chat)
    except (ConfigError, DataError) as error:
        outcome, text = "refused", str(error)
        if str(path) not in text or len(text.splitlines()) > 20 or len(text) > 1_500:
            return outcome, f"message: {text:.300}"
    except BaseException as error:
        return "raised", f"{type(error).__name__}: {error}"[:300]
    took = time.monotonic() - since
    return outcome, f"took {took:.1f} s" if took > SECONDS else None


def check(numbers, folder, chat):
    """Return how many mutants were read, and how many refused. Fails with those that were taken wrongly."""
    counts, wrong = Counter(), []
    for number in numbers:
        file = mutant(number)
        outcome, problem = problem_of(file, folder / f"{number}{file.suffix}", chat)
        counts[outcome] += 1
        if problem:
            wrong.append(f"{number} ({file.suffix}, {file.kind}, {file.harm}): {problem}")
    assert wrong == []
    return counts


def test_a_file_that_was_not_hurt_is_read(tmp_path, make_chat):
    for place, (suffix, kind, rows) in enumerate(FILES):
        path = tmp_path / f"{place}{suffix}"
        path.write_bytes(well_formed(place).data)
        assert read(well_formed(place), path, make_chat()) == len(rows), (suffix, kind)
    assert len(SUMS) > len(TALKS) > 0


def test_a_file_that_was_hurt_is_read_or_refused_by_name(tmp_path, make_chat):
    counts = check(range(FEW), tmp_path, make_chat())
    assert min(counts["read"], counts["refused"]) > FEW / 10  # else the mutants are too tame, or too wild


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, MANY, AT_ONCE))
def test_many_files_that_were_hurt_are_read_or_refused_by_name(tmp_path, make_chat, first):
    counts = check(range(first, first + AT_ONCE), tmp_path, make_chat())
    assert min(counts["read"], counts["refused"]) > AT_ONCE / 10
    print(json.dumps(counts))
