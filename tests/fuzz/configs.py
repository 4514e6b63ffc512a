"""Settings as people get them wrong: what to write into a file, onto the command line and into the environment.

`config_case(number)` is the same case on every machine. Each begins as a file of `examples/`, to which settings may be
added that say what is so anyway, and has one thing wrong with it.
"""

import copy
import json
import math
import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml

from opd.launch.settings.config import all_settings
from opd.trainers.loop.registry import methods

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.yaml"))
BROKEN_MODULES = {
    "fuzz_raises": "raise RuntimeError('a\\nb\\n' * 100)",
    "fuzz_exits": "import sys; sys.exit(3)",
    "fuzz_wrong": "def (:",
    "fuzz_null": "a = '\\0'\\x00",
    "fuzz_things": "number = 3\ndef function(): pass\nclass Empty: pass\ndef __getattr__(name): raise ValueError(name)",
    "fuzz_loops": "from fuzz_loops import nothing",
}
"""Modules that an address may lead to, each of which is no use."""
ADDRESSES = (
    *("fuzz_raises:A", "fuzz_exits:A", "fuzz_wrong:A", "fuzz_things:number", "fuzz_things:function", "fuzz_null:A"),
    *("fuzz_things:Empty", "fuzz_things:absent", "fuzz_loops:A", "no_such_module:A", "no.such.module:A", "os:system"),
    *("sys:exit", "os.path:join", ":A", "a:", "a:b:c", "a b:c", "../a:b", "opd:nothing", "opd.trainers.opsd:Opsd"),
    *("é:漢", "a.:b", ".a:b", "-:-", "builtins:exit", "json:loads", "opd/Nothing-v0", "opd/Lookup-v9", "Lookup-v0"),
    *("gsm8k", "verifiers:", "verifiers:nothing", "textarena:Nothing-v0", "reasoning_gym:nothing", "trl:", "mcp:x"),
)
FIFO, FOLDER, LINK = "a.fifo", "a_folder", "a_link"
PATHS = (
    *(
        FIFO,
        FOLDER,
        LINK,
        "/dev/null",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
        "/proc/self/environ",
        "/",
        ".",
        "..",
    ),
    *("no/such/file", "~nobody/x", "~", "a" * 300, "a/" * 3000, "run.yaml", "empty.json", "broken.json", "list.json"),
)
TEXTS = (
    *("", " ", "\t", "abc", "1", "1e-3", "nan", "None", "null", "true", "yes", "[]", "{}", "\0", "a\nb", "${HOME}/x"),
    *("$HOME", "%s", "{0}", "é漢😀", "\u200b", "\u202eabc", "\ufeff", "\ud800", "\x1b[31mred", "a" * 5000, "-1", "--x"),
    *(
        "tiny:lookup",
        "tiny:nothing",
        "hf://x",
        "http://127.0.0.1:1",
        "http://[",
        "http://a:99999",
        "2026-01-31",
        "31.2.",
    ),
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 8, 64, 100, 4096, 10**6, 10**9, 10**12, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400),
    *(0.0, -0.0, 0.5, -0.5, 1.0, 1.5, 1e-320, 1e-30, 1e30, 1e308, math.inf, -math.inf, math.nan),
)
ODD = (
    *(None, True, False, [], {}, [[]], [None], [1], [1, 2], [1, 2, 3], ["a"], ["a", "a"], [{}], [[1], [2]]),
    *({"a": 1}, {"": 1}, {"kind": 1}, {"name": "x"}, {"id": []}, {"r": 0}, [0.9, 1.5], [1e30, -1], [math.nan] * 2),
)
VALUES = TEXTS + NUMBERS + ODD
INVISIBLE = ("\u200b", "\u00a0", "\u202e", "\ufeff", "\u00ad", "\u2060")


@dataclass
class ConfigCase:
    """A file's bytes, what else a command has, and what its message must name (one of these)."""

    number: int
    what: str
    text: bytes
    options: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    given: tuple[str, object] | None = None
    """The setting that was changed, and the value that it must then have if it is accepted."""
    refused: bool = False
    """Accepting it would be a mistake."""


@cache
def settings():
    return all_settings()


@cache
def example(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def config_case(number):
    """The case of a number."""
    rng = random.Random(number)
    data = base(rng)
    kinds = {
        a_wrong_value: 9,
        a_wrong_value_on_the_command_line: 5,
        a_section_of_another_kind: 2,
        an_unknown_key: 4,
        a_wrong_address: 3,
        a_path_to_something_else: 2,
        two_wrong_values: 2,
        an_odd_command_line: 3,
        an_odd_environment: 2,
        odd_yaml: 6,
        damaged_bytes: 3,
    }
    [kind] = rng.choices(list(kinds), list(kinds.values()))
    case = kind(rng, data)
    case.number, case.what = number, kind.__name__
    return case


def base(rng):
    """The settings of an example, with some that are as the default has them written out."""
    data = copy.deepcopy(example(rng.choice(EXAMPLES)))
    if str(data["model"]).startswith("smollm2"):
        data["model"] = "tiny:lookup"  # to read a real tokenizer takes seconds
    for name, word in (("model", "name"), ("env", "id")):
        if isinstance(data[name], str) and rng.random() < 0.5:
            data[name] = {word: data[name]}
    for key in rng.sample(fitting(data), rng.choice((0, 0, 2, 5))):
        if key.startswith("weighting"):
            continue  # which some methods have no use for
        default = settings()[key].default
        if isinstance(default, bool | int | float | str | None) and may_stand(data, key):
            put(data, key, default)
    return data


def fitting(data):
    """The keys of the settings that may stand beside a method."""
    others = methods().keys() - {data["method"]}
    kept = ("method", "model", "env")
    return [
        key
        for key in settings()
        if key.partition(".")[0] not in others and key not in kept and not key.startswith("weighting.functions.")
    ]


def may_stand(data, key):
    """True if a setting is not there yet and the sections above it are there, or are made by it."""
    *sections, name = key.split(".")
    for section in sections:
        if section not in data:
            return True
        data = data[section]
        if not isinstance(data, dict):
            return False
    return name not in data


def put(data, key, value):
    """Write a value at a key, sections around it."""
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(data.get(section), dict):
            held = data.get(section)
            word = {"model": "name", "env": "id", "divergence": "kind"}.get(section)
            data[section] = {word: held} if word and isinstance(held, str) else {}
        data = data[section]
    data[name] = value


def spelled(value):
    """A value in YAML's flow style."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{spelled(str(key))}: {spelled(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(spelled, value)) + "]"
    if isinstance(value, float):
        return ".nan" if math.isnan(value) else f"{'-' * (value < 0)}.inf" if math.isinf(value) else repr(value)
    if isinstance(value, str):
        quoted = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08X}" for c in value)
        return f'"{"".join(quoted)}"'
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:d}" if abs(value) < 10**100 else "1" + "0" * 400
    return json.dumps(value)


def written(data, rng):
    """Settings as a file: each section a line, or as people write it."""
    if rng.random() < 0.5:
        return "".join(f"{spelled(key)}: {spelled(value)}\n" for key, value in data.items())
    return blocks(data)


def blocks(data, indent=""):
    lines = []
    for key, value in data.items():
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{spelled(key)}:\n{blocks(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{spelled(key)}: {spelled(value)}\n")
    return "".join(lines)


def named(key):
    """What a message may call a setting: its own name, or the line that it stands in."""
    return (*key.split(".")[-2:], " line ")


def a_wrong_value(rng, data):
    key, value = rng.choice(fitting(data)), rng.choice(VALUES)
    put(data, key, value)
    return ConfigCase(0, "", written(data, rng).encode(), names=named(key), given=(key, value))


def a_wrong_value_on_the_command_line(rng, data):
    key, value = rng.choice(fitting(data)), rng.choice(VALUES)
    text = value if isinstance(value, str) and rng.random() < 0.5 else spelled(value)
    text = text.replace("\0", "\\0").replace("\ud800", "?")  # which no command line can hold
    options = [f"--{key}={text}"] if rng.random() < 0.5 or not text else [f"--{key}", text]
    return ConfigCase(0, "", written(data, rng).encode(), options, names=(key.rpartition(".")[2], text or "--"))


def a_section_of_another_kind(rng, data):
    key = rng.choice([key for key in fitting(data) if settings()[key].section] + ["model", "env", "method"])
    value = rng.choice([None, [], [1], 3, "abc", True, {}, [{}], {"": {}}, {"a": {"b": {"c": 1}}}])
    put(data, key, value)
    return ConfigCase(0, "", written(data, rng).encode(), names=named(key))


def an_unknown_key(rng, data):
    key = rng.choice(fitting(data))
    *above, name = key.split(".")
    at = rng.randrange(len(name) + 1)
    new = rng.choice(
        [
            name + rng.choice("sx_1 "),
            name[:at] + name[at + 1 :] + "q",
            name.upper(),
            name.replace("_", "-") + "-",
            name.title() + "_",
            rng.choice(list(settings())),
            f"{name}.{name}",
            "",
            "a" * rng.choice((100, 100_000)),
            "\ud83d",
            "\x1b[2J",
            "a\nb\n" * 50,
            name[:at] + rng.choice(INVISIBLE) + name[at:],
        ]
    )
    if rng.random() < 0.3:  # at another level
        above, new = rng.choice([[], [*above, name], ["train"], [rng.choice(sorted(methods()))]]), name
    where = ".".join([*above, new])
    if any(settings()[p].free for n in range(1, len(above) + 1) if (p := ".".join(above[:n])) in settings()):
        return ConfigCase(0, "", written(data, rng).encode())  # a section whose keys are the user's own
    is_known = where in fitting(data) or where in ("method", "model", "env")
    place = data
    for section in above:
        if not isinstance(place.get(section), dict):
            word = {"model": "name", "env": "id", "divergence": "kind"}.get(section)
            place[section] = {word: place[section]} if word and isinstance(place.get(section), str) else {}
        place = place[section]
    place[new] = 3
    telling = next((part for part in new.split("\n") if part), "")[:40]
    shown = "".join(
        c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) > 255 else f"\\x{ord(c):02x}" for c in telling
    )
    names = (telling if telling.isprintable() else shown, shown, " line ", *above[-1:])
    return ConfigCase(0, "", written(data, rng).encode(), names=names, refused=not is_known)


def a_wrong_address(rng, data):
    key = rng.choice(["method", "env.id", "env.id", f"{data['method']}.divergence", "weighting.functions"])
    address = rng.choice(ADDRESSES)
    value = [{"name": address}] if key == "weighting.functions" else address
    put(data, key, value)
    return ConfigCase(
        0, "", written(data, rng).encode(), names=(key.rpartition(".")[2], address), refused=key == "method"
    )


def a_path_to_something_else(rng, data):
    keys = ["model.name", "deepspeed", "out", "env.kwargs.path", "env.kwargs.file", f"{data['method']}.teacher.model"]
    keys += ["sft.file", "lightning_opd.data", "skill_sd.skills.file", "sd_zero.file"]
    key, path = rng.choice(keys), rng.choice(PATHS)
    if key.startswith("env.kwargs"):
        put(data, "env.id", rng.choice(("opd/Dataset-v0", "opd/SQL-v0", "opd/Lookup-v0")))
    if key == "deepspeed":
        data["backend"] = "deepspeed"
    put(data, key, path)
    return ConfigCase(0, "", written(data, rng).encode(), names=(key.rpartition(".")[2], key.partition(".")[0], path))


def two_wrong_values(rng, data):
    keys = rng.sample(fitting(data), rng.choice((2, 30)))
    for key in keys:
        if may_stand(data, key):
            put(data, key, rng.choice(VALUES))
    return ConfigCase(0, "", written(data, rng).encode(), names=(*(key.rpartition(".")[2] for key in keys), " line "))


def an_odd_command_line(rng, data):
    key = rng.choice(fitting(data))
    words = rng.choice(
        [
            [f"--{key}"],
            [f"--{key}="],
            [f"--{key}", "--steps", "3"],
            [f"--{key}=1", f"--{key}=2"],
            [f"--{key}.a.b=1"],
            [f"--{key}..=1"],
            [f"{key}=1"],
            [f"-{key}=1"],
            [f"--{key.upper()}=1"],
            [f"--{key}", "[1, 2"],
            [f"--{key}", "{a: {b: 1}"],
            [f"--{key}", "a: b: c"],
            [f"--{key}", "&a [*a]"],
            [f"--{key}", "!!python/object/apply:os.system [ls]"],
            [f"--{key}", "!!binary a"],
            [f"--{key}", "!!timestamp x"],
            [f"--{key}", "[" * 5000],
            [f"--{key}", "'"],
            [f"--{key}", "@x"],
            [f"--{key}", "%x"],
            [f"--{key}", "---\n1\n---\n2"],
            ["--steps", rng.choice(["x", "-1", "1.5", "", "[1]", "9" * 30, "null", ".nan"])],
            ["--out", rng.choice(["", "\n", "~nobody/x", "a" * 300, "/dev/null", "run.yaml/x", "-"])],
            ["--ranks", rng.choice(["0", "-1", "x", "9" * 30, "1e3", "", "٣", "1000000000"])],
            ["--resume", "--overwrite"],
            ["--resume", "auto", "auto"],
            ["--seed", "9" * 30],
            ["--", "x"],
            ["--=1"],
            ["--.=1"],
            ["--\u200btrain.lr=1"],
            ["--a" + "b" * 10_000 + "=1"],
            ["run2.yaml"],
        ]
    )
    names = (
        words[0].replace("\u200b", "\\u200b").split("=")[0],
        key.rpartition(".")[2].lower(),
        words[0].split("=")[0][:40],
        words[-1][:20] or "--",
        "--overwrite",
        "auto",
    )
    return ConfigCase(0, "", written(data, rng).encode(), words, names=names)


VARIABLES = {
    "WORLD_SIZE": ("abc", "0", "-1", "1.5", "", " ", "1", "٣", "1\n", "1e3", "9" * 5000, "None"),
    "RANK": ("abc", "-1", "", " ", "0", "1", "7", "9" * 5000, "0x1"),
    "LOCAL_RANK": ("abc", "-1", "", "5", "9" * 5000),
    "MASTER_PORT": ("abc", "-1", "99999999", ""),
    "OMP_NUM_THREADS": ("abc", "-1", "0", "", "9" * 30, "1,2", "1.5"),
    "CUDA_VISIBLE_DEVICES": ("abc", "-1", "0,0", "9" * 30, " ", "GPU-nothing", "0,1,2,99"),
    "OPD_CACHE": ("", "/dev/null", "no/such", "a\nb", FIFO),
    "HF_HOME": ("/dev/null", "", FIFO),
    "COLUMNS": ("abc", "0", "-1", "1", "9" * 30),
    "HOME": ("", "/dev/null", "no/such"),
    "WANDB_MODE": ("nonsense", "", "disabled"),
    "WANDB_API_KEY": ("", "short", "\n"),
    "TERM": ("", "nonsense", "dumb"),
    "NO_COLOR": ("", "1"),
    "OPD_DEFINITIONS": ("x",),
    "TZ": ("nonsense", ":"),
}


def an_odd_environment(rng, data):
    names = rng.sample(sorted(VARIABLES), rng.choice((1, 1, 2, 3)))
    environment = {name: rng.choice(VARIABLES[name]) for name in names}
    return ConfigCase(0, "", written(data, rng).encode(), environment=environment, names=tuple(names))


def odd_yaml(rng, data):
    """Put something of YAML between two lines, or at the start or the end, that few people know of."""
    lines = written(data, rng).splitlines(keepends=True)
    deep = rng.choice((70, 5000, 60_000))
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
    )
    inner = "{a0: &a0 [x, x, x, x], " + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}], " for n in range(1, 9))
    odd = rng.choice(
        [
            "seed: &a 3\nx: *a\n",
            "x: *nothing\n",
            "seed: &a [*a]\n",
            "seed: &a {b: *a}\n",
            "env: &e {id: opd/Lookup-v0, kwargs: {x: *e}}\n",
            bomb,
            f"eval: {{env_kwargs: {inner}z: 1}}}}\n",
            f"rollout: {{chat_template_kwargs: {inner}z: 1}}}}\n",
            "<<: {seed: 3}\n",
            "x: {<<: {a: 1}}\n",
            "seed: !!timestamp 3\n",
            "seed: !!binary '==='\n",
            "seed: !!set {a, b}\n",
            "seed: !!omap [a: 1]\n",
            "seed: !!pairs [a: 1]\n",
            "seed: !!int abc\n",
            "seed: !!int ''\n",
            "seed: !!int 0x\n",
            "seed: !!float abc\n",
            "seed: !!float ''\n",
            "seed: !!bool abc\n",
            "seed: !!null abc\n",
            "seed: !!str 3\n",
            "seed: !!seq abc\n",
            "seed: !!map abc\n",
            "seed: !!int [1]\n",
            "seed: !nothing 3\n",
            "seed: !!python/name:os.system\n",
            "seed: !<tag:x> 3\n",
            "seed: 190:20:30\n",
            "seed: 0o17777777777777777777777777777\n",
            "seed: 0b11\n",
            "seed: 1_000\n",
            "seed: +3\n",
            "seed: -0\n",
            "seed: 0x\n",
            f"seed: {'9' * 100_000}\n",
            f"seed: 0x{'f' * 10_000}\n",
            f"seed: 1e{'9' * 1000}\n",
            "seed: NO\n",
            "seed: on\n",
            "seed: ~\n",
            "seed: 2026-01-31\n",
            "seed: 2026-99-99\n",
            "seed: 'a\n",
            'seed: "\\x"\n',
            'seed: "\\ud800"\n',
            'seed: "\\U00110000"\n',
            "seed: |\n  a\n b\n",
            "seed: >99\n",
            "\tseed: 3\n",
            "seed:\t3\n",
            "\ufeffseed: 3\n",
            "\0",
            "\x07",
            "\x85\n",
            "\u2028seed: 3\n",
            "---\n",
            "--- 3\n",
            "...\n",
            "...\nseed: 3\n",
            "%YAML 9.9\n---\n",
            "%TAG ! x\n",
            "? seed\n: 3\n",
            "? [a, b]\n: 3\n",
            "? {a: 1}\n: 3\n",
            "? |\n  seed\n: 3\n",
            "3: 3\n",
            "null: 3\n",
            "~: 3\n",
            "true: 3\n",
            "1.5: 3\n",
            ".nan: 3\n",
            "'': 3\n",
            "!!str seed: 3\n",
            "!!int seed: 3\n",
            "!!binary c2VlZA==: 3\n",
            "'seed': 3\n\"seed\": 4\n",
            "seed: 3\nseed: 3\n",
            "method: opsd\nmethod: grpo\n",
            "seed : 3\n",
            "seed:3\n",
            "seed = 3\n",
            "seed\n",
            "- seed\n",
            "[seed]\n",
            "{seed: 3}\n",
            "`seed`: 3\n",
            "@seed: 3\n",
            "train.lr: 1\n",
            "seed: [" + "[" * deep + "\n",
            "seed: " + "[" * deep + "]" * deep + "\n",
            "seed: " + "{a: " * deep + "1" + "}" * deep + "\n",
            "".join(f"{' ' * n}a:\n" for n in range(deep // 50)),
            "- " * deep + "a\n",
            "? " * deep + "a\n",
            "seed: " + "a" * 3_000_000 + "\n",
            "seed: " + "a" * 5_000_000 + "\n",
            "".join(f"key{n}: {n}\n" for n in range(5000)),
            "seed: &" + "a" * 2000 + " 3\n",
            "seed: !!" + "a" * 2000 + " 3\n",
            "#" * 100_000 + "\n",
        ]
    )
    at = rng.choice((0, 0, len(lines), len(lines), rng.randrange(len(lines) + 1)))
    text = "".join([*lines[:at], odd, *lines[at:]])
    encoding = rng.choice(["utf-8"] * 8 + ["utf-16", "utf-8-sig"])
    return ConfigCase(0, "", text.encode(encoding, "surrogatepass"), names=("run.yaml",))


def damaged_bytes(rng, data):
    """Bytes flipped, cut, doubled, swapped."""
    text = bytearray(written(data, rng).encode())
    for _ in range(rng.choice((1, 1, 3, 20))):
        at, length = rng.randrange(len(text) or 1), rng.choice((1, 2, 10, 200))
        text = text or bytearray(b"a")
        at %= len(text)
        match rng.randrange(6):
            case 0:
                text[at] ^= 1 << rng.randrange(8)
            case 1:
                text[at] = rng.randrange(256)
            case 2:
                del text[at : at + length]
            case 3:
                text[at:at] = text[at : at + length]
            case 4:
                text[at:at] = rng.choice(
                    [b"\xff\xfe", b"\0", b"\r", b"\x80", b": ", b"- ", b"{", b"'", b"\n\n  ", b"&a ", b"!"]
                )
            case 5:
                text = text[:at] or text
    return ConfigCase(0, "", bytes(text), names=("run.yaml",))
