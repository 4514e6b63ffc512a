"""No setting is accepted and ignored: of each, two values are found that make different resolved settings.

Not covered: what a run does with them, which the tests of each part show.
"""

import copy
import re

import pytest

from opd.errors import ConfigError
from opd.launch.checks.loading import config_from
from opd.trainers.loop.registry import methods
from tests.fuzz.configs import EXAMPLES, example, put, settings

pytestmark = pytest.mark.long
DROP = object()
SERVERS = (["http://127.0.0.1:1"], ["http://127.0.0.1:2"])
VLLM = {"rollout.engine": "vllm_server"}
MINE = "METHOD.teacher"
SERVED = {f"{MINE}.servers": SERVERS[0], "METHOD.divergence.top_k": 4, "METHOD.divergence.support": "teacher"}
NEEDS = (
    (r"rollout\.vllm\.(replicas|devices|restart_timeout)", VLLM),
    (r"rollout\.vllm\.(servers|api_key_env|timeout|retries)", {**VLLM, "rollout.vllm.servers": SERVERS[0]}),
    (
        r"\w+\.teacher\.(servers|api_key_env|timeout)",
        {f"{MINE}.model": "tiny:lookup", f"{MINE}.weights": "external", **SERVED},
    ),
    (r"\w+\.teacher\.weights", {MINE: DROP}),
    (r"\w+\.teacher\.(rate)", {MINE: DROP, f"{MINE}.weights": "ema"}),
    (r"\w+\.teacher\.(every)", {MINE: DROP, f"{MINE}.weights": "synced"}),
    (r"\w+\.teacher\.model", {MINE: DROP, f"{MINE}.weights": "external"}),
    (r"\w+\.divergence\.beta", {"METHOD.divergence.kind": "jsd"}),
    (r"\w+\.divergence\.(support|tail)", {"METHOD.divergence.top_k": 4}),
    (r"\w+\.(form|baseline|baseline_top_k|max_advantage)", {"METHOD.divergence": DROP, "METHOD.form": "sampled"}),
    (r"\w+\.baseline_top_k", {"METHOD.divergence": DROP, "METHOD.form": "sampled", "METHOD.baseline": "top_k"}),
    (r"sft\.(file|leave_out|source)", {"sft": {"source": "file", "file": "a.jsonl"}}),
    (
        r"skill_sd\.skills\.server\.\w+",
        {
            "skill_sd.skills.summariser": "server",
            "skill_sd.skills.server": {"url": "http://127.0.0.1:1/v1", "model": "a"},
        },
    ),
)
"""What else must stand there for a setting to be used, beside what it says itself (`Condition`)."""
GIVEN = (
    (r"chat\.date", ("2026-01-31", "2026-02-01")),
    (r".*\.servers", SERVERS),
    (r".*\.demonstration_template", ("{prompt} {episode}", "{episode} {prompt}")),
    (r".*\.feedback_template", ("{prompt} {feedback}", "{feedback} {prompt}")),
    (r".*\.template", ("{prompt} {solution}", "{solution} {prompt}")),
    (r".*\.url", ("http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1")),
    (r".*\.teacher\.model", ("tiny:lookup", "tiny:arithmetic")),
    (r".*\.api_key_env", ("A_KEY", "ANOTHER_KEY")),
    (r"sft\.leave_out", (["a"], ["b"])),
)
ONE_VALUE = re.compile(
    r"lightning_opd\.(divergence\.(support|clip|temperature)|sft_teacher|teacher\..*)|(opd|sft|vopd|sd_zero|srpo)\.teacher\..*"
    r"|sft\.source"
)
"""Settings of which a method refuses all values but one, or that ask for more beside them than is known here."""


def candidates(key):
    """Values that may be allowed."""
    setting = settings()[key]
    if given := next((values for pattern, values in GIVEN if re.fullmatch(pattern, key)), None):
        return list(given)
    if setting.choices:
        return list(setting.choices)
    told, found = setting.allowed, []
    kinds = {
        "true or false": (True, False),
        "whole number": (3, 5, 64, 1, 2, 512, 4096, 8192),
        "number": (0.5, 0.25, 1.5, 2.5, 1.0, 0.9),
        "list of a number": ([0.5, 0.6], [0.7, 0.8]),
        "list of numbers": ([0.5, 1.0], [1.0, 2.0]),
        "list of text": (["abc"], ["abd"]),
        "list of whole": ([1, 2], [3, 4]),
        "keys of your choice": ({"a": 1}, {"a": 2}),
        "text": ("abc", "abd", "prompt", "reply"),
        "name": ("abc", "abd"),
    }
    for words, values in kinds.items():
        found += values if words in told else ()
    found += [word.strip() for word in told.split(",") if word.strip() and " " not in word.strip()]
    return [*found, None]


def need(data, key, method):
    """Add what a setting says that it is used with, and what `NEEDS` says of it."""
    parts = key.split(".")
    for known in (".".join(parts[:n]) for n in range(1, len(parts) + 1)):
        setting = settings().get(known)
        for name, values in (setting.condition.when if setting and setting.condition else {}).items():
            other = f"{known.rpartition('.')[0]}.{name}"
            need(data, other, method)
            put(data, other, values[0] if values is not True else next(filter(None, candidates(other))))
    for pattern, others in NEEDS:
        if re.fullmatch(pattern, key):
            for other, value in others.items():
                name = other.replace("METHOD", method)
                if value is DROP:
                    drop(data, name)
                elif name in settings() and name != key:
                    put(data, name, copy.deepcopy(value))


def drop(data, key):
    *sections, name = key.split(".")
    for section in sections:
        data = data.get(section) or {}
    data.pop(name, None)


def held(data, key):
    for part in key.split("."):
        data = data.get(part) if isinstance(data, dict) else data
    return data


def shown(key):
    """The values that a setting was seen to have, and those that were accepted and ignored."""
    method, found, ignored = key.partition(".")[0], {}, []
    for path in [path for path in EXAMPLES if method not in methods() or example(path)["method"] == method]:
        for value in candidates(key):
            data = copy.deepcopy(example(path))
            try:
                need(data, key, data["method"])
                put(data, key, value)
                has = held(config_from(data, check_machine=False).dump(), key)
            except ConfigError:
                continue
            found[repr(has)] = value
            if value is not None and has != value:
                ignored.append((key, value, has))
            if len(found) > 1:
                return found, ignored
    return found, ignored


def test_of_every_setting_two_values_make_different_settings():
    keys = [key for key, setting in settings().items() if setting.section is None]
    seen = {key: shown(key) for key in keys if not key.startswith("weighting.functions.")}
    assert [ignored for _, many in seen.values() for ignored in many] == []
    assert [key for key, (found, _) in seen.items() if len(found) < 2 and not ONE_VALUE.fullmatch(key)] == []
