"""Comparing tokenizers, and fingerprints of tokenizers, chat templates and weights.

A teacher scores the ids that the student sampled, so an id must mean the same to both. Everything that decides about
this is compared, names of classes or files are not. The tokens that end a sentence or pad a batch are not compared
either: a base model and its instruction-tuned teacher often differ in them, and no score depends on them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from opd.errors import ModelError
from opd.models.sharding import whole_in_turn


def tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The parts that decide which ids a text becomes, and which text an id is; JSON-serialisable."""
    added = {token.content: [number, token.special] for number, token in tokenizer.added_tokens_decoder.items()}
    parts: dict[str, Any] = {"vocabulary": tokenizer.get_vocab(), "added tokens": added}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        whole = json.loads(backend.to_str())
        parts["merges"] = whole["model"].get("merges")
        parts["normaliser"], parts["pre-tokeniser"] = whole["normalizer"], whole["pre_tokenizer"]
    return parts


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint the ids that a tokenizer gives, whatever its template and its name."""
    return fingerprint(tokenizer_parts(tokenizer))


def template_fingerprint(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> str:
    """Fingerprint a chat template together with the arguments that are passed to it."""
    return fingerprint([tokenizer.chat_template, dict(kwargs)])


def weights_fingerprint(model: nn.Module) -> str:
    """Fingerprint names, types and values of all weights; with sharded ones all ranks call it and get the same."""
    digest = sha256()
    for name, weight in whole_in_turn(model):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def fingerprint(value: Any) -> str:
    """Fingerprint plain data: 16 hexadecimal digits."""
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_same_tokenizer(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, *, names: tuple[str, str]
) -> None:
    """Raise ModelError, naming both models and what differs, unless every id means the same to both."""
    ours, theirs = tokenizer_parts(student), tokenizer_parts(teacher)
    found = [_difference(part, ours.get(part), theirs.get(part)) for part in ours if ours[part] != theirs.get(part)]
    if found:
        raise ModelError(
            f"the teacher {names[1]!r} (tokenizer {fingerprint(theirs)}) does not have the tokenizer of the student "
            f"{names[0]!r} ({fingerprint(ours)}): {'; '.join(found)}. A teacher scores the student's own token ids; "
            "choose a teacher of the same family"
        )


def _difference(part: str, ours: Any, theirs: Any) -> str:
    """Describe one part in which two tokenizers differ, by its first example."""
    if part not in ("vocabulary", "added tokens"):
        return f"other {part}"
    differing = (token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token))
    token = min(differing, key=lambda token: (token in ours) + (token in theirs))
    return (
        f"{part}: {len(ours)} entries of the student, {len(theirs)} of the teacher, and {token!r} is "
        f"{_show(ours.get(token))} to the one, {_show(theirs.get(token))} to the other"
    )


def _show(value: Any) -> str:
    return "unknown" if value is None else str(value)
