"""The processes of a run, checked and joined."""

from __future__ import annotations

from opd.launch.checks.starting import check_started
from opd.launch.settings.config import Config
from opd.ranks.join import join
from opd.ranks.ranks import Ranks


def ranks_of(config: Config) -> Ranks:
    """Return the processes that this run is to be trained by.

    Raises ConfigError where the backend cannot use them, or its JSON cannot be used.
    """
    check_started(config)
    if config.backend == "local":
        return Ranks()
    from opd.launch.checks.deepspeed import check_deepspeed

    ranks = join()
    ranks.agree(lambda: check_deepspeed(config))
    return ranks
