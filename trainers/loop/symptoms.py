"""What a run's rows show when it does not learn as it should: each symptom with the setting to look at.

While a run goes on a symptom is told once it has stayed for a few steps (`opd.trainers.loop.health`), and at its end
the rows are read once more (`remarks`). All of it follows from rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from opd.types import End, Fault

Row = Mapping[str, float]
_MOST = 0.5
"""The share of completions, turns or episodes from which on something is wrong with them."""
_FAILED = 0.2
"""The share of attempts at episodes that may fail before it is told."""
_AGREES = 1e-4
"""Nats a token: a teacher that is closer to the student than this says nothing that float32 could tell from noise."""
_SOLVED = 0.9
"""A student that solves so much may well agree with its teacher, or get the same rewards for all."""
_LIMITS = {
    End.MAX_TURNS: "by env.max_turns",
    End.CONTEXT_FULL: "by rollout.max_length",
    End.TIME: "by rollout.episode_timeout",
}
_MENDS = {
    Fault.TIMEOUT: "rollout.reset_timeout and rollout.step_timeout bound it; rollout.workers says how many run at once",
    Fault.CONNECTION: "is its server up, and does it take rollout.concurrency sessions at once?",
    Fault.DIED: "its process was killed or crashed: memory for rollout.concurrency of them?",
    Fault.RAISED: "see `opd envs check ID`, and `failed` in rollouts.jsonl",
    Fault.INVALID: "see `opd envs check ID`, and `failed` in rollouts.jsonl",
}


@dataclass(frozen=True, slots=True)
class Symptom:
    """Something that a step's row can show."""

    name: str
    says: Callable[[Row], str | None]
    """Says it in words, with the setting to look at; None where the row does not show it."""


def _cut(row: Row) -> str | None:
    share = row.get("rollout/cut_completions", 0.0)
    if share < _MOST:
        return None
    full = row.get(f"end/{End.CONTEXT_CUT}", 0.0) > row.get(f"end/{End.COMPLETION_CUT}", 0.0)
    name = "rollout.max_length" if full else "rollout.max_tokens"
    return f"{share:.0%} of the completions are cut before their end; raise {name}"


def _unreadable(row: Row) -> str | None:
    share = row.get("rollout/unreadable", 0.0)
    if share < _MOST or _cut(row):  # what was cut cannot be read either
        return None
    return (
        f"{share:.0%} of the turns hold no call (or move) that the environment can read; see rollouts.jsonl for what "
        "the model says, `opd check` for the form that it is asked for; it may need a start from examples first"
    )


def _truncated(row: Row) -> str | None:
    by = {end: row.get(f"end/{end}", 0.0) for end in _LIMITS}
    if sum(by.values()) < _MOST:
        return None
    most = max(by, key=by.__getitem__)
    return f"{sum(by.values()):.0%} of the episodes are ended by a limit before they are over, most {_LIMITS[most]}"


def _agrees(row: Row) -> str | None:
    nats = row.get("distill/nats")
    if nats is None or not abs(nats) < _AGREES or row.get("reward/success", 0.0) >= _SOLVED:
        return None
    return (
        f"the teacher agrees with the student ({nats:.1e} nats a token), so that nothing is taught; is it shown what "
        "helps (`opd train FILE --dry-run` shows what it reads), or is it the same model without more to read?"
    )


def _failures(row: Row) -> str | None:
    counts = {fault: row.get(f"failures/{fault}", 0.0) for fault in Fault}
    attempts = row.get("rollout/episodes", 0.0) + row.get("rollout/retried", 0.0)
    if not attempts or sum(counts.values()) < _FAILED * attempts:
        return None
    most = max(counts, key=counts.__getitem__)
    share = sum(counts.values()) / attempts
    return f"the environment fails in {share:.0%} of its episodes, most by {most}: {_MENDS[most]}"


def _abstains(row: Row) -> str | None:
    prefix = "reward/abstained/"
    silent = [
        key.removeprefix(prefix)
        for key, count in row.items()
        if key.startswith(prefix) and f"reward/part/{key.removeprefix(prefix)}" not in row and count
    ]
    return f"the reward {silent[0]} had no score for any episode; does it find what it looks for?" if silent else None


SYMPTOMS = (
    Symptom("cut", _cut),
    Symptom("unreadable", _unreadable),
    Symptom("truncated", _truncated),
    Symptom("agrees", _agrees),
    Symptom("failures", _failures),
    Symptom("abstains", _abstains),
)


def remarks(rows: Sequence[Row]) -> list[str]:
    """Return, of a finished run's rows, a sentence for each symptom that most of its last quarter shows, or most of it.

    The sentence is that of the last row that shows it, with the number of such steps.
    """
    trained = [row for row in rows if "rollout/episodes" in row or "distill/nats" in row]
    last = trained[-max(1, len(trained) // 4) :] if trained else []
    found = []
    for symptom in SYMPTOMS:
        said = [text for row in trained if (text := symptom.says(row))]
        of_last = sum(symptom.says(row) is not None for row in last)
        if said and (2 * len(said) > len(trained) or 2 * of_last > len(last)):
            found.append(f"in {len(said)} of {len(trained)} steps: {said[-1]}")
    return found
