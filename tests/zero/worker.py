"""What the ranks of a test do: started as a script by a launcher, with a JSON file that says what.

`replay` trains on recorded rollouts, and writes metrics and weights; `train` makes a whole run with `opd.train`;
`measure` makes one step and writes what the first rank holds then and afterwards; `copy` copies a folder; `fresh` makes
a whole run and notes whether the engine samples from the weights that train.
"""

import gc
import json
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from opd.launch.checks.loading import config_from
from opd.launch.run.build import build
from opd.launch.run.ranks import ranks_of
from opd.launch.train import train
from opd.models.sharding import held_part, whole_in_turn
from opd.ranks.join import join
from opd.ranks.watch import together
from opd.trainers.loop import loop


class Replay:
    """Stands where rollouts are played, and gives those that were recorded, by the index of their task."""

    def __init__(self, rollouts, groups):
        self.engine = rollouts.engine
        self.close = rollouts.close
        self._groups = {group.task.index: group for group in groups}

    def run(self, tasks, **_):
        return [self._groups[task.index] for task in tasks]


def replay(case):
    config = config_from(case["config"])
    ranks = ranks_of(config)
    run = build(config, ranks)
    player = run.loop.player
    rollouts = player.scheduler = Replay(player.scheduler, pickle.loads(Path(case["rollouts"]).read_bytes()))
    if case["spoil"] is not None:
        spoil(run.loop, ranks, step=case["spoil"])
    rows = [run.loop.step(number)[0] for number in range(config.train.steps)]
    player.sync()
    weights = {name: w.clone() for name, w in whole_in_turn(run.loop.models.student)}
    sampling = {name: w.clone() for name, w in whole_in_turn(rollouts.engine.model)}
    if ranks.first:
        out = Path(case["out"])
        save_file({name: w.contiguous() for name, w in weights.items()}, out.with_suffix(".safetensors"))
        save_file({name: w.contiguous() for name, w in sampling.items()}, out.with_suffix(".engine.safetensors"))
        out.write_text(json.dumps(rows))
    run.close()


def spoil(loop, ranks, *, step):
    """Make the last rank's gradients of a step infinite."""
    player, backend = loop.player, loop.models.backend
    train, steps = backend.train, []
    play = player.play_step
    player.play_step = lambda number: steps.append(number) or play(number)

    def spoiled(work, *, last):
        def infinite():
            result = work()
            broken = steps[-1] == step and ranks.rank == ranks.world_size - 1
            return replace(result, loss=result.loss * torch.inf) if broken else result

        return train(infinite, last=last)

    backend.train = spoiled


def measure(case):
    """What the first rank holds in a step, and what a closed run leaves, in bytes of distinct storage."""
    before = alive()
    sizes = sizes_of_a_step(case)
    sizes["left"] = alive() - before
    if join().first:
        Path(case["out"]).write_text(json.dumps(sizes))


def alive():
    gc.collect()
    return size(found for found in gc.get_objects() if isinstance(found, torch.Tensor))


def sizes_of_a_step(case):
    run = build(config_from(case["config"]), join())
    optimizer, step, gradients = run.loop.models.backend._engine.optimizer, run.loop.models.backend.step, []

    def measured():
        flat = getattr(optimizer, "grad_partitions_flat_buffer", None)  # of ZeRO-3
        lists = [[flat]] if flat is not None else optimizer.averaged_gradients.values()
        gradients.append(size(gradient for own in lists for gradient in own))
        return step()

    run.loop.models.backend.step = measured
    run.loop.step(0)
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")  # of ZeRO-3, of ZeRO-1 and 2
    masters = [tensor for name in names for tensor in getattr(optimizer, name, [])]
    moments = [t for state in optimizer.optimizer.state.values() for t in state.values() if t.numel() > 1]
    sizes = {
        "weights": size(map(held_part, run.loop.models.student.parameters())),
        "gradients": gradients[0],
        "optimiser": size([*masters, *moments]),
        "teacher": size(run.loop.models.teacher.own.by_name.values()),
        "copy for rollouts": size(map(held_part, run.loop.player.scheduler.engine.model.parameters())),
    }
    run.close()
    return sizes


def fresh(case):
    """A whole run, and how far the engine's log-probs of each step's fresh samples are from the trainer's: nats."""
    gaps, update = [], loop.update

    def noted(*args, **options):
        updated = update(*args, **options)
        gaps.append(max((float(own["sampler_gap"].abs().max()) for own in updated.facts.values()), default=0.0))
        return updated

    loop.update = noted
    try:
        result = train(config_from(case["config"]))
    finally:
        loop.update = update
    gaps = [max(step) for step in zip(*join().gather(gaps), strict=True)]
    if join().first:
        (result.out / "gaps.json").write_text(json.dumps(gaps))


def copy(case):
    """A folder as it would be had its run been stopped earlier: without some of it, and with a shorter data file."""

    def cut():
        to = Path(shutil.copytree(case["source"], case["to"]))
        for path in (to / name for name in case.get("gone", [])):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if case.get("short"):
            file = to / "data" / "revisions.jsonl"
            file.write_bytes(file.read_bytes()[: -case["short"]])

    join().from_first(cut)


def size(tensors):
    stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(stores.values())


def main():
    cases = json.loads(Path(sys.argv[-1]).read_text())
    with together():
        for case in cases:
            if case["do"] == "train":
                train(config_from(case["config"]), resume=case["resume"])
            else:
                {"replay": replay, "measure": measure, "copy": copy, "fresh": fresh}[case["do"]](case)


if __name__ == "__main__":
    main()
