"""Objects that a setting names by where they stand: `package.module:name`, in this package or in anybody's."""

from __future__ import annotations

import pkgutil
from typing import Any

from opd.errors import ConfigError


def load(address: str, *, setting: str) -> Any:
    """Import the module and return the object; `setting` is the key that the address stands under.

    Raises ConfigError where there is no such module or object, or where importing it fails.
    """
    try:
        return pkgutil.resolve_name(address)
    except Exception as error:  # the module is somebody else's, and may do anything while it is imported
        raise ConfigError(f"{setting}: {address!r} cannot be imported: {error}") from error
