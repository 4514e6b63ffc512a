"""Finds the best plan in a small Markov decision process, and puts it into words for a teacher.

gymnasium's toy-text environments publish theirs as `env.unwrapped.P[state][action]`, a list of
`(probability, next state, reward, terminated)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Process = Mapping[int, Mapping[int, Sequence[tuple[float, int, float, bool]]]]

_DISCOUNT = 0.99
_TOLERANCE = 1e-9
_LONGEST = 64
"""Most actions of a plan, or states of a policy, that are written out."""


def optimal_policy(process: Process) -> NDArray[np.int64]:
    """Find the best action of each state, by value iteration with a discount of 0.99: [states].

    Ties go to the first.
    """
    expected, transition = _arrays(process)
    values = np.zeros(len(process))
    while True:
        returns = expected + _DISCOUNT * transition @ values
        best = returns.max(axis=1)
        if np.abs(best - values).max() < _TOLERANCE:
            # The solver's own error must not break ties, or the plan would depend on the machine.
            return np.asarray((returns > best[:, None] - 1e-6).argmax(axis=1))
        values = best


def plan(
    process: Process, policy: NDArray[np.int64], start: int, actions: Sequence[str], place: Callable[[int], str]
) -> str | None:
    """Describe in words the way that a policy takes from a state.

    Where nothing is left to chance it is a list of actions, else the best action at each place that may be
    reached. None when it would be longer than 64 lines or never ends.
    """
    if (path := _certain_path(process, start, policy)) is not None:
        return f"The best plan: {', '.join(actions[a] for a in path)}." if path else None
    states = _reachable(process, start, policy)
    if len(states) > _LONGEST:
        return None
    return "\n".join(["The best action at each place:", *(f"{place(s)}: {actions[policy[s]]}" for s in states)])


def _arrays(process: Process) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the expected rewards [states, actions] and the transition probabilities [states, actions, states]."""
    expected = np.zeros((len(process), len(process[0])))
    transition = np.zeros((*expected.shape, len(process)))
    for state, outcomes_of in process.items():
        for action, outcomes in outcomes_of.items():
            for probability, after, reward, terminated in outcomes:
                expected[state, action] += probability * reward
                transition[state, action, after] += 0.0 if terminated else probability
    return expected, transition


def _certain_path(process: Process, start: int, policy: NDArray[np.int64]) -> list[int] | None:
    """Return the policy's actions up to the end. None: chance has a say. Empty: the path is too long or has no end."""
    path: list[int] = []
    state, terminated = start, False
    while not terminated:
        outcomes = process[state][int(policy[state])]
        if len({after for probability, after, _, _ in outcomes if probability > 0}) > 1:
            return None
        if len(path) == _LONGEST:
            return []
        path.append(int(policy[state]))
        _, state, _, terminated = outcomes[0]
    return path


def _reachable(process: Process, start: int, policy: NDArray[np.int64]) -> list[int]:
    """List the states in which the policy may have to act, in their own order."""
    seen, new = {start}, [start]
    while new:
        state = new.pop()
        after = {s for p, s, _, terminated in process[state][int(policy[state])] if p > 0 and not terminated}
        new += after - seen
        seen |= after
    return sorted(seen)


def process_of(env: Any) -> Process | None:
    """Return the process that an environment publishes beside its state `s`; None if it publishes none."""
    process = getattr(env.unwrapped, "P", None)
    return process if isinstance(process, Mapping) and hasattr(env.unwrapped, "s") else None
