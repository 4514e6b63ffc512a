"""Tells whether an answer is mathematically equal to the right one, by math-verify in processes of its own.

The library parses LaTeX and asks sympy, both of which hostile or unlucky text can keep busy for hours or fill the
memory with. Its own time limit is a signal, which works in the main thread alone (environments are stepped in others)
and not while Python computes with a huge integer. So it runs where it can be killed (`opd.sandbox.Grader`).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from opd.errors import ConfigError
from opd.rewards.functions import Completion, answer_of
from opd.sandbox import Grader

_FAMILIAR = ("1", r"$\frac{1}{2}$", r"\boxed{x^2+1}", r"$\{1, 2\}$")


class MathVerify:
    r"""Scores 1 where the completion's answer equals the `answer` column as mathematics, else 0.

    None: `answer` holds none. `1/2`, `0.5`, `$\frac{1}{2}$` and `\boxed{\frac12}` are equal. Formulas in a completion
    need dollar signs or `\boxed`, as the library has it; in the `answer` column they may stand bare (`x^2+1`). A
    completion that cannot be compared in time is wrong, and the log says so.

    Args:
        time_limit: seconds for one answer; `rollout.grading_timeout` must be larger.

    Raises ConfigError when the package math-verify is not installed.
    """

    __name__ = "math_verify"

    def __init__(self, time_limit: float = 10.0) -> None:
        if find_spec("math_verify") is None:
            raise ConfigError("reward math_verify needs the package math-verify: pip install 'opd[math]'")
        self.time_limit = time_limit
        self._grader = Grader(Equality, name="math_verify", time_limit=time_limit)

    def __call__(self, completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
        return [
            self._compare(str(right), answer_of(completion))
            for completion, right in zip(completions, answer, strict=True)
        ]

    def _compare(self, right: str, given: str) -> float | None:
        limit = max(1, int(self.time_limit / 2))
        return self._grader.score("compare", text=given, right=right, given=given, seconds=limit)


class Equality:
    """Runs math-verify itself, in its own process."""

    def __init__(self) -> None:
        import math_verify

        self._parse, self._verify = math_verify.parse, math_verify.verify
        for formula in _FAMILIAR:  # the first formulas take a second: what they leave behind is the grammar's
            self.compare(formula, formula, seconds=60)

    def compare(self, right: str, given: str, seconds: int) -> float | None:
        """Return 1.0 or 0.0; None where nothing can be read of what is right.

        Each step of the library's may take `seconds`.
        """
        gold = self._parse(right, parsing_timeout=seconds) or self._parse(
            rf"\boxed{{{right}}}", parsing_timeout=seconds
        )
        if not gold:
            return None
        return float(self._verify(gold, self._parse(given, parsing_timeout=seconds), timeout_seconds=seconds))
