"""Two ranks with vLLM in each: where the engines are, and what is left of the ranks' groups when they end.

Stands in the place of a launcher (`launch(cases, launcher=...)`), and starts itself as so many ranks. Each rank writes
what it found to the folder that the case names.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from opd.engines.base import Request, Sampling, generate
from opd.engines.vllm import VllmEngine
from opd.engines.weights import ModelWeights
from opd.episodes.config import RolloutConfig
from opd.models.config import ModelConfig
from opd.models.loading import load
from opd.ranks.join import join
from opd.ranks.watch import together


def sampled(engine, model, rank):
    engine.update_weights(ModelWeights(model), 0)
    engine.begin(Sampling(temperature=1.0), frozenset())
    asked = [Request(session=n, prompt_ids=[20 + n, 30, 40], seed=n, max_tokens=6) for n in range(rank + 1, rank + 5)]
    return {done.session: done.token_ids for done in generate(engine, asked)}


def summed(value, group):
    """A number summed over the ranks by a group that the engines did not make."""
    total = torch.tensor([float(value)])
    dist.all_reduce(total, group=group)
    return total.item()


def work(case, ranks):
    model = load(ModelConfig(name=case["model"], dtype="float32")).model
    config = RolloutConfig(max_length=128, concurrency=8, vllm={"kv_cache_gib": 0.03})
    told = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    found = []
    for _ in range(2):  # a second engine starts where the first has ended
        engine = VllmEngine(model, config.vllm, config.limits)
        local_rank = engine._core.llm.model_executor.driver_worker.worker.local_rank
        ids = sampled(engine, model, ranks.rank)
        engine.close()
        sums = [summed(ranks.rank + 1, group) for group in (None, ranks.group)]
        found.append({"local_rank": local_rank, "ids": ids, "sums": sums, "ranks": ranks.gather(ranks.rank)})
    kept = {name: os.environ[name] for name in told} == told
    path = Path(case["out"]) / f"{ranks.rank}.json"
    path.write_text(json.dumps({"engines": found, "told": told, "kept": kept}))


def main():
    if "RANK" not in os.environ:
        ranks, _, cases = sys.argv[1:]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
        os.execv(sys.executable, [*command, __file__, cases])
    with together():
        for case in json.loads(Path(sys.argv[-1]).read_text()):
            work(case, join())


if __name__ == "__main__":
    main()
