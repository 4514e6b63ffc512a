"""Measures how long a round of rollouts takes when environments are slow, and now and then very slow.

    OMP_NUM_THREADS=1 python benchmarks/rollout.py            # the table of docs/rollouts.md, about 4 minutes
    OMP_NUM_THREADS=1 python benchmarks/rollout.py --quick    # the same in small

One small random model plays episodes with a tool whose latency is lognormal (seeded: every loop waits for the same
times). Each turn samples the same number of tokens and is taken for a call of the tool; the last one ends the
episode. The table compares the scheduler, the same scheduler with a barrier at each turn, and the tool loop of TRL's
GRPOTrainer (its rollouts alone: no reward, no loss). No loop can beat the slower of pure generation and of the
longest episode, played alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any
from unittest.mock import patch

import gymnasium
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opd.engines.base import Sampling
from opd.engines.transformers import TransformersEngine
from opd.envs import TextSpace
from opd.envs.tools import Tool
from opd.episodes.config import RolloutConfig
from opd.episodes.scheduler import RolloutScheduler
from opd.episodes.tasks import task
from opd.launch.tiny.tokenizer import build_tokenizer
from opd.models.causal import CausalModel
from opd.models.chat import ChatFormat

PROMPT = "Look the number up, and say it."
ANSWER = "Look the number up."


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Says what is played. `latencies` is [episodes, turns - 1], in seconds: the last turn ends the episode at once."""

    latencies: np.ndarray
    turns: int
    tokens: int
    """Sampled in each turn."""

    @property
    def episodes(self) -> int:
        return len(self.latencies)


@dataclass(slots=True)
class Clock:
    """Counts the wall seconds of a round, and how many of them some model was generating."""

    wall: float = 0.0
    generation: float = 0.0

    @contextmanager
    def round(self) -> Iterator[None]:
        since = time.perf_counter()
        yield
        self.wall = time.perf_counter() - since

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the call so that its time counts as generation."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            since = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.generation += time.perf_counter() - since

        return timed


def look_up(page: str) -> str:
    """Look a page up.

    Args:
        page: the name of the page.
    """
    raise NotImplementedError(page)  # the environments below answer in its place


SCHEMA = Tool(look_up).schema()


class SlowEnv(gymnasium.Env[str, str]):
    """Is our side of the environment. Every step but the last waits for its latency."""

    def __init__(self, setting: Setting) -> None:
        self.observation_space = self.action_space = TextSpace()
        self.metadata = {"render_modes": [], "tasks": {"train": setting.episodes}}
        self.setting = setting

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.waits = iter(self.setting.latencies[(options or {})["index"]])
        return PROMPT, {"tools": [SCHEMA]}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        latency = next(self.waits, None)
        if latency is None:
            return "", 1.0, True, False, {}
        time.sleep(latency)
        return "", 0.0, False, False, {"messages": [{"role": "tool", "name": "look_up", "content": ANSWER}]}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of the words of what is said, one id each, with Qwen2.5's chat template, which TRL knows."""
    template = (resources.files("trl") / "chat_templates" / "qwen2_5.jinja").read_text()
    text = f"{template} {SCHEMA} {PROMPT} {ANSWER}"
    tokenizer = build_tokenizer(re.findall(r"\d|[^\W\d_]+|[\W_]+", text), ["<tool_call>", "</tool_call>"])
    tokenizer.chat_template = template
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build a random model that never ends a turn by itself."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        mlp_bias=True,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # a constant direction in the last hidden state, which the head reads as "go on"
        model.model.layers[-1].mlp.down_proj.bias.fill_(4.0)
        model.lm_head.weight[tokenizer.eos_token_id] -= 1.0
    return model.eval()


def ours(
    setting: Setting, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, barrier: bool, only: int = -1
) -> Clock:
    """Time the scheduler and the embedded engine. `only` plays a single episode."""
    clock = Clock()
    engine = TransformersEngine(CausalModel(model))
    engine.step = clock.timed(engine.step)  # type: ignore[method-assign]
    config = RolloutConfig(
        max_tokens=setting.tokens,
        max_length=4096,
        concurrency=setting.episodes,
        workers=setting.episodes,
        deterministic=barrier,
    )
    scheduler = RolloutScheduler(
        engine, ChatFormat(tokenizer), lambda: SlowEnv(setting), config, max_turns=setting.turns
    )
    episodes = range(setting.episodes) if only < 0 else [only]
    try:
        with clock.round():
            groups = scheduler.run(
                [task(n, split="train") for n in episodes], group_size=1, sampling=Sampling(temperature=1.0), seed=0
            )
    finally:
        scheduler.close()
    sampled = sum(t.completion_tokens for group in groups for t in group.trajectories)
    assert sampled == len(episodes) * setting.turns * setting.tokens, sampled
    return clock


class _Played(Exception):
    """Ends TRL's step once its rollouts are over; what it would do with them is not measured."""


def trl(setting: Setting, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Clock:
    """Time the tool loop of TRL's GRPOTrainer, as its own step calls it."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import grpo_trainer

    clock = Clock()

    class Environment:
        """Is TRL's side of the environment."""

        def reset(self, index: int, **_: Any) -> None:
            self._waits = iter(setting.latencies[index])

        def look_up(self, page: str) -> str:
            """Look a page up.

            Args:
                page: the name of the page.
            """
            time.sleep(next(self._waits))
            return ANSWER

    class Trainer(GRPOTrainer):  # type: ignore[misc]
        def _generate(self, prompts: Any) -> Any:
            self._generate_single_turn = clock.timed(super()._generate_single_turn)
            with clock.round():
                completions = super()._generate(prompts)[1]
            sampled = setting.turns * setting.tokens
            assert all(len(ids) >= sampled for ids in completions), [len(ids) for ids in completions]
            raise _Played

    def call(*_: Any, **__: Any) -> dict[str, Any]:
        function = {"name": "look_up", "arguments": {"page": "one"}}
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}

    rows = [{"prompt": [{"role": "user", "content": PROMPT}], "index": n} for n in range(setting.episodes)]
    with tempfile.TemporaryDirectory() as folder, patch.object(grpo_trainer, "parse_response", call):
        trainer = Trainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_list(rows),
            environment_factory=Environment,
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=setting.episodes,
                num_generations=2,
                max_completion_length=4000,
                max_tool_calling_iterations=setting.turns - 1,
                generation_kwargs={"max_new_tokens": setting.tokens, "min_new_tokens": setting.tokens},
                report_to=[],
                use_cpu=not torch.cuda.is_available(),
                bf16=False,
                disable_tqdm=True,
            ),
        )
        try:
            trainer._generate_and_score_completions(rows)
        except _Played:
            return clock
    raise AssertionError("TRL's step came to its end without a rollout")


def measure(setting: Setting) -> dict[str, Clock]:
    """Time every loop once, and what bounds them."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    small = Setting(latencies=setting.latencies[:4, :1] * 0, turns=2, tokens=2)
    ours(small, model, tokenizer, barrier=False)  # the first forward pass is slow
    instant = Setting(latencies=setting.latencies * 0, turns=setting.turns, tokens=setting.tokens)
    longest = int(setting.latencies.sum(1).argmax())
    return {
        "ours": ours(setting, model, tokenizer, barrier=False),
        "a barrier at each turn": ours(setting, model, tokenizer, barrier=True),
        "TRL's tool loop": trl(setting, model, tokenizer),
        "pure generation": ours(instant, model, tokenizer, barrier=False),
        "the longest episode": ours(setting, model, tokenizer, barrier=False, only=longest),
    }


def print_table(setting: Setting, clocks: dict[str, Clock]) -> None:
    generation, longest = clocks.pop("pure generation").generation, clocks.pop("the longest episode").wall
    bound, reference = max(generation, longest), clocks["ours"].wall
    tokens = setting.episodes * setting.turns * setting.tokens
    print("| loop | wall time | to ours | outside generation | tokens/s |")
    print("| --- | ---: | ---: | ---: | ---: |")
    rows = [(name, clock.wall, f"{clock.wall - clock.generation:.1f} s") for name, clock in clocks.items()]
    for name, wall, outside in [*rows, ("lower bound", bound, "")]:
        print(f"| {name} | {wall:.1f} s | {wall / reference:.2f} | {outside} | {tokens / wall:.0f} |")
    print(
        f"\nThe bound is the slower of pure generation ({generation:.1f} s) and the longest episode ({longest:.1f} s)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 episodes of 3 turns and short waits")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16, help="sampled in each turn")
    parser.add_argument("--latency", type=float, default=0.1, help="median seconds of a step")
    parser.add_argument("--sigma", type=float, default=1.25, help="of the logarithm of the seconds")
    options = parser.parse_args()
    if options.quick:
        options.episodes, options.turns, options.tokens, options.latency = 8, 3, 4, 0.02
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    shape = options.episodes, options.turns - 1
    latencies = options.latency * np.exp(options.sigma * np.random.default_rng(0).standard_normal(shape))
    setting = Setting(latencies=latencies, turns=options.turns, tokens=options.tokens)
    print(
        f"{options.episodes} episodes of {options.turns} turns of {options.tokens} tokens; a step takes "
        f"{latencies.mean():.2f} s on average, {latencies.max():.1f} s at most, {latencies.sum(1).max():.1f} s in the "
        f"longest episode; {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n"
    )
    print_table(setting, measure(setting))


if __name__ == "__main__":
    main()
