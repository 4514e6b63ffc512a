"""Asks for sums in one turn: the smallest environment in which a small pretrained model is often wrong."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from opd.envs.text_env import Reply, Start, TextEnv, task_split
from opd.errors import ConfigError, EnvError
from opd.rewards import last_number

_OPERATORS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_DRAWS = 10_000


class ArithmeticEnv(TextEnv):
    """Asks for one sum and takes one answer: reward 1 if it is right, else 0.

    Which split a sum belongs to depends on its operands alone, and `38 + 47` goes with `47 + 38`.

    Args:
        operators: any of `+ - *`, one drawn for each task.
        digits: decimal digits of both operands, at least 1; none begins with 0.
        prompt: the question, in which `{a}`, `{op}` and `{b}` are filled in; a single operator may be written out.
        system: a system message, or none.
        strict: what counts as an answer. False: the last number of the text. True: the text must be a number
            and nothing else, white space and a final full stop aside.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  (gymnasium's own declaration)
        "render_modes": [],
        "tasks": {"train": None, "eval": None, "warm": None},
    }

    def __init__(
        self,
        *,
        operators: str = "+",
        digits: int = 2,
        prompt: str = "What is {a} {op} {b}? Answer with the number only.",
        system: str | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__()
        if not operators or set(operators) - set(_OPERATORS):
            raise ConfigError(f"operators = {operators!r} must be one or more of: {' '.join(_OPERATORS)}")
        if digits < 1:
            raise ConfigError(f"digits = {digits} must be at least 1")
        needed = ["{a}", "{b}", "{op}"] if len(set(operators)) > 1 else ["{a}", "{b}"]
        if missing := [name for name in needed if name not in prompt]:
            raise ConfigError(f"prompt = {prompt!r} lacks {', '.join(missing)}")
        self.operators = operators
        self.digits = digits
        self.prompt = prompt
        self.system = system
        self.strict = strict
        self._sum = ""
        self.result = 0

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        a, op, b = self._draw(rng, split)
        self._sum, self.result = f"{a} {op} {b}", _OPERATORS[op](a, b)
        return Start(
            prompt=self.prompt.replace("{a}", str(a)).replace("{op}", op).replace("{b}", str(b)),
            system=self.system,
            privileged={"solution": solution(a, op, b), "answer": str(self.result)},
        )

    def respond(self, action: str) -> Reply:
        if self.strict and not _ONLY_A_NUMBER.fullmatch(action):
            return _wrong("The answer must be a number and nothing else.")
        given = last_number(action)
        if given is None:
            return _wrong(f"There is no number in the answer to {self._sum}.")
        if given != self.result:
            return _wrong(f"{str(given)[:80]} is too {'low' if given < self.result else 'high'} for {self._sum}.")
        return Reply(reward=1.0, terminated=True, success=True)

    def _draw(self, rng: np.random.Generator, split: str) -> tuple[int, str, int]:
        low, high = 10 ** (self.digits - 1), 10**self.digits
        for _ in range(_DRAWS):
            a, b = (int(n) for n in rng.integers(low, high, size=2))
            op = self.operators[rng.integers(len(self.operators))]
            if _split(a, op, b) == split:
                return a, op, b
        raise EnvError(f"no sum of digits = {self.digits}, operators = {self.operators!r} is in split {split!r}")


_ONLY_A_NUMBER = re.compile(r"\s*-?\d[\d,]*(\.\d+)?\.?\s*")


def _split(a: int, op: str, b: int) -> str:
    return task_split(op, *((a, b) if op == "-" else sorted((a, b))))


def solution(a: int, op: str, b: int) -> str:
    """Write a short worked solution, in which the second operand is taken apart digit by digit.

    >>> solution(47, "+", 38)
    '47 + 38 = 47 + 30 + 8 = 77 + 8 = 85. The answer is 85.'
    """
    digits = str(b)
    parts = [int(d) * 10 ** (len(digits) - 1 - i) for i, d in enumerate(digits) if d != "0"]
    steps = _product_steps(a, parts) if op == "*" else _sum_steps(a, op, parts)
    result = _OPERATORS[op](a, b)
    shown = [f"{a} {op} {b}", *steps, str(result)]
    return f"{' = '.join(dict.fromkeys(shown))}. The answer is {result}."


def _sum_steps(a: int, op: str, parts: list[int]) -> list[str]:
    steps = []
    for i, part in enumerate(parts):
        steps.append(f" {op} ".join(str(n) for n in (a, *parts[i:])))
        a = _OPERATORS[op](a, part)
    return steps


def _product_steps(a: int, parts: list[int]) -> list[str]:
    if len(parts) == 1:
        return []
    return [" + ".join(f"{a} * {part}" for part in parts), " + ".join(str(a * part) for part in parts)]


def _wrong(feedback: str) -> Reply:
    return Reply(terminated=True, feedback=feedback)
