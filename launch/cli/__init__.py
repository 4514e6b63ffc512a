"""The `opd` command."""

from opd.launch.cli.main import main

__all__ = ["main"]
