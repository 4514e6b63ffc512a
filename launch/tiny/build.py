"""`tiny:<env>`: a small model with its own tokenizer, built and warm-started on this machine, and kept.

The warm start is supervised training on scripted episodes, on tasks that are neither trained on nor
evaluated later; what it teaches is in `opd.launch.tiny.recipes`. The result is an ordinary Hugging Face
folder. The same environment, seed and code give the same folder, so it is built once: the name of the folder
holds a digest of what the weights depend on (`_fingerprint`), and of nothing else.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opd.episodes.answers import messages_of
from opd.episodes.tasks import derive_seed, task
from opd.errors import ConfigError
from opd.launch.tiny import definitions
from opd.launch.tiny.exam import Exam
from opd.launch.tiny.learning import optimizers_of, steps_of
from opd.launch.tiny.recipes import Recipe, privileged_phrases
from opd.launch.tiny.skills import RECIPES
from opd.launch.tiny.tokenizer import END, START, build_tokenizer, call_pieces
from opd.models.bars import no_bars
from opd.models.causal import CausalModel
from opd.models.chat import ChatFormat
from opd.models.loading import cache_folder
from opd.teachers import privileged
from opd.teachers.privileged import (
    episode_text,
    in_first_user_message,
    with_attempt,
    with_demonstration,
    with_feedback,
    with_skill,
    with_solution,
)
from opd.types import Message, Sample, Task

logger = logging.getLogger(__name__)

_SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
Write = Callable[[Recipe, int], "EpisodeWriter"]
"""Makes the writer of a warm start's episodes from the recipe and the seed; by default it is `EpisodeWriter`."""
_DIGESTED_AS_CODE = ("env", "plain", "aims")
_LATER_PEAK = 0.5
"""The peak rates of the rounds that a warm start goes on for, as shares of the first one's."""
_FELL_SHORT = "after %d steps the warm start has not come to what it is to: %s. The model is kept as it is."
_WINDOW = 4  # batches whose episodes are sorted by length together, so that little is padding


def build_tiny(name: str, *, seed: int = 0, steps: int | None = None, quiet: bool = False) -> Path:
    """Return the folder of the tiny model for one environment, built if it is not in the cache.

    `steps` shortens the warm start (for tests), whatever the recipe aims at. Safe when two processes build the same
    model at once: each builds its own, and the first to finish keeps the name. Raises ConfigError for an unknown
    environment.
    """
    if name not in RECIPES:
        raise ConfigError(f"model.name = 'tiny:{name}' is unknown. Allowed: {', '.join(f'tiny:{n}' for n in RECIPES)}")
    return build_kept(name, RECIPES[name], seed=seed, steps=steps, quiet=quiet)


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer that the tiny model for an environment has, or will have once it is built."""
    return EpisodeWriter(RECIPES[name], 0).tokenizer


def build_kept(
    name: str,
    recipe: Recipe,
    *,
    seed: int = 0,
    steps: int | None = None,
    quiet: bool = False,
    write: Write | None = None,
) -> Path:
    """Return the folder of a recipe's model, built if it is not in the cache; its name begins with `name`.

    It is as safe as `build_tiny`. The digest in the folder's name sees of `write` what its `first_task` returns.
    """
    folder = cache_folder() / "tiny" / f"{name}-{_fingerprint(recipe, seed, steps, write)}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with no_bars():
            _build(aside, recipe, seed=seed, steps=steps, quiet=quiet, write=write)
        aside.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _build(folder: Path, recipe: Recipe, *, seed: int, steps: int | None, quiet: bool, write: Write | None) -> None:
    model, tokenizer = warm_start(recipe, seed=seed, steps=steps, quiet=quiet, write=write)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fingerprint(recipe: Recipe, seed: int, steps: int | None, write: Write | None = None) -> str:
    """Return a text that changes with all the model depends on and with nothing else: a stale cache is a wrong result.

    That is the code that `_build` runs, what it makes of the first task, the recipe, and the packages that it computes
    with. It takes about 0.2 s; to write all the samples of a warm start, and to digest those, takes 6 to 30 s.
    """
    worlds = [recipe.env, *([recipe.aims.env] if recipe.aims else [])]
    code = {_definition(made) for made in (_build, *(type(make()) for make in worlds), *worlds, recipe.plain)}
    parts_of = [part for part in (recipe, recipe.aims) if part is not None]
    values = [
        (f.name, getattr(part, f.name)) for part in parts_of for f in fields(part) if f.name not in _DIGESTED_AS_CODE
    ]
    first = (write or EpisodeWriter)(recipe, seed).first_task()
    packages = [torch.__version__, transformers.__version__, tokenizers.__version__, np.__version__]
    roles = [_definition(world) for world in worlds]  # the code of one world may be among that of the other
    parts = (definitions.digest(sorted(code)), roles, values, first, seed, steps, packages)
    return sha256(repr(parts).encode()).hexdigest()[:16]


def _definition(made: Any) -> definitions.Name:
    """Return where a class or a function is defined; what stands within something else belongs to that."""
    return made.__module__, made.__qualname__.partition(".")[0]


def warm_start(
    recipe: Recipe, *, seed: int, steps: int | None = None, quiet: bool = False, write: Write | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train a new model on batches of scripted episodes, on one thread; return it with its tokenizer.

    Without `steps` it takes those of the recipe, and rounds of more until the recipe's aims are reached.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small gain little from a second one, which any other process stalls
    try:
        make = write or EpisodeWriter
        exam = None
        if steps is None and recipe.aims is not None:
            exam = Exam(recipe.aims, make(replace(recipe, env=recipe.aims.env), seed))
        return _train(recipe, make(recipe, seed), exam, seed=seed, steps=steps or recipe.steps, quiet=quiet)
    finally:
        torch.set_num_threads(threads)


def _train(
    recipe: Recipe, writer: EpisodeWriter, exam: Exam | None, *, seed: int, steps: int, quiet: bool
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    torch.manual_seed(derive_seed("tiny", seed))
    model = _new_model(writer.tokenizer)
    model.generation_config.eos_token_id = writer.stop_ids
    student = CausalModel(model)
    optimizers = optimizers_of(model, *recipe.rates)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    rounds = [(steps, 1.0)] + ([(exam.aims.steps, _LATER_PEAK)] * exam.aims.rounds if exam else [])
    with Progress(*columns, transient=True, disable=quiet) as progress:
        bar = progress.add_task("warm start")
        for number, (count, peak) in enumerate(rounds):
            progress.update(bar, total=sum(count for count, _ in rounds[: number + 1]))
            batches = _batches(writer, recipe.batch, count)
            for loss in steps_of(student, optimizers, batches, writer.pad_id, count, peak):
                progress.update(bar, advance=1, description=f"warm start, loss {loss:.3f}")
            if exam is None or exam.is_passed(exam.marks(student)):
                break
        else:
            logger.warning(_FELL_SHORT, sum(count for count, _ in rounds), recipe.aims)
    return model.eval(), writer.tokenizer


def _new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **_SHAPE,
    )
    return LlamaForCausalLM(config)


def _batches(writer: EpisodeWriter, size: int, steps: int) -> Iterator[list[Sample]]:
    """Yield batches of episodes of like length, in random order."""
    for start in range(0, steps, _WINDOW):
        count = min(_WINDOW, steps - start)
        window = sorted((writer.sample() for _ in range(count * size)), key=lambda s: len(s.token_ids))
        batches = [window[i * size : (i + 1) * size] for i in range(count)]
        for i in writer.rng.permutation(count):
            yield batches[i]


@dataclass(frozen=True, slots=True)
class _Episode:
    """A scripted episode, played."""

    actions: list[str]
    texts: list[str]
    """The actions as the model writes them."""
    answers: list[list[Message]]
    """The environment's answer to each action but the one that ended the episode."""
    feedback: str | None

    @property
    def text(self) -> str:
        """Return it as it stands in a teacher's prompt."""
        spoken: list[Message] = []
        for text, answer in zip(self.texts, self.answers, strict=True):
            spoken += [{"role": "assistant", "content": text}, *answer]
        return episode_text(spoken)


class EpisodeWriter:
    """Writes scripted episodes as samples, tokenised piece by piece as rollouts are.

    A subclass may make another tokenizer and another chat format, and say the scripted actions otherwise.
    """

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.rng = np.random.default_rng(derive_seed("warm start", seed))
        self._env: Any = recipe.env()
        self._plain = recipe.plain
        self._forms = list(recipe.forms)
        self._shares = np.array(list(recipe.forms.values())) / sum(recipe.forms.values())
        self._seed = seed
        self.written = 0
        self._first, self._tools, _ = self._reset(task(0, split="warm", run_seed=seed))
        self.tokenizer = self._new_tokenizer(recipe)
        self._chat = self._new_chat()
        self._glue: dict[str, list[int]] = {}

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def stop_ids(self) -> int | list[int]:
        """What the model's generation settings say of where a text ends."""
        return int(self.tokenizer.eos_token_id)

    def first_task(self) -> tuple[Any, ...]:
        """Return the tokenizer, its template, and the ids of the first task's prompt."""
        backend = self.tokenizer.backend_tokenizer.to_str()
        return backend, str(self.tokenizer.chat_template), self._chat.start(self._first, self._tools)

    def sample(self, form: str | None = None) -> Sample:
        """Write an episode of the next task, in a context of this form, or of one drawn by its share."""
        form = form or str(self.rng.choice(self._forms, p=self._shares))
        goal = task(self.written, split="warm", run_seed=self._seed)
        self.written += 1
        first, tools, texts = self._reset(goal)
        uninformed = form in ("plain", "other_skill")
        right = self._play(self._plain(self._env, self.rng) if uninformed else self._env.oracle())
        seen = in_first_user_message(first, lambda prompt: self._in_context(prompt, form, goal, texts, right))
        ids = self._chat.start(seen, tools)
        mask = [0] * len(ids)
        for action, answer in zip(right.actions, right.answers, strict=True):
            said = self._said(action)
            glue = self._glue_of(action, answer, said[-1])
            ids += said + glue
            mask += [1] * len(said) + [0] * len(glue)
        return _supervised(ids, mask)

    def _in_context(self, prompt: str, form: str, goal: Task, texts: dict[str, str], right: _Episode) -> str:
        """Return the prompt with privileged text of this form around it."""
        if form == "plain":
            return prompt
        if form in texts:
            return with_solution(prompt, texts[form])
        if form in ("skill", "other_skill"):
            self._reset(goal)
            write = self._env.skill if form == "skill" else self._env.other_skill
            return with_skill(prompt, write(self.rng))
        if form == "demonstration":
            return with_demonstration(prompt, right.text)
        if form == "attempt_right":
            return with_attempt(prompt, right.text, cue=privileged.CUE_RIGHT)
        self._reset(goal)
        wrong = self._play(self._env.blunder(self.rng))
        if form == "attempt_wrong":
            return with_attempt(prompt, wrong.text, cue=privileged.CUE_WRONG)
        assert form == "feedback", form
        assert wrong.feedback is not None, "a blunder without feedback"
        return with_feedback(prompt, wrong.feedback)

    def _reset(self, goal: Task) -> tuple[list[Message], Any, dict[str, str]]:
        observation, info = self._env.reset(seed=goal.seed, options={"split": goal.split, "index": goal.index})
        return messages_of(observation, info), info.get("tools"), info["privileged"]

    def _play(self, actions: list[str]) -> _Episode:
        """Play the episode in which the policy says `actions`, from the reset on."""
        texts, answers = [self._native(action) for action in actions], list[list[Message]]()
        over, info = False, {}
        for text in texts:
            assert not over, "a scripted episode goes on after its end"
            observation, _, over, _, info = self._env.step(text)
            answers.append([] if over else messages_of(observation, info))
        return _Episode(actions, texts, answers, info.get("feedback"))

    # -- how the model speaks -------------------------------------------------------------------------

    def _new_tokenizer(self, recipe: Recipe) -> PreTrainedTokenizerFast:
        return _tokenizer(recipe, self._first, self._tools)

    def _new_chat(self) -> ChatFormat:
        return ChatFormat(self.tokenizer, on_rewrite="append")

    def _native(self, action: str) -> str:
        """Return a scripted action as the model writes it."""
        return action

    def _said(self, action: str) -> list[int]:
        """Return the ids of a scripted action, with the one that ends the turn."""
        return [*self._chat.encode(action), self._chat.end_id]

    def _glue_of(self, action: str, messages: list[Message], last_id: int) -> list[int]:
        """Return the ids after a completion, up to where the assistant speaks again; rendered once for each text."""
        if not messages:
            return []
        key = repr((messages, last_id))
        if key not in self._glue:
            said: Message = {"role": "assistant", "content": self._native(action)}
            asked: list[Message] = [{"role": "user", "content": "x"}, said]
            self._glue[key] = self._chat.extend(asked, messages, self._tools, last_id=last_id).token_ids
        return self._glue[key]


def _supervised(token_ids: list[int], mask: list[int]) -> Sample:
    nothing = [0.0] * len(mask)
    return Sample(
        token_ids=token_ids,
        completion_mask=mask,
        turn=[0] * len(mask),
        sampler_logprobs=[math.nan] * len(mask),
        policy_weight=nothing,
        distill_weight=nothing,
        ce_weight=[float(m) for m in mask],
        advantage=nothing,
        route="ce",
    )


def _tokenizer(recipe: Recipe, first: list[Message], tools: Any) -> PreTrainedTokenizerFast:
    """Make a tokenizer: one id for every word and phrase of the recipe, and for the system block of all tasks."""
    phrases = [*privileged_phrases(), *(call_pieces(tools) if tools else []), *recipe.phrases]
    draft = build_tokenizer(recipe.words, phrases)
    system = [m for m in first if m["role"] == "system"]
    if not (system or tools):
        return draft
    text = str(draft.apply_chat_template([*system, {"role": "user", "content": ""}], tools=tools, tokenize=False))
    block = text.split(START)[1].removeprefix("system\n").split(END)[0]
    return build_tokenizer(recipe.words, [block, *phrases])
