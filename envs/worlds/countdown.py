"""Defines Countdown: reach a target by adding, subtracting, multiplying and dividing given numbers.

Two forms of one game: `CountdownEnv` combines two numbers a turn with a tool, and `CountdownExpressionEnv` takes
one expression. Every number is used exactly once, as in the tasks that language models are compared on.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from opd.envs.text_env import Reply, Start, TextEnv, task_split
from opd.envs.tool_env import ToolEnv, ToolError, tool
from opd.envs.worlds.countdown_solver import (
    MOST_NUMBERS,
    OPERATORS,
    Combination,
    Numbers,
    apply,
    evaluate,
    expression,
    solve,
    steps,
)
from opd.errors import ConfigError, DataError, EnvError
from opd.rewards import last_tagged
from opd.tool_calls import format_call

RULES = (
    "Use every number exactly once. Add, subtract, multiply or divide; a difference must stay above zero, "
    "a division must come out even."
)
TOOL_SYSTEM = f"Reach the target: combine two of the numbers at a time until one is left. {RULES}"
EXPRESSION_SYSTEM = (
    f"Reach the target with one expression of the numbers, + - * / and brackets. {RULES} "
    "Give the expression alone in the last line of your answer."
)
_VERBS = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
_TASKS: dict[str, Any] = {"render_modes": [], "tasks": {"train": None, "eval": None, "warm": None}}
_DRAWS = 5_000


class _Puzzles:
    """Draws tasks: numbers, and a target that some steps reach.

    Raises ConfigError when the settings leave nothing to draw from.
    """

    def __init__(self, *, numbers: int, highest: int, target: tuple[int, int], operators: str) -> None:
        if not 2 <= numbers <= MOST_NUMBERS:
            raise ConfigError(f"numbers = {numbers} must be from 2 to {MOST_NUMBERS}")
        if not 2 <= highest <= 1000:
            raise ConfigError(f"highest = {highest} must be from 2 to 1000")
        if len(target) != 2 or not 1 <= target[0] <= target[1]:
            raise ConfigError(f"target = {list(target)} must be two numbers, 1 or more, in order")
        if not operators or set(operators) - set(OPERATORS):
            raise ConfigError(f"operators = {operators!r} must be one or more of: {' '.join(OPERATORS)}")
        self.count, self.highest, self.target, self.operators = numbers, highest, tuple(target), operators

    def draw(self, rng: np.random.Generator, split: str) -> tuple[Numbers, int, tuple[Combination, ...]]:
        """Draw a task of this split. Returns its numbers, its target and the solver's solution."""
        low, high = self.target
        for _ in range(_DRAWS):
            numbers = tuple(sorted(rng.integers(1, self.highest + 1, size=self.count).tolist()))
            left = numbers
            while len(left) > 1:
                choices = list(steps(left, self.operators))
                if not choices:
                    break
                left = apply(left, choices[rng.integers(len(choices))])
            reached = len(left) == 1 and low <= left[0] <= high and left[0] not in numbers
            if reached and task_split(numbers, left[0]) == split:
                solution = solve(numbers, left[0], self.operators)
                assert solution is not None, "steps led there"
                return numbers, left[0], solution
        raise EnvError(
            f"no Countdown task of split {split!r} was found for numbers = {self.count}, highest = {self.highest}, "
            f"target = {list(self.target)}, operators = {self.operators!r}"
        )


class CountdownEnv(ToolEnv):
    """Combine two numbers a turn until one is left. Reward 1 when it is the target, else 0.

    The feedback to a wrong end names the step after which the target was out of reach. Privileged are
    `solution` (the steps with their results) and `plan` (which operations, in order). A set of numbers with its
    target is in one split only.

    Args:
        numbers: how many, 2 to 5.
        highest: numbers are drawn from 1 to this.
        target: least and greatest target.
        operators: any of `+ - * /`.
        max_steps: truncate after this many turns; by default two more than are needed.
    """

    metadata: dict[str, Any] = _TASKS

    def __init__(
        self,
        *,
        numbers: int = 3,
        highest: int = 10,
        target: tuple[int, int] = (2, 50),
        operators: str = OPERATORS,
        max_steps: int | None = None,
    ) -> None:
        self._puzzles = _Puzzles(numbers=numbers, highest=highest, target=target, operators=operators)
        super().__init__(max_steps=numbers + 1 if max_steps is None else max_steps)
        self.left: Numbers = ()
        self.target = 0
        self._lost: Combination | None = None

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        self.left, self.target, solution = self._puzzles.draw(rng, split)
        self._lost = None
        return Start(
            prompt=question(self.left, self.target),
            system=TOOL_SYSTEM,
            privileged={
                "plan": ", then ".join(_VERBS[step.op] for step in solution),
                "solution": "\n".join(map(str, solution)),
            },
        )

    @tool
    def combine(self, a: int, op: str, b: int) -> str:
        """Replace two of the numbers by the result of a calculation.

        Args:
            a: the first number
            op: +, -, * or /
            b: the second number
        """
        if op not in self._puzzles.operators:
            raise ToolError(f"there is no operator {op[:80]!r}; the operators are {' '.join(self._puzzles.operators)}")
        step = Combination(a, op, b)
        could = self._lost is None
        try:
            self.left = apply(self.left, step)
        except DataError as error:
            raise ToolError(str(error)) from None
        if could and self._solution() is None:
            self._lost = step
        if len(self.left) > 1:
            return f"{step}. Left: {', '.join(map(str, self.left))}"
        right = self._lost is None
        self.finish(float(right), success=right, feedback=None if right else self._explain())
        return f"{step}"

    def _solution(self) -> tuple[Combination, ...] | None:
        return solve(self.left, self.target, self._puzzles.operators)

    def _explain(self) -> str:
        return f"{self.left[0]} is not {self.target}: after {self._lost} it was out of reach."

    def oracle(self) -> list[str]:
        """Return the actions of a perfect episode from here on. Raises EnvError when the target is out of reach."""
        solution = self._solution()
        if solution is None:
            raise EnvError(f"{self.target} cannot be reached with {', '.join(map(str, self.left))}")
        return [call(step) for step in solution]


class CountdownExpressionEnv(TextEnv):
    """Plays Countdown in one turn: the answer is an expression. Reward 1 when it is right, else 0.

    Read is what stands in the last `<answer>...</answer>`, or else the last line; a `= 24` at its end is dropped.
    Privileged are `solution` (the steps, then the expression) and `answer` (the expression alone). Arguments and
    splits as in `CountdownEnv`.
    """

    metadata: dict[str, Any] = _TASKS

    def __init__(
        self,
        *,
        numbers: int = 3,
        highest: int = 10,
        target: tuple[int, int] = (2, 50),
        operators: str = OPERATORS,
    ) -> None:
        super().__init__()
        self._puzzles = _Puzzles(numbers=numbers, highest=highest, target=target, operators=operators)
        self.numbers: Numbers = ()
        self.target = 0

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        self.numbers, self.target, solution = self._puzzles.draw(rng, split)
        answer = expression(solution)
        return Start(
            prompt=question(self.numbers, self.target),
            system=EXPRESSION_SYSTEM,
            privileged={"solution": "\n".join([*map(str, solution), f"answer: {answer}"]), "answer": answer},
        )

    def respond(self, action: str) -> Reply:
        feedback = self._problem(_answer_in(action))
        if feedback is None:
            return Reply(reward=1.0, terminated=True, success=True)
        return Reply(terminated=True, feedback=f"Wrong: {feedback}.")

    def _problem(self, answer: str) -> str | None:
        """Say why an expression is no solution; None if it is one."""
        try:
            value, used = evaluate(answer)
        except DataError as error:
            return str(error)
        if tuple(sorted(used)) != self.numbers:
            return f"every one of {', '.join(map(str, self.numbers))} must be used exactly once"
        return None if value == self.target else f"{answer[:80]} is {value}, not {self.target}"


def question(numbers: Numbers, target: int) -> str:
    """Put a task into words."""
    return f"Numbers: {', '.join(map(str, numbers))}. Target: {target}."


def call(step: Combination) -> str:
    """Write the action that makes a step."""
    return format_call("combine", {"a": str(step.a), "op": step.op, "b": str(step.b)})


_RESULT = re.compile(r"=\s*[0-9]+\s*$")


def _answer_in(action: str) -> str:
    tagged = last_tagged(action, "answer")
    lines = (action if tagged is None else tagged).strip().split("\n")
    return _RESULT.sub("", lines[-1]).strip()
