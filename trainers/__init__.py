"""The training loop, and one file a method. A method annotates; the loop trains and knows none by name.

`Method`, `register`, `Stage` and `to_sample` are what a method outside of this repository is made of. They are resolved
when first used.
"""

from typing import Any

__all__ = ["Method", "Stage", "register", "to_sample"]


def __getattr__(name: str) -> Any:
    if name == "Method":
        from opd.trainers.loop.method import Method

        return Method
    if name == "register":
        from opd.trainers.loop.registry import register

        return register
    if name == "Stage":
        from opd.trainers.loop.stage import Stage

        return Stage
    if name == "to_sample":
        from opd.types import to_sample

        return to_sample
    raise AttributeError(f"module 'opd.trainers' has no attribute {name!r}")
