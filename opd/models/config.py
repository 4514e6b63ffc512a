"""The settings of models: which one, in which type, with which adapters. No torch here."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
)

from opd.config import PathText, Strict
from opd.models.description import Attention


class LoraConfig(Strict):
    """Low-rank adapters in place of full fine-tuning (library: peft)."""

    r: int = Field(16, ge=1, description="Rank of the adapters.")
    alpha: int = Field(32, ge=1, description="Scale of the adapters; the update is multiplied by alpha / r.")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Module names that get an adapter, or all-linear."
    )


class ModelConfig(Strict):
    """The model that acts and learns. `model: NAME` is short for `model: {name: NAME}`."""

    name: PathText = Field(
        description="A hub id, a local folder, a .gguf file, `smollm2` (from its package), or `tiny:<env>` "
        "(a small model built and warm-started on this machine)."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto", description="Type of the weights; auto is float32 on a CPU and bfloat16 on a GPU."
    )
    attention: Attention = Field(
        "auto",
        description="How attention is computed; auto is eager where the model caps its scores (Gemma 2), since sdpa "
        "would leave that out, and what transformers prefers elsewhere.",
    )
    dequantize: bool = Field(
        False,
        description="Make plain floats of a quantised checkpoint (FP8, MXFP4, compressed-tensors) as it is loaded; the "
        "export holds plain floats too.",
    )
    allow_missing: list[str] = Field(
        [],
        description="Names or patterns (`*.bias`) of weights that the checkpoint may lack: by the seed, they begin at "
        "random.",
    )
    lora: LoraConfig | None = Field(None, description="Train adapters instead of all weights.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, about a third more time."
    )
    trust_remote_code: bool = Field(False, description="Run the Python code that a hub repository ships.")


class ChatConfig(Strict):
    """Sets what the chat template is told beside the conversation."""

    date: str | None = Field(
        None,
        description="The day that a chat template writes into its prompt, as YYYY-MM-DD; by default the day on which "
        "the run began, also after midnight and when it is resumed.",
    )

    @field_validator("date", mode="before")
    @classmethod
    def _is_a_day(cls, given: Any) -> Any:
        if given is None:
            return None
        try:
            return datetime.date.fromisoformat(str(given)).isoformat()
        except ValueError:
            raise ValueError(f"{given!r} is no day of the form YYYY-MM-DD") from None

    @property
    def day(self) -> datetime.date:
        """The day, which is today where none is set."""
        return datetime.date.fromisoformat(self.date) if self.date else datetime.date.today()


def _model_from_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


ModelSetting = Annotated[ModelConfig, BeforeValidator(_model_from_name)]
