"""What the ranks of a test do: started as a script by a launcher, with a JSON file that says what.

`replay` trains each case on recorded rollouts, and writes its metrics and weights; `train` makes whole runs with
`opd.train`, one after the other.
"""

import json
import pickle
import sys
from pathlib import Path

from safetensors.torch import save_file

from opd.launch.build import build
from opd.launch.config import Config
from opd.launch.train import ranks_of, train
from opd.sharding import held, whole_in_turn
from opd.watch import together


class Replay:
    """Stands where rollouts are played, and gives those that were recorded, by the index of their task."""

    def __init__(self, rollouts, groups):
        self.engine = rollouts.engine
        self.close = rollouts.close
        self._groups = {group.task.index: group for group in groups}

    def run(self, tasks, **_):
        return [self._groups[task.index] for task in tasks]


def replay(case):
    config = Config.from_dict(case["config"])
    ranks = ranks_of(config)
    run = build(config, ranks)
    rollouts = run.loop.rollouts = Replay(run.loop.rollouts, pickle.loads(Path(case["rollouts"]).read_bytes()))
    rows = [run.loop.step(number)[0] for number in range(config.train.steps)]
    weights = {name: w.clone() for name, w in whole_in_turn(run.loop.student)}
    sampling = {name: w.clone() for name, w in whole_in_turn(rollouts.engine.model)}
    facts = {"rows": rows, "trained": bytes_of_training(run.loop)}
    facts["sizes"] = ranks.gather(facts["trained"])
    if ranks.first:
        out = Path(case["out"])
        save_file({name: w.contiguous() for name, w in weights.items()}, out.with_suffix(".safetensors"))
        save_file({name: w.contiguous() for name, w in sampling.items()}, out.with_suffix(".engine.safetensors"))
        out.write_text(json.dumps(facts))
    run.close()


def bytes_of_training(loop):
    """What this rank holds of weights, float32 copies and moments, in bytes of distinct storage."""
    if not hasattr(loop.backend, "_engine"):
        return 0
    tensors = [held(p) for p in loop.student.parameters()]
    optimizer = loop.backend._engine.optimizer
    for name in ("fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat"):
        tensors += getattr(optimizer, name, [])
    inner = getattr(optimizer, "optimizer", optimizer)
    tensors += [t for state in inner.state.values() for t in state.values() if hasattr(t, "untyped_storage")]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def main():
    cases = json.loads(Path(sys.argv[-1]).read_text())
    with together():
        for case in cases:
            if case["do"] == "replay":
                replay(case)
            else:
                train(Config.from_dict(case["config"]), resume=case["resume"])


if __name__ == "__main__":
    main()
