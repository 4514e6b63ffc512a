"""Which packages are installed, found without importing them."""

from __future__ import annotations

import importlib.util


def is_installed(package: str) -> bool:
    """True: the package can be imported, which is not done. False: it is not installed."""
    return importlib.util.find_spec(package) is not None
