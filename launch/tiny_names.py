"""The environments that a `tiny:<env>` model can be built for. A plain tuple, so that a wrong name fails at once."""

TINY_ENVS: tuple[str, ...] = ("lookup", "arithmetic", "sokoban", "countdown")
