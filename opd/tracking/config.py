"""The settings of tracking. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
)

from opd.config import Strict


class TrackingConfig(Strict):
    """The places that a run's numbers are written to. `metrics.jsonl` and `rollouts.jsonl` are always written."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto",
        description="auto: as WANDB_MODE says, else online with a key, offline without one, off where wandb is not "
        "installed.",
    )
    project: str | None = Field(None, description="The wandb project; by default WANDB_PROJECT's, or opd.")
    name: str | None = Field(None, description="The wandb run's name; by default WANDB_NAME, or the run folder's.")
    rollouts_per_step: int = Field(8, ge=0, description="Episodes of each step written to rollouts.jsonl.")
    plot: bool = Field(True, description="Write curves.png beside the run.")
    console: bool = Field(True, description="Progress bar and tables in the terminal.")
