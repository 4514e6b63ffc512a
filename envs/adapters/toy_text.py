"""Puts gymnasium's toy-text environments into words: FrozenLake, CliffWalking, Taxi, Blackjack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Env = Any
"""An environment as `gymnasium.make` returns it, whose inner attributes have no declared types."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """Says how an environment of discrete actions is told in text."""

    rules: str
    """What the first prompt says, before the first observation."""
    actions: Sequence[str]
    """The names of the actions, in their order."""
    describe: Callable[[Env, Any], str]
    """An observation in words."""
    place: Callable[[Env, int], str]
    """A short name of a state, for a plan."""
    hidden: Callable[[Env], str | None] = lambda env: None
    """What only a teacher may know of the task, beside the best plan."""
    success: Literal["reward", "end"] = "reward"
    """Which end is a success: one with a positive total reward, or any that the environment itself calls an end."""
    varied: bool = False
    """True if the first observation differs from task to task, so that it tells splits apart."""


def _cell(env: Env, state: int) -> str:
    row, column = divmod(int(state), env.unwrapped.ncol)
    return f"row {row}, column {column}"


def _frozen_lake(env: Env, state: int) -> str:
    grid = [[cell.decode() for cell in row] for row in env.unwrapped.desc]
    row, column = divmod(int(state), env.unwrapped.ncol)
    here = {"H": "You fell into a hole.", "G": "You reached the goal."}.get(grid[row][column], "")
    grid[row][column] = "@"
    return "\n".join(["".join(line) for line in grid] + [f"You are at {_cell(env, state)}. {here}".rstrip()])


def _cliff_cell(env: Env, state: int) -> str:
    row, column = np.unravel_index(int(state), env.unwrapped.shape)
    return f"row {row}, column {column}"


_LANDMARKS = ("R", "G", "Y", "B")


def _taxi_cell(env: Env, state: int) -> str:
    row, column, passenger, _ = env.unwrapped.decode(int(state))
    return f"row {row}, column {column}, passenger {'aboard' if passenger == 4 else 'waiting'}"


def _taxi(env: Env, state: int) -> str:
    row, column, passenger, destination = env.unwrapped.decode(int(state))
    ways = [name for a, name in enumerate(("south", "north", "east", "west")) if _moves(env, int(state), a)]
    waits = "is aboard" if passenger == 4 else f"waits at {_landmark(env, passenger)}"
    return (
        f"The taxi is at row {row}, column {column}; it can go {', '.join(ways)}. "
        f"The passenger {waits} and wants to go to {_landmark(env, destination)}."
    )


def _moves(env: Env, state: int, action: int) -> bool:
    return any(after != state for _, after, _, _ in env.unwrapped.P[state][action])


def _landmark(env: Env, number: int) -> str:
    row, column = env.unwrapped.locs[number]
    return f"{_LANDMARKS[number]} (row {row}, column {column})"


def _blackjack(env: Env, observation: tuple[int, int, int]) -> str:
    total, dealer, ace = (int(n) for n in observation)
    return f"Your cards sum to {total}{' with a usable ace' if ace else ''}. The dealer shows {_card(dealer)}."


def _blackjack_hidden(env: Env) -> str:
    return f"The dealer's hidden card is {_card(env.unwrapped.dealer[1])}."


def _card(value: int) -> str:
    return "an ace" if value == 1 else str(value)


FROZEN_LAKE = Words(
    rules=(
        "You walk on a frozen lake. S is the start, F is ice, H is a hole, G is the goal, @ is you. Reach the goal and "
        "fall into no hole. The ice may be slippery, so that you move in another direction than you meant. In each "
        "turn say one move: left, down, right or up."
    ),
    actions=("left", "down", "right", "up"),
    describe=_frozen_lake,
    place=_cell,
)
CLIFF_WALKING = Words(
    rules=(
        "You walk in a grid of 4 rows and 12 columns, numbered from 0, from row 3, column 0 to row 3, column 11. "
        "Between the two, row 3 is a cliff: a step onto it costs 100 and puts you back at the start. Every other step "
        "costs 1. In each turn say one move: up, right, down or left."
    ),
    actions=("up", "right", "down", "left"),
    describe=lambda env, state: f"You are at {_cliff_cell(env, state)}.",
    place=_cliff_cell,
    success="end",
)
TAXI = Words(
    rules=(
        "You drive a taxi in a grid of 5 rows and 5 columns, numbered from 0 in the north-west. Fetch the passenger "
        "and bring them to where they want to go. In each turn say one action: south, north, east, west, pickup or "
        "dropoff."
    ),
    actions=("south", "north", "east", "west", "pickup", "dropoff"),
    describe=_taxi,
    place=_taxi_cell,
    success="end",
    varied=True,
)
BLACKJACK = Words(
    rules=(
        "You play Blackjack against the dealer. Come closer to 21 than the dealer without going over; the dealer "
        "draws to 17. In each turn say one action: stick or hit."
    ),
    actions=("stick", "hit"),
    describe=_blackjack,
    place=lambda env, state: f"state {state}",
    hidden=_blackjack_hidden,
    varied=True,
)

WORDS: Mapping[str, Words] = {
    "FrozenLakeEnv": FROZEN_LAKE,
    "CliffWalkingEnv": CLIFF_WALKING,
    "TaxiEnv": TAXI,
    "BlackjackEnv": BLACKJACK,
}
"""Class of the environment -> its words, so that every registered variant is known."""
