"""Settings of vLLM, the command of a server, `opd serve`, and a run whose engine is lost; no vLLM is needed here."""

import json
from pathlib import Path

import pytest

from opd.engines.transformers import TransformersEngine
from opd.engines.vllm import common_arguments
from opd.engines.vllm_process import server_command, server_environment
from opd.episodes.config import RolloutConfig
from opd.errors import ConfigError, EngineError
from opd.launch.checks import engines
from opd.launch.checks.loading import config_from, model_to_serve
from opd.launch.plan.plan import plan
from opd.launch.run import servers
from opd.launch.run.build import sampler_of
from opd.launch.train import train
from opd.losses import Correction
from opd.models.config import ModelConfig
from opd.tracking import read_rows

GOOD = {"method": "opsd", "model": "tiny:lookup", "env": "opd/Lookup-v0"}


def problem_of(rollout, **sections):
    with pytest.raises(ConfigError) as caught:
        config_from({**GOOD, **sections, "rollout": rollout})
    return str(caught.value)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with vLLM and without a key."""
    monkeypatch.setattr(engines, "is_installed", lambda package: True)
    monkeypatch.setattr(servers, "is_installed", lambda package: True)
    monkeypatch.delenv("OPD_VLLM_KEY", raising=False)


WRONG = {
    "settings of vLLM without vLLM": (
        {"vllm": {"replicas": 2}},
        "rollout.vllm.replicas has no effect while rollout.engine = transformers",
    ),
    "servers for an engine in process": (
        {"engine": "vllm", "vllm": {"servers": ["http://127.0.0.1:8000"]}},
        "rollout.vllm.servers has no effect while rollout.engine = vllm",
    ),
    "what a running server cannot be told": (
        {"engine": "vllm_server", "vllm": {"servers": ["http://127.0.0.1:8000"], "enforce_eager": True}},
        "rollout.vllm.enforce_eager has no effect while rollout.vllm.servers names servers that run already",
    ),
    "devices for some of the servers": (
        {"engine": "vllm_server", "vllm": {"replicas": 2, "devices": ["0"]}},
        "rollout.vllm.devices has 1 entries for rollout.vllm.replicas = 2",
    ),
    "a server beyond this machine without a key": (
        {"engine": "vllm_server", "vllm": {"servers": ["http://10.0.0.7:8000"]}},
        "rollout.vllm.servers names http://10.0.0.7:8000, beyond this machine, but the environment variable",
    ),
    "a server that is no address": (
        {"engine": "vllm_server", "vllm": {"servers": ["10.0.0.7:8000"]}},
        "rollout.vllm.servers",
    ),
    "an engine argument that sampling relies on": (
        {"engine": "vllm", "vllm": {"engine_args": {"logprobs_mode": "raw_logprobs"}}},
        "rollout.vllm.engine_args cannot set logprobs_mode",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_cannot_be_meant_are_refused_with_the_mend(name):
    rollout, message = WRONG[name]
    assert message in problem_of(rollout)


def test_weights_that_vllm_cannot_hold_are_refused():
    message = problem_of({"engine": "vllm"}, model={"name": "tiny:lookup", "dtype": "float64"})
    assert "model.dtype = float64 is more than vLLM knows. Set rollout.vllm.dtype: float32" in message


@pytest.mark.parametrize("narrowed", [{"top_p": 0.9}, {"top_k": 20}])
def test_truncated_sampling_with_vllm_needs_a_decision_about_the_ratio(narrowed):
    message = problem_of({"engine": "vllm", **narrowed})
    assert "rollout.correction.mode = truncate (what auto means with engine = vllm) with top_p" in message
    assert "or correction.mode: none" in message
    decided = {"engine": "vllm", "correction": {"mode": "none"}, **narrowed}
    assert not sampler_of(config_from({**GOOD, "rollout": decided}).rollout).measured


def test_vllms_distance_is_corrected_by_itself_and_measured_whatever_is_done_about_it():
    def sampler(**rollout):
        return sampler_of(config_from({**GOOD, "rollout": rollout}).rollout)

    assert sampler(engine="vllm").correction == Correction(mode="truncate", level="token", low=0.5, high=2.0)
    left = sampler(engine="vllm", correction={"mode": "none"})
    assert (left.correction, left.measured) == (None, True)
    own = sampler(engine="transformers")
    assert (own.correction, own.measured) == (None, False)


@pytest.mark.parametrize(
    ("rollout", "row"),
    [
        ({"engine": "vllm"}, "vLLM in this process; importance weights by token, at most 2 (1 where"),
        (
            {"engine": "vllm_server", "vllm": {"replicas": 2}, "correction": {"mode": "none"}},
            "vLLM: 2 servers that each process of the run starts and ends; no importance weights",
        ),
        (
            {
                "engine": "vllm_server",
                "vllm": {"servers": ["http://127.0.0.1:1"]},
                "correction": {"mode": "mask", "low": 0.4},
            },
            "vLLM: http://127.0.0.1:1; importance weights by token, what is outside of 0.4 to 2 is dropped",
        ),
        ({}, "transformers: the model that trains; no importance weights"),
    ],
)
def test_the_plan_says_who_samples_and_what_is_corrected(rollout, row):
    made = plan(config_from({**GOOD, "rollout": rollout}), Path("runs/a"), gpu=False)
    assert dict(made.rows())["rollouts"].startswith(row)


def test_without_vllm_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(engines, "is_installed", lambda package: package != "vllm")
    assert "rollout.engine = vllm needs vLLM: pip install 'opd[vllm]'" in problem_of({"engine": "vllm"})
    servers_elsewhere = {"engine": "vllm_server", "vllm": {"servers": ["http://localhost:8000"]}}
    assert config_from({**GOOD, "rollout": servers_elsewhere}).rollout.engine == "vllm_server"


def test_the_address_of_a_server_may_change_when_a_run_is_resumed():
    def at(url):
        return config_from({**GOOD, "rollout": {"engine": "vllm_server", "vllm": {"servers": [url]}}})

    assert at("http://127.0.0.1:1").differs_for_resume(at("http://127.0.0.1:2").dump()) == []


def test_a_command_holds_every_argument_and_no_secret():
    arguments = {"max_model_len": 64, "enforce_eager": True, "sleep": False, "max_logprobs": -1, "a": {"b": "opd"}}
    command = server_command("folder", arguments, host="127.0.0.1", port=81, keyed=True)
    assert command[command.index("--model") + 1] == "folder"
    for part in ("--max-model-len=64", "--enforce-eager", "--max-logprobs=-1", '--a={"b": "opd"}'):
        assert part in command
    assert "--sleep" not in " ".join(command)
    assert command[-2:] == ["--middleware", "opd.engines.vllm_worker.RequireKey"]
    assert server_environment("secret")["VLLM_API_KEY"] == "secret"
    assert "secret" not in " ".join(command[1:])  # after the interpreter, whose folder may be called anything


def test_what_a_user_gives_vllm_wins_over_what_we_choose():
    config = RolloutConfig(vllm={"engine_args": {"block_size": 64}})
    assert common_arguments(config.vllm, config.limits, on_cpu=True)["block_size"] == 64


# -- opd serve -----------------------------------------------------------------------------------------


@pytest.fixture
def commands(monkeypatch):
    """What `opd serve` would run."""
    seen = []

    monkeypatch.setattr(servers.os, "execve", lambda path, command, env: seen.append((command, env)))
    monkeypatch.setattr(servers, "check_port", lambda host, port: None)
    return seen


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.7", "::", "node-3"])
def test_beyond_this_machine_nothing_is_served_without_a_key(commands, monkeypatch, host):
    model, rollout = ModelConfig(name="some/model"), RolloutConfig()
    with pytest.raises(ConfigError, match=rf"--host {host} would let others .*Set OPD_VLLM_KEY"):
        servers.serve(model, rollout, host=host, port=8000)
    assert commands == []
    monkeypatch.setenv("OPD_VLLM_KEY", "secret")
    servers.serve(model, rollout, host=host, port=8000)
    [(command, environment)] = commands
    assert "opd.engines.vllm_worker.RequireKey" in command
    assert environment["VLLM_API_KEY"] == "secret"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_on_loopback_a_key_is_not_needed(commands, host):
    servers.serve(ModelConfig(name="some/model", dtype="float32"), RolloutConfig(), host=host, port=8000)
    [(command, _)] = commands
    assert "opd.engines.vllm_worker.RequireKey" not in command
    assert "--dtype=float32" in command
    assert json.loads(next(p for p in command if "weight-transfer" in p).split("=", 1)[1]) == {"backend": "opd_weights"}


def test_a_model_is_served_by_name_or_as_a_runs_file_says(tmp_path):
    model, rollout = model_to_serve("tiny:lookup", {"rollout": {"max_length": 64}})
    assert (model.name, rollout.max_length) == ("tiny:lookup", 64)
    file = tmp_path / "run.yaml"
    file.write_text("method: opsd\nmodel: tiny:lookup\nenv: opd/Lookup-v0\nrollout: {max_length: 300}\n")
    assert model_to_serve(str(file), {})[1].max_length == 300
    # Where the run will find this server is of no account here, and both sides of the settings may be given.
    file.write_text(
        "method: opsd\nmodel: tiny:lookup\nenv: opd/Lookup-v0\nrollout:\n  engine: vllm_server\n"
        "  vllm: {servers: ['http://127.0.0.1:9'], api_key_env: A_KEY}\n"
    )
    assert model_to_serve(str(file), {"rollout": {"vllm": {"kv_cache_gib": 0.5}}})[1].vllm.kv_cache_gib == 0.5
    file.write_text("method: opsd\n")
    with pytest.raises(ConfigError, match=r"run.yaml: model is missing"):
        model_to_serve(str(file), {})
    with pytest.raises(ConfigError, match=r'model.name = "tiny:lokup" is unknown.*Did you mean "tiny:lookup"'):
        model_to_serve("tiny:lokup", {})


def test_without_vllm_nothing_is_served(commands, monkeypatch):
    monkeypatch.setattr(servers, "is_installed", lambda package: False)
    with pytest.raises(ConfigError, match=r"opd serve needs vLLM: pip install 'opd\[vllm\]'"):
        servers.serve(ModelConfig(name="some/model"), RolloutConfig(), host="127.0.0.1", port=8000)
    assert commands == []


def test_a_gguf_file_is_not_served(commands):
    with pytest.raises(ConfigError, match="vLLM serves hub ids and Hugging Face folders"):
        servers.serve(ModelConfig(name="a.gguf"), RolloutConfig(), host="127.0.0.1", port=8000)


# -- a lost engine -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return tiny_model()


def test_a_run_whose_engine_is_lost_leaves_a_checkpoint_and_trains_nothing_twice(tiny, tmp_path, monkeypatch):
    def settings(name):
        return {
            "method": "opsd",
            "out": str(tmp_path / name),
            "model": str(tiny),
            "env": "opd/Lookup-v0",
            "rollout": {"max_tokens": 8, "max_length": 256},
            "train": {"steps": 3, "tasks_per_step": 3, "lr": 1e-3, "tokens_per_microbatch": 512, "threads": 1},
            "tracking": {"wandb": "disabled", "console": False, "plot": False},
            "opsd": {"privileged": "plan", "divergence": {"clip": None}},
        }

    train(settings("whole"))
    begin, rounds = TransformersEngine.begin, []

    def lost_in_the_third_step(self, *arguments):
        rounds.append(1)
        if len(rounds) == 5:  # each of the first two steps has a check of the engine too
            raise EngineError("http://127.0.0.1:1 did not come up within rollout.vllm.restart_timeout = 1 seconds.")
        begin(self, *arguments)

    monkeypatch.setattr(TransformersEngine, "begin", lost_in_the_third_step)
    with pytest.raises(EngineError, match=r"did not come up .*Step 2 is saved: opd train .*/cut --resume"):
        train(settings("cut"))
    train(settings("cut"), resume=True)
    whole, cut = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    assert [row["step"] for row in cut] == [1, 2, 3]
    assert [row["train/loss"] for row in cut] == [row["train/loss"] for row in whole]
