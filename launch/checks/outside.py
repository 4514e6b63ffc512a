"""What a run takes from outside of this repository, and whether that has changed since the run began."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

from opd.addressing import SCRIPT, Origin, installed, is_address, origin
from opd.config import Strict
from opd.disk import write_whole
from opd.errors import CheckpointError, ConfigError
from opd.launch.settings.config import Config
from opd.losses import Divergence
from opd.variables import names_in, with_values

logger = logging.getLogger(__name__)
NAME = "outside.json"
"""The file in a run's folder that says where its method, environment, divergence, weightings and data came from."""


@dataclass(frozen=True, slots=True)
class Taken:
    """Something that a setting took from outside."""

    setting: str
    origin: Origin


def taken_by(config: Config) -> list[Taken]:
    """Return what the settings name that is not of this repository, code and files, with where it stands now.

    Raises ConfigError where a module is not there any more.
    """
    own = __name__.partition(".")[0]
    scripted = getattr(sys.modules[SCRIPT], "__file__", None) is not None
    return [
        Taken(setting, origin(address))
        for setting, address in _addresses(config)
        if address.partition(":")[0].partition(".")[0] != own and (scripted or not address.startswith(f"{SCRIPT}:"))
    ] + [Taken(setting, _file_origin(written)) for setting, written in _files(config.dump(), "")]


def _files(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield the files that settings name, such as data and tables, with their keys; but models, which have marks of
    their own, and gigabytes."""
    if key == "model.name" or key.endswith(".model"):
        return
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _files(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _files(inner, f"{key}.{number}")
    elif isinstance(value, str) and (os.sep in value or Path(value).suffix):  # a plain word is no file's name
        with suppress(OSError, ValueError, RuntimeError, KeyError):  # a text that no path can be
            if _path(value).is_file():
                yield key, value


def _path(written: str) -> Path:
    """The path that a setting names, with the values of its variables."""
    return Path(with_values(written, is_name=True)).expanduser().absolute()


def _file_origin(written: str) -> Origin:
    """Tell what stands in a file now. A path with a variable is written down as it is in the settings."""
    with _path(written).open("rb") as file:
        named = written if names_in(written) else str(_path(written))
        return Origin(Path(written).name, named, file_digest(file, "sha256").hexdigest())


def _addresses(config: Config) -> Iterator[tuple[str, str]]:
    from opd.envs.adapters import find  # late: importing it registers the environments
    from opd.envs.factory import module_of

    yield "method", config.spec.address
    if find(config.env.id) is None:
        yield "env.id", config.env.id if is_address(config.env.id) else f"{module_of(config.env.id)}:{config.env.id}"
    offered = installed("opd.divergences")
    for key, value in _kinds(config.section, config.spec.name):
        yield key, offered.get(value, value)
    offered = installed("opd.weightings")
    for number, function in enumerate(config.weighting.functions):
        yield f"weighting.functions.{number}.name", offered.get(function.name, function.name)


def _kinds(section: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield the divergences that a section and those below it name by where they stand, with their keys."""
    if isinstance(section, Divergence):
        if is_address(section.kind) or section.kind in installed("opd.divergences"):
            yield f"{key}.kind", section.kind
    elif isinstance(section, Strict):
        for name, value in section:
            yield from _kinds(value, f"{key}.{name}")


def write_taken(config: Config, folder: Path) -> None:
    """Write down in a run's folder where its parts came from, if any came from outside; keep the digests of before."""
    taken, path = taken_by(config), folder / NAME
    if not taken and not path.exists():
        return
    known = read_taken(folder)
    found = {}
    for one in taken:
        row = known.get(one.setting, {})
        before = row.get("before", [])
        if row and row["sha256"] != one.origin.sha256:
            before = [*before, row["sha256"]]
        found[one.setting] = {**asdict(one.origin), "before": before}
    write_whole(path, json.dumps(found, indent=1) + "\n")


def read_taken(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what `write_taken` wrote, by setting. Raises CheckpointError where the file cannot be read."""
    path = folder / NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(setting): {**row, "sha256": str(row["sha256"])} for setting, row in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete it, and nothing is compared") from error


def warn_of_changes(config: Config, folder: Path) -> None:
    """Log a warning, with both digests, for each part from outside that is not what the run in the folder had."""
    known = read_taken(folder)
    for one in taken_by(config):
        row = known.get(one.setting)
        if row is not None and row["sha256"] != one.origin.sha256:
            logger.warning(
                "%s: %s (%s) has changed since this run used it: sha256 %s then, %s now; the run goes on with what "
                "is there now",
                one.setting,
                one.origin.address,
                one.origin.file,
                row["sha256"],
                one.origin.sha256,
            )


def with_origins(error: ConfigError, folder: Path) -> ConfigError:
    """Return the error of a run whose settings cannot be read, with where its parts came from, if any did."""
    lines = [
        f"This run took {setting} = {row['address']} from {row['file']}" for setting, row in read_taken(folder).items()
    ]
    return ConfigError("\n".join([str(error), *lines])) if lines else error
