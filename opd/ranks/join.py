"""Meeting the other processes of a launch: once, over DeepSpeed's process group and one of our own for plain data.

torch and DeepSpeed are imported when `join` is called.
"""

from __future__ import annotations

import os
import socket
import warnings
from datetime import timedelta

from opd.errors import ConfigError
from opd.ranks import extensions
from opd.ranks.deepspeed_log import quieten_deepspeed
from opd.ranks.launcher import call_roll, check_launcher
from opd.ranks.ranks import Ranks, local_device
from opd.ranks.watch import watch

_PATIENCE = timedelta(days=30)
"""The time limit for the others' values: none, in effect. `opd.ranks.watch` notices at once that a rank died."""

_joined: list[Ranks] = []


def join() -> Ranks:
    """Meet the other processes of the launch, once; later calls return the same.

    Without a launcher the group has one member, which DeepSpeed needs all the same. Raises ConfigError where
    DeepSpeed is not installed, what the launcher says is not whole, or ranks do not come in time.
    """
    if not _joined:
        _joined.append(_meet())
    return _joined[0]


def _meet() -> Ranks:
    quieten_deepspeed()
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"several processes, or backend = deepspeed, need DeepSpeed ({error}): pip install 'opd[deepspeed]'"
        ) from error
    import torch
    import torch.distributed as dist

    # DeepSpeed calls torch's collectives by names that torch is about to retire: that is no news for a user.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    launched = "RANK" in os.environ  # else there is no launcher, not even of one process
    if not launched:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": str(local_device())}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    check_launcher()
    store = call_roll() if launched else None
    device, first = local_device(), not launched or int(os.environ["LOCAL_RANK"]) == 0
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device)  # DeepSpeed takes the GPU of this number
    extensions.prepare(first=first)
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    del store  # torch has its own by now
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    ranks = Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), group=group)
    if ranks.world_size > 1:
        watch(ranks)
    return ranks
