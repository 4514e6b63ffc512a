"""Defines every error that `opd` raises on purpose.

One class per boundary, each also a subclass of the standard class that a caller would expect, so that
`except ValueError` keeps working. A message names the setting, its value, what is allowed, and the mend.
"""

from opd.plain_text import printable
from opd.secrets import redact


class OpdError(Exception):
    """Is the base of every deliberate error of this package. Its text shows no secret that the process knows."""

    exit_code = 2
    """The exit code of a command: 2 for a mistake in what was asked, 1 for a run that went wrong by itself."""

    def __str__(self) -> str:
        """Return the message as a terminal may show it, whoever wrote parts of it, without secrets."""
        return printable(redact(super().__str__()))


class ConfigError(OpdError, ValueError):
    """A setting is unknown, missing, or impossible beside another; raised before a model is loaded."""


class DataError(OpdError, ValueError):
    """A table, a trajectory or a tensor does not have the form that the next stage needs."""


class ModelError(OpdError, RuntimeError):
    """A model or tokenizer cannot be loaded, or does not do what the run needs of it."""


class NumbersError(ModelError):
    """A model's weights, or what it computes from them, are no finite numbers: nothing can be sampled or learned."""

    exit_code = 1


class EnvError(OpdError, RuntimeError):
    """An environment broke its contract. Inside a rollout this becomes data (a failed trajectory)."""


class SandboxError(OpdError, OSError):
    """A sandbox could not be made or ended; never the fault of the program in it."""


class CheckpointError(OpdError, RuntimeError):
    """A checkpoint is missing, incomplete, damaged, or belongs to another configuration."""


class EngineError(OpdError, RuntimeError):
    """A rollout engine, or a server behind it, is lost or answers nonsense, and its budget of retries is spent."""


class LockError(OpdError, RuntimeError):
    """The folder of a run belongs to another process that is alive."""


class Interrupted(Exception):
    """What was being done was left before its end, since the run is to stop."""


class HealthError(OpdError, RuntimeError):
    """A run goes on and cannot learn: its environments break at every episode, or its updates are not finite."""

    exit_code = 1
