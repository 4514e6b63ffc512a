"""Trains the look-up agent in the dialects of several families: OPSD, then SFT on rows in OpenAI's form.

    python benchmarks/templates.py                          # OPSD with chatml, glm, gpt-oss; SFT with chatml, glm
    python benchmarks/templates.py --only glm --seeds 0     # one dialect, one seed

Each dialect has a small model of its own, built and warm-started as `tiny:lookup` is, on the same episodes. Its
tokenizer has the special tokens of the family, its chat template is the one that TRL carries, and what the model says
is written by that template: thoughts, calls, the ends of turns. What is fixed in a conversation is one token between
two special ones, so that prompts stay short. A run that has finished is kept in the folder of results and not run
again.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from opd.envs.worlds.lookup import LookupEnv
from opd.episodes.answers import messages_of
from opd.episodes.tasks import task
from opd.formats import ToolCall, read_reply
from opd.launch.checks.loading import config_from
from opd.launch.run.build import build
from opd.launch.run.out import remove_run
from opd.launch.settings.overrides import merge
from opd.launch.settings.reader import read_settings
from opd.launch.tiny.build import EpisodeWriter, Write, build_kept
from opd.launch.tiny.recipes import LOOKUP, Recipe, privileged_phrases
from opd.launch.tiny.tokenizer import Dialect, build_tokenizer
from opd.launch.train import train
from opd.models.chat import ChatFormat
from opd.tracking.intervals import wilson
from opd.types import Message, TrajectoryGroup

DAY = "2026-01-01"
"""The date that templates are told: a prompt that changes from day to day is not one token."""
MARK = "opdMark"
"""Stands for what changes from conversation to conversation."""
QUIET = {"wandb": "disabled", "console": False, "plot": False}
OPSD = Path(__file__).resolve().parents[1] / "examples" / "opsd.yaml"


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the models of a family are published: the name of TRL's template, the tokens, where texts end."""

    template: str
    special: tuple[str, ...]
    """Markup that is not special, such as GLM's `<tool_call>`, stands within phrases."""
    eos: str
    ends: tuple[str, ...]
    """The texts of `eos_token_id` in the generation settings."""
    warm: int | None = None
    """The updates of its warm start, where those of `tiny:lookup` are too few for it to follow a plan."""

    def dialect(self) -> Dialect | None:
        """Return it with its template; None where TRL is not installed, or no longer carries it."""
        found = find_spec("trl")
        file = Path(str(found and found.origin)).parent / "chat_templates" / f"{self.template}.jinja"
        if not file.is_file():
            return None
        text = file.read_text(encoding="utf-8")
        return Dialect(special=self.special, end=self.eos, template=text)


FAMILIES = {
    "glm": Family(
        template="glm4moe",
        special=("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        eos="<|endoftext|>",
        ends=("<|endoftext|>", "<|user|>", "<|observation|>"),
        warm=750,
    ),
    "gpt-oss": Family(
        template="gptoss",
        special=(
            *("<|startoftext|>", "<|endoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|constrain|>"),
            *("<|end|>", "<|return|>", "<|call|>"),
        ),
        eos="<|return|>",
        ends=("<|return|>", "<|endoftext|>", "<|call|>"),
    ),
}
DIALECTS = ("chatml", *FAMILIES)


# -- a model for each dialect -----------------------------------------------------------------------------


class DialectWriter(EpisodeWriter):
    """Writes the episodes of a recipe in another dialect: each call is what the template makes of it."""

    def __init__(self, dialect: Dialect, ends: Sequence[str], recipe: Recipe, seed: int) -> None:
        self._dialect = dialect
        self._ends = ends
        self._spoken: dict[str, list[int]] = {}
        super().__init__(recipe, seed)
        self._env.read_calls_as(self._chat.format.name, starts_thinking=self._chat.starts_thinking)

    @property
    def stop_ids(self) -> list[int]:
        return list(self.tokenizer.convert_tokens_to_ids(list(self._ends)))

    def first_task(self) -> tuple[Any, ...]:
        """Return some episodes too: on them it depends whether a model of the cache is this dialect's."""
        episodes = [self.sample() for _ in range(50)]
        return *super().first_task(), self.stop_ids, [(s.token_ids, s.completion_mask) for s in episodes]

    def _new_tokenizer(self, recipe: Recipe) -> Any:
        pieces = [*privileged_phrases(), *recipe.phrases]
        words, fixed = _fixed(self._dialect, self._first, self._tools)
        return build_tokenizer([*recipe.words, *words], [*fixed, *pieces], self._dialect)

    def _new_chat(self) -> ChatFormat:
        return ChatFormat(self.tokenizer, on_rewrite="append", date=date.fromisoformat(DAY), stop_ids=self.stop_ids)

    def _native(self, action: str) -> str:
        return self._chat.text(self._said(action))

    def _said(self, action: str) -> list[int]:
        if action not in self._spoken:
            self._spoken[action] = self._chat.spoken(self._first, _calling(action), self._tools)
        return self._spoken[action]


def _calling(action: str) -> Message:
    """Return the message of an assistant that makes the call of a scripted action."""
    [call] = read_reply(action, "hermes").calls
    assert isinstance(call, ToolCall), action
    function = {"name": call.name, "arguments": call.arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def _fixed(dialect: Dialect, first: list[Message], tools: Any) -> tuple[list[str], list[str]]:
    """Return the words and the phrases that stand between special tokens in every conversation.

    A special token that a message quotes is none: it is two phrases.
    """
    chat = ChatFormat(build_tokenizer([], [], dialect), date=date.fromisoformat(DAY))
    asked: list[Message] = [{**m, "content": MARK} if m["role"] == "user" else m for m in first]
    said: list[str] = []
    others = [chat.template.render(asked, tools, generate=True)]
    for schema in tools:
        function = schema["function"]
        arguments = dict.fromkeys(function["parameters"]["properties"], MARK)
        calls = [{"type": "function", "function": {"name": function["name"], "arguments": arguments}}]
        ids = chat.spoken(asked, {"role": "assistant", "content": "", "tool_calls": calls}, tools)
        said.append(chat.text(ids))
        history: list[Message] = [*asked, {"role": "assistant", "content": said[-1]}]
        result: Message = {"role": "tool", "name": function["name"], "content": MARK}
        glue = chat.extend(history, [result], tools, last_id=ids[-1]).token_ids
        others.append(str(chat.tokenizer.decode(glue)))
    border = "|".join(map(re.escape, [*dialect.special, MARK]))
    found = {part for text in (*said, *others) for part in re.split(border, text) if part}
    quoted = [text for text in dialect.special if any(text in whole for whole in said)]
    words = sorted(part for part in found if part.isalpha())
    phrases = sorted(part for part in found if len(part) > 1 and not part.isalpha())
    return words, [*phrases, *(part for text in quoted for part in (text[:2], text[2:]))]


def make_writer(name: str) -> Write | None:
    """Return what writes a dialect's episodes; None where its template is not installed."""
    if name == "chatml":
        return EpisodeWriter
    dialect = FAMILIES[name].dialect()
    return None if dialect is None else partial(DialectWriter, dialect, FAMILIES[name].ends)


# -- runs -----------------------------------------------------------------------------------------------------


def settings(arguments: argparse.Namespace, name: str, model: Path, seed: int, own: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of one run: the example of OPSD, of so many steps, with `own` in place of what differs."""
    example = read_settings(OPSD)
    if "method" in own:
        del example["opsd"]
    common = {
        "out": str(arguments.out / name),
        "seed": seed,
        "model": str(model),
        "chat": {"date": DAY},
        "tracking": QUIET,
        **{f"eval.{key}": value for key, value in {"tasks": arguments.eval, "every": 0, "stop_at": None}.items()},
        **{f"train.{key}": value for key, value in {"steps": arguments.steps, "lr": 1e-3, "warmup_steps": 0}.items()},
    }
    return merge(merge(example, common), own)


def run(data: dict[str, Any]) -> dict[str, Any]:
    """Train, unless it was done before, and measure before and after."""
    out = Path(data["out"])
    kept = out.with_suffix(".json")
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if found["settings"] == data:
            return found
    if out.exists():
        remove_run(out)
    before = measure(data)
    since = time.perf_counter()
    train(config_from(data))
    seconds = time.perf_counter() - since
    after = measure(data | {"model": str(out / "export"), "out": str(out / "measure")})
    found = {"before": before, "after": after, "seconds": seconds, "settings": data}
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def measure(data: dict[str, Any]) -> dict[str, Any]:
    """Play the held-out tasks: which were solved, the tokens of a first prompt, turns without a call to be read.

    Where a teacher sees more, also which the model solves with that in its prompt.
    """
    built = build(config_from(data), stage=None)
    taught: list[TrajectoryGroup] = []
    try:
        _, groups = built.evaluate()
        if "opsd" in data:
            _, taught = built.evaluate(rewrite=built.method.teacher_messages)
        form = built.method.chat.format.name
    finally:
        built.close()
    episodes = [episode for group in groups for episode in group.trajectories]
    replies = [read_reply(turn.text, form) for episode in episodes for turn in episode.turns]
    unread = [not reply.calls or any(not isinstance(call, ToolCall) for call in reply.calls) for reply in replies]
    return {
        "solved": [episode.success for episode in episodes],
        "taught": [episode.success for group in taught for episode in group.trajectories],
        "prompt": fmean(len(episode.turns[0].prompt_ids) for episode in episodes),
        "turns": len(unread),
        "unread": sum(unread),
    }


def write_rows(path: Path, count: int) -> None:
    """Write perfect episodes of training tasks as people store them: OpenAI's form, arguments as JSON text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in _rows(count)), encoding="utf-8")


def _rows(count: int) -> Iterator[dict[str, Any]]:
    env = LookupEnv()
    for number in range(count):
        goal = task(number, split="train", run_seed=1)
        observation, info = env.reset(seed=goal.seed, options={"split": goal.split, "index": goal.index})
        messages, tools = messages_of(observation, info), info["tools"]
        for place, action in enumerate(env.oracle()):
            said = _calling(action)
            [call] = said["tool_calls"]
            call["id"] = f"call_{number}_{place}"
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
            messages.append({**said, "content": None})
            observation, _, over, _, info = env.step(action)
            for result in [] if over else messages_of(observation, info):
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result["content"]})
        yield {"messages": messages, "tools": tools}


# -- what came out --------------------------------------------------------------------------------------------


def report(title: str, found: dict[str, list[dict[str, Any]]]) -> None:
    """Print a row for each dialect: the seeds together, then each."""
    print(f"\n{title}\n")
    print(
        "| dialect | before % | with its plan % | after % | 95% interval | by seed | tokens a prompt "
        "| calls unreadable | seconds |"
    )
    print("| --- | ---: | ---: | ---: | --- | --- | ---: | ---: | ---: |")
    for name, runs in found.items():
        before, after = ([solved for one in runs for solved in one[when]["solved"]] for when in ("before", "after"))
        low, high = wilson(sum(after), len(after))
        taught = [solved for one in runs for solved in one["before"]["taught"]]
        plan = f"{100 * fmean(taught):.1f}" if taught else ""
        by_seed = ", ".join(f"{100 * fmean(one['after']['solved']):.1f}" for one in runs)
        unread = " to ".join(
            f"{sum(one[when]['unread'] for one in runs) / sum(one[when]['turns'] for one in runs):.1%}"
            for when in ("before", "after")
        )
        print(
            f"| {name} | {100 * fmean(before):.1f} | {plan} | {100 * fmean(after):.1f} | "
            f"{100 * low:.1f} to {100 * high:.1f} | {by_seed} | "
            f"{fmean(one['after']['prompt'] for one in runs):.0f} | {unread} | "
            f"{fmean(one['seconds'] for one in runs):.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=DIALECTS, default=list(DIALECTS), help="some of the dialects")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help="updates of a run")
    parser.add_argument("--warm-steps", type=int, help="updates of a warm start; by default those of tiny:lookup")
    parser.add_argument("--rows", type=int, default=2000, help="conversations for the SFT; 0 leaves it out")
    parser.add_argument("--eval", type=int, default=300, help="held-out tasks")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-templates"))
    arguments = parser.parse_args()
    models: dict[str, Path] = {}
    for name in arguments.only:
        write = make_writer(name)
        if write is None:
            print(f"{name} is skipped: TRL's {FAMILIES[name].template}.jinja is not installed")
            continue
        label = "lookup" if name == "chatml" else f"lookup-{name}"
        steps = arguments.warm_steps or (FAMILIES[name].warm if name in FAMILIES else None)
        models[name] = build_kept(label, LOOKUP, steps=steps, quiet=True, write=write)

    def runs(kind: str, names: Sequence[str], own: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
        return {
            name: [
                run(settings(arguments, f"{kind}-{name}-{seed}", models[name], seed, own)) for seed in arguments.seeds
            ]
            for name in names
        }

    report("OPSD", runs("opsd", list(models), {}))
    names = [name for name in models if name != "gpt-oss"]
    if arguments.rows and names:
        path = arguments.out / f"rows-{arguments.rows}.jsonl"
        write_rows(path, arguments.rows)
        own = {"method": "sft", "sft": {"source": "file", "file": str(path)}, "train.lr": 3e-4}
        report(f"SFT on {arguments.rows} rows", runs("sft", names, own))


if __name__ == "__main__":
    main()
