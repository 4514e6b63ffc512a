"""Takes single-turn tasks from a table: a prompt column, reward functions, and columns that only a teacher sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from opd.envs.scoring import Member, Scorer
from opd.envs.splits import disjoint
from opd.envs.tables import Row, Table, by_split, check_rows, checked_prompt
from opd.envs.text_env import Reply, Start, TextEnv
from opd.errors import ConfigError, EnvError
from opd.rewards import Rewards, Rubric, Score
from opd.types import Message


class DatasetEnv(TextEnv):
    """Shows one row and takes one answer. `metadata["tasks"]` counts the rows of each split; `index` picks one.

    Args:
        path: a .jsonl, .json, .csv or .parquet file; or one for each split, `{train: FILE, eval: FILE}`; or a
            folder or hub id that `datasets` loads. Every row is looked at before an episode begins.
        columns: the types of columns, `{age: int}`: `str`, `int`, `float`, `bool` or `json`. Without one a cell of a
            .csv is the text that it is.
        rewards: reward functions in TRL's signature: built-in names, import paths `package.module:function`, or
            functions; one, a list, or a mapping to their weights (see `opd.rewards.Rubric`). Columns are passed by
            name.
        reward_timeout: seconds that one reward function may take.
        name: the configuration of a hub data set.
        splits: for a data set that has splits of its own, which of them are train, eval and warm.
        prompt_column: the user message, or a list of messages.
        system: a system message to put before each prompt.
        privileged_columns: which columns the teacher may see, under which names: `{solution: COLUMN}`.
        answer_column: the column that reward functions get as `answer`, where it is called otherwise.
        conversational: give reward functions messages even where the prompts are strings, as `trl.rewards` needs.
        success_threshold: a total reward of at least this is a success.
        held_out: the share of prompts held out for eval, by a stable hash, where no eval split is given; of rows, where
            all have the same prompt.
    """

    def __init__(
        self,
        path: str | Mapping[str, str],
        *,
        rewards: Rewards,
        name: str | None = None,
        splits: Mapping[str, str] | None = None,
        columns: Mapping[str, str] | None = None,
        prompt_column: str = "prompt",
        system: str | None = None,
        privileged_columns: Mapping[str, str] | None = None,
        answer_column: str | None = None,
        conversational: bool = False,
        success_threshold: float = 1.0,
        reward_timeout: float = 60.0,
        held_out: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 < held_out < 1:
            raise ConfigError(f"held_out = {held_out} must be a share between 0 and 1, both excluded")
        self.prompt_column = prompt_column
        self.system = system
        self.privileged_columns = dict(privileged_columns or {})
        self.answer_column = answer_column
        self.conversational = conversational
        self.success_threshold = success_threshold
        self.rubric = Rubric(rewards, time_limit=reward_timeout)
        self._scorer = Scorer(self.rubric, success_threshold, self._feedback)
        tables = by_split(path, name, splits, columns)
        for table in tables.values():
            self._check_columns(table)
        self._rows = disjoint(tuple(tables.items()), prompt_column, held_out)
        self.metadata = {**self.metadata, "tasks": {split: len(rows) for split, rows in self._rows.items()}}
        self._row: Row = {}
        self._prompt: str | list[Message] = ""

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        rows = self._rows[split]
        number = int(rng.integers(len(rows))) if index is None else index
        if not 0 <= number < len(rows):
            raise EnvError(f"index {number} is outside the {split} split, which has {len(rows)} rows")
        self._row = rows[number]
        self._prompt = checked_prompt(self._row[self.prompt_column], where=f"{self.prompt_column}, {split} {number}")
        privileged = {key: str(self._row[column]) for key, column in self.privileged_columns.items()}
        return Start(prompt=self._prompt, system=self.system, privileged=privileged)

    def respond(self, action: str) -> Reply:
        return self._scorer.reply(self._member(action), self.trainer)

    def score_group(self, members: Sequence[Member], ids: Sequence[Sequence[int]]) -> list[Reply]:
        return self._scorer.group(members, ids, self.trainer)

    def close(self) -> None:
        self.rubric.close()
        super().close()

    def _member(self, action: str) -> Member:
        columns = {column: value for column, value in self._row.items() if column not in RESERVED}
        if self.answer_column is not None:
            columns["answer"] = self._row[self.answer_column]
        prompt = self._prompt
        if isinstance(prompt, str) and not self.conversational:
            return Member(prompt=prompt, completion=action, columns=columns)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return Member(prompt=messages, completion=[{"role": "assistant", "content": action}], columns=columns)

    def _feedback(self, score: Score) -> str:
        parts = ", ".join(
            f"{name}: {'no score' if part is None else f'{part:g}'}" for name, part in score.parts.items()
        )
        return f"The answer scored {score.total:g}; {self.success_threshold:g} is needed ({parts})."

    def _check_columns(self, table: Table) -> None:
        table.require(self.prompt_column, setting="prompt_column")
        for key, column in self.privileged_columns.items():
            table.require(column, setting=f"privileged_columns.{key}")
        if self.answer_column is not None:
            table.require(self.answer_column, setting="answer_column")
        renamed = [] if self.answer_column is None else ["answer"]
        offered = [*(column for column in table.columns if column not in RESERVED), *renamed]
        self.rubric.require(offered, table=table.path)
        named = [] if self.answer_column is None else [self.answer_column]
        check_rows(table, self.prompt_column, (self.prompt_column, *self.privileged_columns.values(), *named))


RESERVED = ("prompt", "prompts", "completion", "completions", "completion_ids")
"""Columns that are not passed on: TRL keeps these names for its own arguments."""
