"""The settings of Skill-SD."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from opd.config import Strict, setting
from opd.teachers.config import TeacherConfig
from opd.trainers.parts.policy import PolicyConfig
from opd.trainers.skill_sd.server import checked_url

EPISODES_EACH = 2
"""The most right episodes of a trial, and the most wrong ones."""


class ServerConfig(Strict):
    """The endpoint that `summariser: server` asks, OpenAI-compatible."""

    url: Annotated[str, AfterValidator(checked_url)] | None = Field(
        None, description="Its address as far as /v1, such as http://127.0.0.1:8000/v1."
    )
    model: str | None = Field(None, description="The model's name there.")
    api_key_env: str = Field("OPENAI_API_KEY", min_length=1, description="The environment variable with the key.")
    timeout: float = Field(60.0, gt=0, description="Seconds that one answer may take.")
    retries: int = Field(2, ge=0, description="How often a question without a good answer is asked again.")


class SkillsConfig(Strict):
    """Settings of making, checking, keeping and finding skills."""

    summariser: Literal["rules", "policy", "server"] = Field(
        "rules",
        description="Who makes a skill of a task's episodes. rules: no model, the best actions and the feedback on "
        "failures, word for word; policy: the trained model itself; server: another one (`server`).",
    )
    server: ServerConfig = setting(ServerConfig(), when={"summariser": ["server"]})
    max_tokens: int = setting(
        256, when={"summariser": ["policy", "server"]}, ge=16, description="Most tokens of an answer."
    )
    max_characters: int = Field(600, ge=40, description="Most characters of each part of a skill.")
    per_step: int = Field(16, ge=1, description="Skills made in a step at most; tasks of mixed outcome first.")
    shown: int = Field(3, ge=1, description="Skills that a teacher is shown at once at most.")
    capacity: int = Field(512, ge=1, description="Skills in the bank at most; what lifts least goes first.")
    per_task: int = Field(4, ge=1, description="Skills of one task at most.")
    max_age: int = Field(100, ge=1, description="Steps after which a skill not shown and not renewed is forgotten.")
    explore: float = Field(1.0, ge=0, description="UCB's bonus for a task's skills that were seldom shown.")
    min_likeness: float = Field(
        0.2, ge=0, le=1, description="Cosine of rare words from which another task's skill is shown too; 1: never."
    )
    min_support: float = Field(
        0.3, ge=0, le=1, description="Least share of what was done and said in its episodes that a skill must cover."
    )
    min_pdi: float = Field(
        -0.5, description="Least Posterior Distillation Index: below, a skill repeats the last one and adds nothing."
    )
    trials: int = Field(
        16,
        ge=0,
        description="Trials a step, each of a new skill on right and wrong episodes of one task, none of which it was "
        f"made of: at most {EPISODES_EACH} of either, read by the teacher with it and without; 0: shown untried.",
    )
    min_lift: float = setting(
        0.0,
        when={"trials": True},
        description="Nats a token by which a skill must lift right episodes above wrong ones of the same task.",
    )

    @model_validator(mode="after")
    def _the_server_can_be_asked(self) -> SkillsConfig:
        if self.summariser == "server" and not (self.server.url and self.server.model):
            raise ValueError("summariser = server needs server.url (as far as /v1) and server.model")
        return self


class SkillSdConfig(Strict):
    """Settings of `method: skill_sd`."""

    teacher: TeacherConfig = Field(TeacherConfig(weights="live"), description="Who teaches; left out: weights = live.")
    distill: float = Field(0.001, ge=0, description="The teacher's coefficient beside the reward's 1.")
    estimator: Literal["weighted_k3", "k3", "k2", "policy_gradient"] = Field(
        "weighted_k3",
        description="How the sampled token's gap becomes a loss; k3, the naive one, trains the forward KL.",
    )
    max_ratio: float | None = setting(
        2.0,
        when={"estimator": ["weighted_k3", "policy_gradient"]},
        gt=0,
        description="Bound on the ratio of student to old policy; null: none.",
    )
    policy: PolicyConfig = Field(default_factory=PolicyConfig, description="The policy gradient's settings.")
    skills: SkillsConfig = setting(SkillsConfig(), when={"fixed": [None]})
    fixed: str | None = Field(
        None,
        description="Show the teacher this privileged text of the environment in place of skills (`solution`, ...): "
        "self-distillation from fixed solutions beside the reward, to compare with.",
    )
    right_from: float | None = Field(
        None, description="Reward from which an episode is right; null: where the environment calls it solved."
    )
    max_teacher_tokens: int = Field(18_432, ge=8, description="What would be longer for the teacher is not distilled.")
