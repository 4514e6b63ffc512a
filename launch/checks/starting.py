"""Problems that only the start of a run shows: processes, servers, and DeepSpeed's own settings."""

from __future__ import annotations

from opd.errors import ConfigError
from opd.launch.checks.servers import check_servers, check_teaching_servers
from opd.launch.settings.config import Config
from opd.ranks.ranks import started_ranks


def check_started(config: Config) -> None:
    """Raise ConfigError if a launcher started more processes than the backend can use, or a server cannot be used."""
    if config.backend == "local" and started_ranks() > 1:
        raise ConfigError(
            f"backend = local is one process, but a launcher started {started_ranks()}: all would train the same. "
            "Set backend: deepspeed, or start one."
        )
    check_servers(config.rollout)
    for teacher in {id(s.teacher): s.teacher for s in config.stages if s.listens}.values():
        check_teaching_servers(teacher, config.rollout.max_length, f"{config.spec.name}.teacher")


def startable(config: Config, source: str) -> Config:
    """Return the settings if a run by them could start here and now; `source` is what messages call their file.

    Raises ConfigError where processes or servers are of no use, or DeepSpeed would not take its settings.
    """
    check_started(config)
    if config.deepspeed is not None:
        from opd.launch.checks.deepspeed import check_deepspeed

        check_deepspeed(config, source=source)
    return config
