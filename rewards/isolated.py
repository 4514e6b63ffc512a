"""Runs reward functions in processes of their own.

Such are those that read a completion in ways that hang, or run what it says.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pickle import PicklingError
from typing import Any

from opd.errors import EnvError
from opd.rewards.functions import Completion, text_of
from opd.sandbox import Grader, Ungraded

THIRD_PARTY = ("trl", "verifiers", "skyrl_gym", "reasoning_gym", "math_verify")
"""Packages whose reward functions are isolated unless a part says otherwise: TRL's ask math-verify, with no limit of
time in any thread but the main one."""


def is_third_party(function: Callable[..., Any]) -> bool:
    """True if a function, or what made it, comes from one of `THIRD_PARTY`."""
    module = getattr(function, "__module__", None) or type(function).__module__
    return module.partition(".")[0] in THIRD_PARTY


class Isolated:
    """Calls a plain reward function in a locked process, once for each completion.

    A completion whose scoring hangs, dies, raises, is refused, or is no finite number scores 0, and the log says so.
    Columns go along as they are; the trainer's callables (`log_extra`, ...) lead nowhere there.

    Args:
        function: what can be imported by its name in another process.
        name: of the part.
        time_limit: seconds for one completion.
        together: call it once with all completions, which it compares; where that goes wrong, nothing is scored.

    Raises ConfigError for a function that cannot be sent.
    """

    def __init__(
        self, function: Callable[..., Any], *, name: str, time_limit: float = 10.0, together: bool = False
    ) -> None:
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.__signature__ = inspect.signature(function)
        self.name = name
        self.together = together
        self._grader = Grader(partial(_Function, function), name=f"reward {name}", time_limit=time_limit)

    def __call__(self, completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        lists = {column: values for column, values in columns.items() if isinstance(values, list)}
        others = {column: callable(value) for column, value in columns.items() if column not in lists}
        if self.together:
            return self._score_together({"completions": list(completions), **lists}, others)
        return [
            self._score(completion, {column: [values[row]] for column, values in lists.items()}, others)
            for row, completion in enumerate(completions)
        ]

    def _score_together(self, arguments: dict[str, Any], others: dict[str, bool]) -> list[float | None]:
        """Score all completions in one call. Raises EnvError where it has no result: there is no one to blame."""
        try:
            with self._grader.session() as session:
                scores: list[float | None] = session.call("score_all", arguments=arguments, others=others)
        except Ungraded as error:
            raise EnvError(f"reward {self.name} could not compare {len(arguments['completions'])}: {error}") from error
        except (TypeError, AttributeError, PicklingError) as error:  # of a column that is no data
            raise self._unsendable(error) from error
        return scores

    def _unsendable(self, error: Exception) -> EnvError:
        return EnvError(
            f"reward {self.name} is isolated, and a column cannot be sent to its process: {error}. Set "
            "isolated: false for this part"
        )

    def _score(self, completion: Completion, columns: dict[str, list[Any]], others: dict[str, bool]) -> float | None:
        arguments = {"completions": [completion], **columns}
        try:
            return self._grader.score("score", text=text_of(completion), arguments=arguments, others=others)
        except (TypeError, AttributeError, PicklingError) as error:  # of a column that is no data
            raise self._unsendable(error) from error


class _Function:
    """Calls the function, in its own process."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def score(self, arguments: dict[str, Any], others: dict[str, bool]) -> float | None:
        """Return the function's number for the one completion.

        `others` names the arguments without data, and says whether each is called.
        """
        [value] = self.score_all(arguments, others)
        return value

    def score_all(self, arguments: dict[str, Any], others: dict[str, bool]) -> list[float | None]:
        """Return the function's number for each completion."""
        nowhere = {name: _nowhere if is_called else None for name, is_called in others.items()}
        return [None if value is None else float(value) for value in self._function(**arguments, **nowhere)]


def _nowhere(*_: Any, **__: Any) -> None:
    """Take the place of what the trainer would pass to log with."""
