"""Problems of the environment: it does not exist, or may not run where it is asked to."""

from __future__ import annotations

from opd.episodes.config import EnvConfig
from opd.errors import OpdError
from opd.launch.settings.problems import Problem


def check_env(env: EnvConfig) -> list[Problem]:
    """Return a problem if there is no such environment, or if it may not run in a thread."""
    from opd.envs.adapters import find  # late: importing it registers the environments
    from opd.envs.factory import validate_id

    try:
        validate_id(env.id)
    except OpdError as error:
        return [Problem(("env.id",), str(error))]
    if env.workers == "threads" and env.kwargs.get("unprotected") and find(env.id):
        text = (
            "env.kwargs.unprotected: true runs other people's code on what the model writes, and a thread that hangs "
            "there stops the whole run. Set env.workers: processes (auto is that), or leave unprotected out."
        )
        return [Problem(("env.workers", "env.kwargs"), text)]
    return []
