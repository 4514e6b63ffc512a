"""`opd store inspect` and `opd store verify`: what a store of a teacher's scores holds, and whether it is whole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from opd.errors import DataError
from opd.teachers.store import Tokens, open_store, verify


def inspect(folder: Path) -> list[tuple[str, str]]:
    """Return lines about a store: a name, its value in words. Raises DataError if there is none, or it is damaged."""
    store = open_store(store_of(folder))
    scorer, about = store.scorer, store.about
    trained = about.get("sft_teacher")
    same = "not known" if trained is None else "the same" if trained == scorer.teacher else f"another one, {trained}"
    turns = Counter(_turns(tokens) for tokens in store.sequences())
    sampled = store.positions
    return [
        ("teacher", f"{about.get('name')}, weights {scorer.teacher}"),
        ("teacher of the SFT", same),
        ("student", f"weights {about.get('student')}"),
        ("tokenizer", scorer.tokenizer),
        ("chat template", scorer.template),
        ("temperature", f"{scorer.temperature:g}"),
        ("top k", str(scorer.top_k) if scorer.top_k else "none, the sampled ids alone"),
        ("sequences", f"{len(store):,}"),
        ("positions", f"{sampled:,} sampled tokens with scores"),
        ("turns", ", ".join(f"{n}: {count:,}" for n, count in sorted(turns.items())) or "none"),
        ("size", f"{store.bytes:,} bytes, {store.bytes / max(1, sampled):.1f} a position"),
    ]


def problems(folder: Path) -> list[str]:
    """Return what is wrong with a store, a sentence each; nothing for one that is whole."""
    return verify(store_of(folder))


def store_of(folder: Path) -> Path:
    """Return the store's folder: the one given, or one in a run's data. Raises DataError if there is none."""
    for place in (folder, folder / "store", folder / "data/store"):
        if (place / "store.json").is_file():
            return place
    raise DataError(f"{folder} holds no store: there is no store.json in it, in store/ or in data/store/")


def _turns(tokens: Tokens) -> int:
    """Count the stretches of sampled tokens."""
    return sum(now > before for before, now in zip([0, *tokens.mask], tokens.mask, strict=False))
