"""Knows Countdown without words: combining numbers, reading expressions safely, and a solver.

Numbers are positive whole numbers throughout: a difference must stay above zero and a division come out even, as
in the game. So every value on the way fits the state of the next turn, and nothing is ever rounded.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

from opd.errors import DataError

OPERATORS = "+-*/"
MOST_NUMBERS = 5
MOST_VALUE = 1_000_000
"""No value on the way to a target may be larger: a search need not follow it, an expression cannot blow up."""
MOST_CHARACTERS = 400

Numbers = tuple[int, ...]
"""The numbers that are left, in ascending order."""


class Combination(NamedTuple):
    """Holds one step: two numbers and how they are combined."""

    a: int
    op: str
    b: int

    @property
    def value(self) -> int:
        """Compute the result. Raises DataError when the step is not allowed or its result is too large."""
        return combine(self.a, self.op, self.b)

    def __str__(self) -> str:
        return f"{self.a} {self.op} {self.b} = {self.value}"


def combine(a: int, op: str, b: int) -> int:
    """Compute one operation.

    Raises DataError, with the reason, for a result that is no positive whole number or too large.
    """
    if op == "/":
        if b == 0 or a % b:
            raise DataError(f"{a} / {b} is not a whole number")
        return a // b
    value = {"+": a + b, "-": a - b, "*": a * b}[op]
    if value < 1:
        raise DataError(f"{a} {op} {b} is not above zero")
    if value > MOST_VALUE:
        raise DataError(f"{a} {op} {b} is above {MOST_VALUE:,}")
    return value


def steps(numbers: Numbers, operators: str = OPERATORS) -> Iterator[Combination]:
    """Yield the steps that two of these numbers allow, larger number first; nothing twice."""
    seen: set[tuple[int, int]] = set()
    for low, high in combinations(numbers, 2):
        if (low, high) in seen:
            continue
        seen.add((low, high))
        for op in operators:
            if (op == "-" and low == high) or (op == "/" and high % low) or (op == "*" and low * high > MOST_VALUE):
                continue
            yield Combination(high, op, low)


def apply(numbers: Numbers, step: Combination) -> Numbers:
    """Return the numbers after a step. Raises DataError when they do not hold its two, or the step is not allowed."""
    left = Counter(numbers)
    left.subtract([step.a, step.b])
    if missing := [number for number, count in left.items() if count < 0]:
        raise DataError(f"{missing[0]} is not among the numbers that are left: {', '.join(map(str, numbers))}")
    return tuple(sorted([*left.elements(), step.value]))


@lru_cache(maxsize=100_000)
def solve(numbers: Numbers, target: int, operators: str = OPERATORS) -> tuple[Combination, ...] | None:
    """Find steps that use every number once and end with the target; None when there are none.

    `numbers` in ascending order, at most `MOST_NUMBERS`. Depth first, each set of numbers once.
    """
    if len(numbers) > MOST_NUMBERS:
        raise DataError(f"{len(numbers)} numbers are too many to search; at most {MOST_NUMBERS}")
    return _search(numbers, target, operators, set())


def _search(numbers: Numbers, target: int, operators: str, dead: set[Numbers]) -> tuple[Combination, ...] | None:
    if len(numbers) == 1:
        return () if numbers[0] == target else None
    if numbers in dead:
        return None
    for step in steps(numbers, operators):
        rest = _search(apply(numbers, step), target, operators, dead)
        if rest is not None:
            return (step, *rest)
    dead.add(numbers)
    return None


def expression(taken: Sequence[Combination]) -> str:
    """Write the steps as one expression, with brackets around all but the last."""
    made: list[tuple[int, str]] = []

    def take(number: int) -> str:
        for entry in made:
            if entry[0] == number:
                made.remove(entry)
                return entry[1]
        return str(number)

    text = ""
    for step in taken:
        text = f"{take(step.a)} {step.op} {take(step.b)}"
        made.append((step.value, f"({text})"))
    return text


def evaluate(text: str) -> tuple[int, list[int]]:
    """Compute an expression. Returns its value and the numbers in it, in the order in which they stand.

    Whole numbers, `+ - * /` (or `× ÷`) and brackets are all it may hold, and every value on the way keeps the rules
    of the game. The text is parsed, never run. Raises DataError, with the reason in words, for anything else.
    """
    if len(text) > MOST_CHARACTERS:
        raise DataError(f"the expression has {len(text):,} characters; at most {MOST_CHARACTERS} are read")
    wrong = DataError(f"{text[:80]!r} is not an expression of whole numbers, + - * / and brackets")
    plain = text.strip().replace("×", "*").replace("÷", "/")
    if not _ALLOWED.fullmatch(plain):
        raise wrong
    try:
        tree = ast.parse(plain, mode="eval")
    except (SyntaxError, MemoryError, RecursionError):
        raise wrong from None
    numbers: list[int] = []
    return _value(tree.body, numbers), numbers


_ALLOWED = re.compile(r"[0-9 +*/()-]+")
_SYMBOLS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def _value(node: ast.expr, numbers: list[int]) -> int:
    if isinstance(node, ast.BinOp) and type(node.op) in _SYMBOLS:
        left = _value(node.left, numbers)
        return combine(left, _SYMBOLS[type(node.op)], _value(node.right, numbers))
    if isinstance(node, ast.Constant) and type(node.value) is int and 1 <= node.value <= MOST_VALUE:
        numbers.append(node.value)
        return node.value
    raise DataError(f"an expression holds whole numbers from 1 to {MOST_VALUE:,}, + - * / and brackets, nothing else")
