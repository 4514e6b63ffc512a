"""One file or folder a method. A method annotates; the loop (`loop/`) trains and knows none by name.

What a method outside of this repository is made of can be imported from here. It is resolved when first used, so that
no name below this package imports one above it.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Method": "opd.trainers.loop.method",
    "Stage": "opd.trainers.loop.stage",
    "register": "opd.trainers.loop.registry",
    "to_sample": "opd.types",
}
__all__ = ["Method", "Stage", "register", "to_sample"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'opd.trainers' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
