"""Problems of tracking: what wandb is asked for, and what it can do on this machine."""

from __future__ import annotations

import netrc
import os
import re

from opd.launch.checks.packages import is_installed
from opd.launch.settings.problems import Problem
from opd.tracking.config import TrackingConfig
from opd.tracking.wandb_run import PROJECT, VARIABLES


def check_tracking(tracking: TrackingConfig) -> list[Problem]:
    """Return a problem if `tracking.wandb` asks for what wandb cannot do here."""
    if tracking.wandb in ("online", "offline") and not is_installed("wandb"):
        text = f"tracking.wandb = {tracking.wandb} needs wandb: pip install wandb, or set tracking.wandb to auto"
        return [Problem(("tracking.wandb",), text)]
    if tracking.wandb == "online" and not has_wandb_key():
        mend = "`wandb login`, or set WANDB_API_KEY, or set tracking.wandb to offline"
        return [Problem(("tracking.wandb",), f"tracking.wandb = online needs a key: {mend}")]
    return []


def has_wandb_key() -> bool:
    """True: wandb would find a key, in the environment or from `wandb login`. False: it would find none."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    own = re.sub(r"^https?://", "", os.environ.get("WANDB_BASE_URL", "")).split("/")[0]
    hosts = [own] if own else ["api.wandb.ai", "api.forge.coreweave.com"]
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(known.authenticators(host) is not None for host in hosts)


def wandb_mode(tracking: TrackingConfig) -> str:
    """Return what wandb will do: `online`, `offline` or `disabled`."""
    if tracking.wandb != "auto":
        return tracking.wandb
    wanted = os.environ.get("WANDB_MODE")
    if wanted == "disabled" or not is_installed("wandb"):
        return "disabled"
    return "online" if wanted not in ("offline", "dryrun") and has_wandb_key() else "offline"


def wandb_project(tracking: TrackingConfig) -> str:
    """Return the name of the project that wandb will write to."""
    return tracking.project or os.environ.get(VARIABLES["project"]) or PROJECT
