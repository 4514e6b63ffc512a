"""The environments that a `tiny:<env>` model can be built for. A plain tuple, so that a wrong name fails at once.

`lookup-expert` is no environment of its own: it knows what `lookup` has to learn, and can teach it. The `-skills`
models read skills beside their task.
"""

TINY_ENVS: tuple[str, ...] = (
    "lookup",
    "arithmetic",
    "sokoban",
    "countdown",
    "lookup-expert",
    "lookup-skills",
    "sokoban-skills",
)
