"""Who teaches in a run: the student itself, another model beside it, or one behind servers."""

from __future__ import annotations

import os

from opd.backends import deepspeed_json
from opd.engines.scoring import VllmScorer
from opd.engines.vllm_http import Server
from opd.launch.run.backends import filled_json
from opd.launch.run.models import is_in_slices
from opd.launch.settings.config import Config
from opd.losses import Distill
from opd.models.causal import CausalModel
from opd.models.config import ModelConfig
from opd.models.identity import weights_fingerprint
from opd.models.loading import load_teacher
from opd.ranks.ranks import Ranks
from opd.teachers.served import ServedTeacher
from opd.teachers.teacher import Teacher
from opd.trainers.loop.stage import Stage


def make_teacher(
    config: Config, stage: Stage, student: CausalModel, other: ModelConfig | None, ranks: Ranks
) -> Teacher:
    """Make the stage's teacher. Another model than the student is cut into slices where the student is, or only asked
    where servers hold it."""
    teaching = stage.teacher
    if other is None or teaching.model is None:
        return Teacher(teaching, student)
    if teaching.servers:
        served = _served_teacher(stage, student)
        named = f"served: {teaching.model}"
        return Teacher(teaching, student, served=served, fingerprint=named, close=served.scorer.close)
    sharded = is_in_slices(config)
    model = ranks.agree(lambda: load_teacher(other, student, device="cpu" if sharded else None))
    fingerprint = weights_fingerprint(model)
    if not sharded:
        return Teacher(teaching, student, model, fingerprint=fingerprint)
    from opd.backends.zero import ZeroModel

    held = ZeroModel(model, deepspeed_json.reading(filled_json(config, config.train, model, ranks)))
    return Teacher(teaching, student, model, fingerprint=fingerprint, look=held.look, close=held.close)


def _served_teacher(stage: Stage, student: CausalModel) -> ServedTeacher:
    teaching, distill = stage.teacher, stage.losses.distill
    key = os.environ.get(teaching.api_key_env)
    servers = [Server(url, key=key, timeout=teaching.timeout, connections=16) for url in teaching.servers]
    scorer = VllmScorer(servers, vocabulary=student.vocabulary, retries=4, restart_timeout=300.0)
    return ServedTeacher(scorer, distill.divergence.top_k or 0 if isinstance(distill, Distill) else 0)
