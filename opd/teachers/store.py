"""Scores of a teacher on disk: computed once, read by any number of runs that hold no teacher.

A store is a folder: `store.json` says what its scores depend on, and append-only shards hold sequences of token ids,
the mask of sampled ids, and for each sampled id the teacher's log-prob, the entropy of its distribution and, where the
store has them, its `top_k` likeliest ids. A shard is written aside, flushed and renamed, and its name ends in
the hash of its content: it is whole or absent, and a byte that changed later is found when the shard is opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from opd.disk import write_whole
from opd.errors import DataError
from opd.secrets import redacted

_NAME = re.compile(r"shard-(\d{6})-([0-9a-f]{16})\.safetensors")
_KEY_BYTES = 16
_PER_TOKEN: dict[str, Any] = {"token_ids": np.int32, "mask": np.uint8}
_PER_POSITION: dict[str, Any] = {
    "logprobs": np.float32,
    "entropy": np.float32,
    "top_ids": np.int32,
    "top_logprobs": np.float32,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """Everything that a score depends on beside the scored ids."""

    teacher: str
    """Fingerprint of the teacher's weights (`opd.models.identity`)."""
    tokenizer: str
    """Fingerprint."""
    template: str
    """Fingerprint of the chat template of what it read."""
    temperature: float
    """The logits were divided by it."""
    top_k: int
    """The number of likeliest ids stored at each position; 0 for none."""


class StoredScores(NamedTuple):
    """A teacher's scores of one sequence with N sampled tokens."""

    logprobs: Sequence[float]
    """[N] nats, of the sampled ids."""
    entropy: Sequence[float]
    """[N] nats, of the whole distribution."""
    top_ids: Sequence[Sequence[int]]
    """[N, k] the teacher's likeliest ids; k is the store's `top_k`."""
    top_logprobs: Sequence[Sequence[float]]
    """[N, k] nats."""


class Tokens(NamedTuple):
    """One sequence of a store: ids, and 1 where one was sampled: [T] each."""

    token_ids: Sequence[int]
    mask: Sequence[int]

    @property
    def key(self) -> bytes:
        """A key that equal ids and masks share."""
        ids, mask = (np.asarray(values, dtype) for values, dtype in zip(self, _PER_TOKEN.values(), strict=True))
        return sha256(ids.tobytes() + mask.tobytes()).digest()[:_KEY_BYTES]


class _Place(NamedTuple):
    """The place of an entry in its shard."""

    shard: Path
    tokens: slice
    positions: slice


class Store:
    """A folder of scores, all by the same scorer. Raises DataError where a file is not what was written."""

    def __init__(self, folder: Path, scorer: Scorer, *, about: Mapping[str, Any]) -> None:
        """Open the store in `folder` for `scorer`, or begin it; `about` is kept for human readers, and never compared.

        Raises DataError naming everything that differs, with both values, where another scorer made the store.
        """
        self.folder = folder
        if (folder / "store.json").exists():
            self.scorer, self.about, self.shards = read_header(folder)
            self.check(scorer)
        else:
            self.scorer, self.about, self.shards = scorer, dict(about), 0
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._write_header()
            except OSError as error:
                raise DataError(f"the store {folder} cannot be begun: {error}") from error
        self._places: dict[bytes, _Place] = {}
        for shard in _shards(folder):
            self._index(shard)

    def _write_header(self) -> None:
        header = asdict(self.scorer) | {"about": redacted(self.about), "shards": self.shards}
        write_whole(self.folder / "store.json", json.dumps(header, indent=1).encode())

    def check(self, scorer: Scorer) -> None:
        """Raise DataError, naming everything that differs, where `scorer` did not make the store."""
        there, here = asdict(self.scorer), asdict(scorer)
        differing = [
            f"{name} ({there[name]!r} there, {here[name]!r} here)" for name in there if there[name] != here[name]
        ]
        if differing:
            raise DataError(
                f"the store {self.folder} was made with another {' and another '.join(differing)}. Delete it, choose "
                "another folder, or go on with what it was made with"
            )

    def __len__(self) -> int:
        """The number of sequences."""
        return len(self._places)

    def __contains__(self, sequence: Tokens) -> bool:
        return sequence.key in self._places

    @property
    def positions(self) -> int:
        """The number of sampled tokens that have scores."""
        return sum(place.positions.stop - place.positions.start for place in self._places.values())

    @property
    def bytes(self) -> int:
        """The size on disk, in bytes."""
        return sum(path.stat().st_size for path in [*_shards(self.folder), self.folder / "store.json"])

    def sequences(self) -> Iterator[Tokens]:
        """Yield every scored sequence, shard by shard."""
        for place in self._places.values():
            yield Tokens(*(self._read(place, name, place.tokens) for name in _PER_TOKEN))

    def get(self, sequence: Tokens) -> StoredScores:
        """The scores of a sequence. Raises DataError where it has none."""
        place = self._places.get(sequence.key)
        if place is None:
            raise DataError(
                f"the store {self.folder} holds no scores of a sequence of {len(sequence.token_ids)} tokens; score it "
                "first (opd precompute)"
            )
        return StoredScores(*(self._read(place, name, place.positions) for name in _PER_POSITION))

    def append(self, scored: Sequence[tuple[Tokens, StoredScores]]) -> None:
        """Add a shard of sequences, none of which may be there yet, whole or not at all.

        Raises DataError, with what was there before untouched, when the disk is full or not writable.
        """
        keys = [sequence.key for sequence, _ in scored]
        twice = len(set(keys)) < len(keys) or any(key in self._places for key in keys)
        if twice or not scored:
            raise DataError("a shard must hold sequences, and none that the store holds already" if twice else "empty")
        content = save(_columns(scored, keys, self.scorer.top_k))
        taken = {_number(shard) for shard in _shards(self.folder)}
        number = next(n for n in range(len(taken) + 1) if n not in taken)  # also in the place of one that was deleted
        path = self.folder / f"shard-{number:06d}-{sha256(content).hexdigest()[:16]}.safetensors"
        try:
            write_whole(path, content)
            self.shards = max(self.shards, number + 1)
            self._write_header()
        except OSError as error:
            raise DataError(
                f"the store {self.folder} cannot be written: {error}. The {len(self)} sequences that were scored "
                "before are kept; make room, and resume the run"
            ) from error
        self._index(path)

    def _index(self, shard: Path) -> None:
        """Verify a shard, and note the places of its entries."""
        columns = _verified(shard)
        tokens, positions = (np.concatenate([[0], columns[name].cumsum()]).tolist() for name in ("lengths", "counts"))
        for n, key in enumerate(columns["keys"]):
            place = _Place(shard, slice(tokens[n], tokens[n + 1]), slice(positions[n], positions[n + 1]))
            if self._places.setdefault(key.tobytes(), place) is not place:
                raise DataError(f"{shard} holds a sequence that another shard of the store holds already")

    def _read(self, place: _Place, name: str, rows: slice) -> list[Any]:
        with safe_open(place.shard, framework="numpy") as file:
            found: list[Any] = file.get_slice(name)[rows].tolist()
        return found


def read_header(folder: Path) -> tuple[Scorer, dict[str, Any], int]:
    """Read what a store's scores depend on, what else is known about it, and how many shards it had at most.

    Raises DataError where there is no store.
    """
    try:
        data = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        about, shards = dict(data.pop("about")), data.pop("shards")
        if type(shards) is not int:
            raise TypeError(f"shards = {shards!r}")
        return TypeAdapter(Scorer).validate_json(json.dumps(data), strict=True), about, shards
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder} is no store, or its store.json is damaged: {error}") from error


def open_store(folder: Path) -> Store:
    """Open an existing store, whoever scored it. Raises DataError where there is none, or it is damaged."""
    scorer, about, _ = read_header(folder)
    return Store(folder, scorer, about=about)


def count(folder: Path) -> int:
    """Count the sequences by what the shards say, without verifying them; 0 where there is no store."""
    total = 0
    for shard in _shards(folder):
        try:
            with safe_open(shard, framework="numpy") as file:
                total += file.get_slice("lengths").get_shape()[0]
        except (OSError, SafetensorError):  # it is damaged, and will be told when it is read
            continue
    return total


def verify(folder: Path) -> list[str]:
    """List what is wrong with a store, shard by shard; empty for a whole one."""
    try:
        _, _, shards = read_header(folder)
    except DataError as error:
        return [str(error)]
    there = {_number(path) for path in _shards(folder)}
    missing = sorted(set(range(max(shards, *there, 0))) - there)
    problems = [f"{folder}: shard {n} is missing; what it held is scored anew when the run goes on" for n in missing]
    for shard in _shards(folder):
        try:
            _check_entries(shard, _verified(shard))
        except DataError as error:
            problems.append(str(error))
    if not problems:
        try:
            open_store(folder)
        except DataError as error:
            problems.append(str(error))
    return problems


def _check_entries(shard: Path, columns: Mapping[str, NDArray[Any]]) -> None:
    """Raise DataError unless each key is that of its sequence, and each sampled token has a finite log-prob."""
    ends = columns["lengths"].cumsum()
    for n, (end, length) in enumerate(zip(ends, columns["lengths"], strict=True)):
        rows = slice(end - length, end)
        sequence = Tokens(columns["token_ids"][rows].tolist(), columns["mask"][rows].tolist())
        if sequence.key != columns["keys"][n].tobytes() or sum(sequence.mask) != columns["counts"][n]:
            raise DataError(f"{shard}: entry {n} is not the sequence that its key says")
    if not np.isfinite(columns["logprobs"]).all():
        raise DataError(f"{shard} holds log-probs that are not finite")


def _columns(
    scored: Sequence[tuple[Tokens, StoredScores]], keys: Sequence[bytes], top_k: int
) -> dict[str, NDArray[Any]]:
    """Pack entries into a shard's tensors: one entry after the other, with their lengths.

    Raises DataError for scores that do not fit their sequence.
    """
    for sequence, scores in scored:
        counts = {len(values) for values in scores} | {sum(sequence.mask)}
        if len(counts) != 1 or any(len(row) != top_k for row in (*scores.top_ids, *scores.top_logprobs)):
            raise DataError(
                f"a sequence with {sum(sequence.mask)} sampled tokens has scores of {[len(v) for v in scores]}, or not "
                f"the top {top_k} of each"
            )
    columns: dict[str, NDArray[Any]] = {
        "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, _KEY_BYTES),
        "lengths": np.array([len(sequence.token_ids) for sequence, _ in scored], np.int64),
        "counts": np.array([sum(sequence.mask) for sequence, _ in scored], np.int64),
    }
    for n, (name, dtype) in enumerate(_PER_TOKEN.items()):
        columns[name] = np.array([value for sequence, _ in scored for value in sequence[n]], dtype)
    for n, (name, dtype) in enumerate(_PER_POSITION.items()):
        rows = [value for _, scores in scored for value in scores[n]]
        columns[name] = np.array(rows, dtype).reshape((len(rows), top_k) if name.startswith("top") else (len(rows),))
    return columns


def _verified(shard: Path) -> dict[str, NDArray[Any]]:
    """Read a shard's tensors and compare its content with the hash in its name. Raises DataError."""
    match = _NAME.fullmatch(shard.name)
    assert match is not None
    try:
        content = shard.read_bytes()
        if sha256(content).hexdigest()[:16] != match.group(2):
            raise DataError(f"{shard} is damaged: it is not what was written. Delete it; it is then scored anew")
        with safe_open(shard, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{shard} cannot be read: {error}. Delete it; it is then scored anew") from error


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("shard-*.safetensors") if _NAME.fullmatch(path.name))


def _number(shard: Path) -> int:
    return int(shard.name.split("-")[1])
