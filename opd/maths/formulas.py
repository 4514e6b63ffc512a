"""The divergences: a function each, in a table that anybody may add to.

A formula says what one vocabulary entry adds to a divergence of teacher and student, and the derivative by the
student's log-probs. What is a sum over the vocabulary, over its top k or over a tile is the business of
`opd.maths.divergence_tiles`, which runs every formula in every form. This file imports no torch, so that a name
is checked first.

    @formula(beta=0.1)
    def my_divergence(student, teacher, p, q, beta):
        '''The first line of the docstring is what `opd config --explain` prints.'''
        ...

is known under the function's name as soon as its module is imported; a setting may also name it where it stands,
`kind: my_package.my_module:my_divergence`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from opd.addressing import installed, load
from opd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

Function = Callable[..., "tuple[Tensor, Tensor]"]

_TABLE: dict[str, Formula] = {}


@dataclass(frozen=True, slots=True)
class Formula:
    """A row of the table: a divergence, and what the code must know of it beside its values."""

    function: Function
    """(student, teacher, p, q) or, where there is a beta, (student, teacher, p, q, beta) -> (summands, slope).

    All tensors are [..., V], float32 or wider: log-probs of student and teacher, and their exponentials `p` (student)
    and `q` (teacher), none of which it may change. It returns two new tensors, into which its caller writes: what each
    entry adds, in nats, and the derivative of the entries' sum by each of the student's log-probs, as if these were
    free. A log-prob may be -inf; an entry that both sides exclude adds 0 to both.
    """
    beta: float | None
    """Its beta where none is given, between 0 and 1; None: it has none."""
    ends: tuple[Formula | None, Formula | None]
    """What stands in its place at beta 0 and at beta 1, where the formula itself would give 0; None: itself."""
    zero_at: float | None = None
    """The beta at which it is 0 for every teacher and student, so that nothing would be learned; it is refused."""

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n")[0]

    def at(self, beta: float | None) -> Formula:
        """The formula to compute with: itself, but for the ends of its beta."""
        end = self.ends[int(beta)] if beta in (0, 1) else None
        return end or self

    def summands(
        self, student: Tensor, teacher: Tensor, p: Tensor, q: Tensor, beta: float | None
    ) -> tuple[Tensor, Tensor]:
        """The entries' summands and the derivatives of their sum by the student's log-probs (see `function`).

        Raises DataError where somebody's own function does not keep to what `function` says.
        """
        given = (student, teacher, p, q)
        arguments = given if self.beta is None else (*given, beta)
        if self.function.__module__ == __name__:
            return self.function(*arguments)
        versions = [one._version for one in given]
        found = self.function(*arguments)
        if [one._version for one in given] != versions:
            raise DataError(f"the divergence {self.name} writes into its arguments; it must make new tensors")
        parts = found if isinstance(found, tuple) and len(found) == 2 else ()
        shapes = [(getattr(part, "shape", None), getattr(part, "dtype", None)) for part in parts]
        if shapes != [(p.shape, p.dtype)] * 2 or _share_memory([*parts, *given], new=2):
            raise DataError(
                f"the divergence {self.name} must return two new tensors, summands and slopes, of the shape and type "
                f"of its arguments ({list(p.shape)}, {p.dtype}); it returned {_described(found)}"
            )
        # A nan of the logits fills its row of log-probs, and is not the formula's.
        if any((part.isnan() & ~(student.isnan() | teacher.isnan())).any() for part in parts):
            raise DataError(
                f"the divergence {self.name} gives nan for log-probs that are none. Is a log-prob of -inf multiplied "
                "by a probability of 0? opd.maths.formulas.times_log_ratio gives 0 there"
            )
        return parts


def formula(
    *,
    beta: float | None = None,
    ends: tuple[Formula | None, Formula | None] = (None, None),
    zero_at: float | None = None,
) -> Callable[[Function], Formula]:
    """Add a function to the table, under its own name.

    Args:
        beta: its beta where none is given; a function without one takes four tensors, one with it a number more.
        ends, zero_at: see `Formula`.

    Raises:
        ConfigError: the name is another function's, or the function takes other arguments.
    """

    def add(function: Function) -> Formula:
        row = Formula(function, beta, ends, zero_at)
        known = _TABLE.get(row.name)
        if known is not None and _place(known) != _place(row):  # the same place: its module is imported anew
            raise ConfigError(f"there is a divergence {row.name} already, in {known.function.__module__}; rename yours")
        wanted = ["student", "teacher", "p", "q"] + ["beta"] * (beta is not None)
        takes = list(inspect.signature(function).parameters)
        if takes != wanted or _keyword_only(function):
            raise ConfigError(f"the divergence {row.name} takes ({', '.join(takes)}), not ({', '.join(wanted)})")
        if not (isinstance(ends, tuple) and len(ends) == 2 and all(e is None or isinstance(e, Formula) for e in ends)):
            raise ConfigError(f"the divergence {row.name} has ends = {ends!r}: two formulas, or None for itself")
        if beta is None and ends != (None, None):
            raise ConfigError(f"the divergence {row.name} has ends, but no beta: give it one, or remove them")
        if beta is not None and not 0 <= beta <= 1:
            raise ConfigError(f"the divergence {row.name} has beta = {beta}: must be between 0 and 1")
        _TABLE[row.name] = row
        return row

    return add


def _keyword_only(function: Function) -> bool:
    return any(p.kind is p.KEYWORD_ONLY for p in inspect.signature(function).parameters.values())


def formula_of(kind: str) -> Formula:
    """The divergence of that name, or that stands at `package.module:name`. Raises ConfigError where there is none."""
    if kind in _TABLE:
        return _TABLE[kind]
    address = installed("opd.divergences").get(kind, kind)
    if ":" in address:
        found = load(address, setting="divergence.kind")
        if isinstance(found, Formula) and _TABLE.get(found.name) is found:
            return found
        raise ConfigError(
            f"divergence.kind: {kind!r} is a {type(found).__name__} and no divergence. Decorate the function with "
            "@opd.maths.formulas.formula()"
        )
    near = get_close_matches(kind, _TABLE, n=1)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    raise ConfigError(
        f"divergence.kind = {kind!r} is unknown. Allowed: {', '.join(_TABLE)}, or package.module:name.{hint}"
    )


def kinds() -> dict[str, str]:
    """The names of the table and of installed packages, each with the first line of what is said of it."""
    elsewhere = {name: address for name, address in installed("opd.divergences").items() if name not in _TABLE}
    return {name: row.summary for name, row in _TABLE.items()} | elsewhere


def with_beta() -> list[str]:
    """The names of those that have a beta."""
    return [name for name, row in _TABLE.items() if row.beta is not None]


def _described(found: object) -> str:
    if isinstance(found, tuple):
        return f"({', '.join(map(_described, found))})"
    shape = getattr(found, "shape", None)
    return type(found).__name__ if shape is None else f"{list(shape)} of {getattr(found, 'dtype', None)}"


def _share_memory(tensors: Sequence[Tensor], *, new: int) -> bool:
    """True if one of the first `new` tensors lies where another one does; what is empty lies nowhere."""
    places = [tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()]
    return any(place in places[:n] + places[n + 1 :] for n, place in enumerate(places[:new]))


def _place(row: Formula) -> tuple[str, str]:
    return row.function.__module__, row.function.__qualname__


def times_log_ratio(p: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """p * (numerator - denominator), and 0 where p is 0, whatever the logarithms are: a new tensor."""
    return (numerator - denominator).mul_(p).masked_fill_(p == 0, 0)


@formula()
def forward_kl(student: Tensor, teacher: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student)."""
    return times_log_ratio(q, teacher, student), -q


@formula()
def reverse_kl(student: Tensor, teacher: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || teacher)."""
    value = times_log_ratio(p, student, teacher)
    return value, value + p


@formula(beta=0.5, ends=(forward_kl, reverse_kl))
def jsd(student: Tensor, teacher: Tensor, p: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta * KL(teacher || mix) + (1 - beta) * KL(student || mix), mix = beta * teacher + (1 - beta) * student.

    At beta 0 and 1, where that is 0, it is by convention the forward and the reverse KL (as in OPSD, SDPO and TRL).
    """
    mix = p.lerp(q, beta)
    none = mix == 0  # the mix of two probabilities, the smallest that there are, may be rounded to 0
    mix.log_()
    slope = times_log_ratio(p, student, mix).mul_(1 - beta).masked_fill_(none, 0)
    return times_log_ratio(q, teacher, mix).mul_(beta).masked_fill_(none, 0).add_(slope), slope


@formula(beta=0.5, ends=(forward_kl, reverse_kl))
def mixed_kl(student: Tensor, teacher: Tensor, p: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(1 - beta) * KL(teacher || student) + beta * KL(student || teacher)."""
    value = times_log_ratio(p, student, teacher).mul_(beta)
    slope = value.add(p, alpha=beta).sub_(q, alpha=1 - beta)
    return value.add_(times_log_ratio(q, teacher, student).mul_(1 - beta)), slope


@formula(beta=0.1, ends=(forward_kl, None), zero_at=1)
def skew_kl(student: Tensor, teacher: Tensor, p: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """KL(teacher || beta * teacher + (1 - beta) * student) (DistiLLM, arXiv 2402.03898)."""
    mix = p.lerp(q, beta)
    none = mix == 0  # as in `jsd`
    value = times_log_ratio(q, teacher, mix.log()).masked_fill_(none, 0)
    # The ratio is at most 1 / beta, whereas the reciprocal of the smallest numbers is infinite.
    return value, (q / mix).mul_(p).mul_(beta - 1).masked_fill_(none, 0)
