"""Builds what many tests need: a tokenizer, chat templates with habits, tiny random models, scripted environments.

Everything is a session fixture that holds a function or a class, so that property tests can use it too.
"""

import fcntl
import os
from contextlib import closing
from functools import cache
from typing import Any

import gymnasium
import pytest
import torch
from hypothesis import settings
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opd.engines.base import Completion, Request, Sampling
from opd.engines.transformers import TransformersEngine
from opd.envs import TextSpace
from opd.episodes.config import RolloutConfig
from opd.episodes.scheduler import RolloutScheduler
from opd.episodes.tasks import task
from opd.models.causal import CausalModel
from opd.models.chat import ChatFormat
from opd.types import StopReason

# A test that wants more or fewer cases takes its share of the profile's: settings(max_examples=CASES // 4), where
# CASES is settings.default.max_examples.
settings.register_profile("test", deadline=None, max_examples=100, print_blob=True)
settings.register_profile("long", settings.get_profile("test"), max_examples=2000)
settings.load_profile("test")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark tests that ask for a tiny model as slow, unless they are long: they train it, and mostly train with it."""
    for item in items:
        if "tiny_model" in item.fixturenames and item.get_closest_marker("long") is None:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def _no_gpu(request):
    """Hide the GPU from tests that are not marked `gpu`, also in processes that they start.

    These tests then test the same on every machine.
    """
    marks = getattr(request.module, "pytestmark", [])
    if any(mark.name == "gpu" for mark in (marks if isinstance(marks, list) else [marks])):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


_CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' + (messages[0].content + '\\n' if messages[0].role == 'system' else '') }}
    {{- 'Tools:' }}
    {%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' + CONTENT + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}
{%- if add_generation_prompt and no_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"""

_NO_TOOLS = """\
{%- for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant') %}
        {{- raise_exception('no role ' + message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""

# User and assistant take turns, and nobody else speaks.
_STRICT = """\
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) or message.role not in ('user', 'assistant') %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content | trim) + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""

TEMPLATES = {
    "chatml": _CHATML.replace("CONTENT", "message.content"),
    # The thinking of a turn is dropped once the user has spoken again, as Qwen3's template does it.
    "forgetful": _CHATML.replace(
        "CONTENT",
        "(message.content.split('</think>')[-1].lstrip('\\n') "
        "if message.role == 'assistant' and 'user' in (messages[loop.index:] | map(attribute='role') | list) "
        "else message.content)",
    ),
    "trimming": _CHATML.replace("CONTENT", "(message.content | trim)"),
    "no_tools": _NO_TOOLS,
    "strict": _STRICT,
    "spaced": (  # Llama 2: white space around what the assistant says, then the end-of-turn token
        "{%- for m in messages %}"
        "{{- '<|im_start|>' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + ' <|im_end|>' }}"
        "{%- endfor %}"
    ),
    "endless": "{% for m in messages %}{{ '\\n' + m.role + ': ' + m.content }}{% endfor %}",
}
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_MERGES = ("t h", "th e", "i n", "e r", "o n", "a b", "Ċ Ċ", "Ġ th", "1 2", "2 3")

_SIZE = len(pre_tokenizers.ByteLevel.alphabet()) + len(_MERGES) + len(_SPECIAL) + len(_MARKUP)


@cache
def _tokenizer(template: str | None, pad: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer of bytes and a few merges, so that sampled ids may differ from the encoding of their text."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in _MERGES)]
    merges = [tuple(merge.split(" ")) for merge in _MERGES]
    tokenizer = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in _MARKUP])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token="<|im_end|>",
        chat_template=TEMPLATES.get(template, template),
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def make_tokenizer():
    """`make_tokenizer(template, pad=...)`: a name of `TEMPLATES`, a template, or None for no template.

    All tests share one of each: whoever adds a token to it must copy it first.
    """
    return lambda template="chatml", pad="<|endoftext|>": _tokenizer(template, pad)


@pytest.fixture(autouse=True)
def _the_shared_tokenizer_stays_as_it_is():
    yield
    assert len(_tokenizer("chatml", "<|endoftext|>")) == _SIZE, "this test changed a tokenizer that others share"


@pytest.fixture(scope="session")
def make_chat(make_tokenizer):
    """`make_chat(template, **options of ChatFormat)`"""
    return lambda template="chatml", **options: ChatFormat(make_tokenizer(template), **options)


@pytest.fixture(scope="session")
def make_model(make_tokenizer):
    """`make_model(...)`: a random Llama with few, large weights, so that its distributions are far from uniform.

    With `stops`, the end-of-turn token is so likely that a good part of the completions stop by themselves; with
    `lora`, only new adapters train.
    """

    def make(
        *, dtype=torch.float32, seed=0, stops=False, vocab=None, lora=False, checkpointing=False, **config: Any
    ) -> CausalModel:
        shape: dict[str, Any] = {
            "vocab_size": vocab or len(make_tokenizer()),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "mlp_bias": True,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**shape, **config}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.25)
            if stops:  # a constant direction in the last hidden state, which the head reads as "stop"
                model.model.layers[-1].mlp.down_proj.bias.copy_(4.0 * torch.ones(shape["hidden_size"]).sign())
                model.lm_head.weight[make_tokenizer().eos_token_id] += 0.15
        model.to(dtype)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")) if lora else model
        return CausalModel(adapted).eval()

    return make


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """`tiny_model(name, seed=..., steps=...)`: the folder of a `tiny:` model, by default one that was hardly warmed up.

    Each is built once a session, by whichever process of the session asks for it first.
    """
    from opd.launch.tiny.build import build_tiny  # late: most tests need no tiny model

    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def made(name="lookup", *, seed=0, steps=3):
        with (shared / "tiny.lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
            fcntl.flock(lock, fcntl.LOCK_EX)
            patch.setenv("OPD_CACHE", str(shared / "tiny-models"))
            return build_tiny(name, seed=seed, steps=steps, quiet=True)

    return made


class ScriptedEnv(gymnasium.Env):
    """An environment that plays a function: `play(env, action) -> what step returns`, with `env.seed`, `env.turn`.

    `first` is what `reset` returns, or a function of the seed that gives it.
    """

    def __init__(self, play, *, first="What is it?", metadata=None):
        self.observation_space = self.action_space = TextSpace()
        self.metadata = metadata or {"render_modes": []}
        self.play, self.first = play, first
        self.turn, self.seed, self.closed = 0, 0, False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.turn, self.options = seed, 0, options
        first = self.first(self) if callable(self.first) else self.first
        return first if isinstance(first, tuple) else (first, {})

    def step(self, action):
        self.turn += 1
        return self.play(self, action)

    def close(self):
        self.closed = True


def counts_turns(turns: int, reward: float = 1.0):
    """Make a play that ends after `turns` turns and answers with what depends on seed and turn."""

    def play(env, action):
        done = env.turn == turns
        return f"{env.seed % 97} the {env.turn} on", reward if done else 0.0, done, False, {}

    return play


@pytest.fixture(scope="session")
def scripted_env():
    return ScriptedEnv


@pytest.fixture(scope="session")
def turns_then_end():
    return counts_turns


class ScriptedEngine:
    """An engine that samples what it is told: `completions[session]` is a list of ids for each turn."""

    policy_version = 3
    copies, revived = 1, 0

    def __init__(self, completions):
        self.completions = [iter(turns) for turns in completions]
        self.prompts: list[list[list[int]]] = [[] for _ in completions]
        self._waiting: list[Request] = []

    def begin(self, sampling, stop_ids):
        self._stop_ids = stop_ids

    def submit(self, request):
        self.prompts[request.session].append(request.prompt_ids)
        self._waiting.append(request)

    def step(self):
        request = self._waiting.pop(0)
        ids = next(self.completions[request.session])[: request.max_tokens]
        stopped = ids[-1] in self._stop_ids
        return [
            Completion(
                session=request.session,
                token_ids=ids,
                logprobs=[-1.0] * len(ids),
                stop_reason=StopReason.STOP if stopped else StopReason.LENGTH,
                policy_version=self.policy_version,
            )
        ]

    def release(self, session):
        pass

    def update_weights(self, weights, version):
        self.policy_version = version

    def sleep(self):
        pass

    def metrics(self):
        return {}

    def close(self):
        pass


@pytest.fixture(scope="session")
def scripted_engine():
    return ScriptedEngine


@pytest.fixture(scope="session")
def make_scheduler(make_chat, make_model):
    """`make_scheduler(make_env, ...)` makes a scheduler of the real engine on a random model, with quick limits.

    Close it after use.
    """
    made: list[RolloutScheduler] = []

    def make(
        make_env, *, model=None, chat=None, max_turns=4, engine=None, hosts="threads", **config: Any
    ) -> RolloutScheduler:
        settings = {"max_tokens": 6, "max_length": 512, "step_timeout": 20.0, "workers": 4, "on_failure": "keep"}
        settings |= config
        engine = engine or TransformersEngine(model or make_model(stops=True))
        scheduler = RolloutScheduler(
            engine, chat or make_chat(), make_env, RolloutConfig(**settings), max_turns=max_turns, workers=hosts
        )
        made.append(scheduler)
        return scheduler

    yield make
    for scheduler in made:
        scheduler.close()


@pytest.fixture(scope="session")
def play(make_scheduler):
    """`play(make_env, tasks=..., ...)` returns the groups of one round of rollouts."""

    def run(make_env, *, tasks=2, group_size=1, temperature=1.0, seed=0, rewrite=None, **options: Any):
        with closing(make_scheduler(make_env, group_size=group_size, **options)) as scheduler:
            return scheduler.run(
                [task(n, split="train") for n in range(tasks)],
                group_size=group_size,
                sampling=Sampling(temperature=temperature),
                seed=seed,
                rewrite=rewrite,
            )

    return run
