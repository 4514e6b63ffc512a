"""Time and memory of a divergence from hidden states, forward and backward: ours beside what else there is.

    python benchmarks/divergence.py                      # the table of docs/divergences.md
    python benchmarks/divergence.py --tokens 512 --kind jsd --frozen-head

Every cell runs in a process of its own. Memory is the peak above inputs and heads, the gradient of the
student's head included. Seconds are medians; CPU seconds say more than wall seconds on a busy machine. The
losses and gradients of a row are compared with the dense ones, so nobody is fast by being wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from opd.divergence import chunked_divergence

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


class Inputs(NamedTuple):
    """Of one divergence: [N, H], [V, H], twice, and the weights [N]."""

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    weights: Tensor


def dense(inputs: Inputs, kind: str) -> Tensor:
    """Full logits, as one would write it."""
    student = (inputs.hidden @ inputs.head.T).log_softmax(-1)
    with torch.no_grad():
        teacher = (inputs.teacher_hidden @ inputs.teacher_head.T).log_softmax(-1)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return kl_div(q, p, log_target=True, reduction="none").sum(-1)

    if kind == "forward_kl":
        return kl(teacher, student) @ inputs.weights
    if kind == "reverse_kl":
        return kl(student, teacher) @ inputs.weights
    mix = torch.logaddexp(student, teacher) - torch.tensor(2.0).log()
    return (kl(teacher, mix) + kl(student, mix)) @ inputs.weights / 2


def weighted(inputs: Inputs, kind: Any) -> Tensor:
    return chunked_divergence(*inputs[:4], kind, weights=inputs.weights)


def per_token(inputs: Inputs, kind: Any) -> Tensor:
    return chunked_divergence(*inputs[:4], kind) @ inputs.weights


def trl(inputs: Inputs, kind: str) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, head, teacher_hidden, teacher_head, weights = inputs
    values, _ = ChunkedDivergenceFunction.apply(hidden, head, None, teacher_hidden, teacher_head, None, BETA[kind])
    return values @ weights


def liger(inputs: Inputs, kind: str) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # Its defaults, but for the cross-entropy; it has no weights: it takes the mean, and so do all of us here.
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[kind])
    return loss(*inputs[:4], true_labels=torch.zeros(len(inputs.hidden), dtype=torch.long))


IMPLEMENTATIONS: dict[str, Callable[[Inputs, str], Tensor]] = {
    "dense": dense,
    "opd, weighted": weighted,
    "opd, per token": per_token,
    "trl": trl,
    "liger": liger,
}
NEEDS = {"trl": "trl", "liger": "liger_kernel"}


def cell(name: str, tokens: int, options: argparse.Namespace) -> dict[str, float]:
    """Runs in its own process: what one implementation needs for one size."""
    torch.manual_seed(0)
    inputs = Inputs(
        torch.randn(tokens, options.hidden).requires_grad_(),
        torch.randn(options.vocabulary, options.hidden).mul_(0.05).requires_grad_(not options.frozen_head),
        torch.randn(tokens, options.hidden),
        torch.randn(options.vocabulary, options.hidden).mul_(0.05),  # in place: a copy would count as the peak
        torch.full((tokens,), 1 / tokens),
    )
    before, wall, cpu = resident(), [], []
    for _ in range(options.repeats):
        inputs.hidden.grad = inputs.head.grad = None
        start, start_cpu = time.perf_counter(), time.process_time()
        loss = IMPLEMENTATIONS[name](inputs, options.kind)
        loss.backward()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    assert inputs.hidden.grad is not None
    return {
        "wall": statistics.median(wall),
        "cpu": statistics.median(cpu),
        "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before,
        "loss": loss.item(),
        "gradient": inputs.hidden.grad.norm().item(),
    }


def resident() -> float:
    """MiB of this process in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def run(name: str, tokens: int) -> dict[str, float] | str:
    """A cell's figures, or why there are none."""
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        return "not installed"
    command = [sys.executable, __file__, *sys.argv[1:], "--cell", name, str(tokens)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        reason = finished.stderr.strip().splitlines()
        return f"failed ({finished.returncode}): {reason[-1] if reason else 'killed'}"
    figures: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return figures


def report(options: argparse.Namespace) -> None:
    """The table, row by row as it is measured."""
    head_gradient = 0 if options.frozen_head else options.vocabulary * options.hidden * 4 / 2**20
    print(
        f"{options.kind}, vocabulary {options.vocabulary}, hidden {options.hidden}, float32, torch {torch.__version__}"
    )
    print(f"{torch.get_num_threads()} threads; MiB include {head_gradient:.0f} of the head's gradient\n")
    print("| tokens | implementation | wall s | CPU s | CPU / dense | MiB | MiB / dense | loss | gradient norm |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for tokens in options.tokens:
        base: dict[str, float] | None = None
        for name in options.only:
            figures = run(name, tokens)
            if isinstance(figures, str):
                print(f"| {tokens} | {name} | {figures} |", flush=True)
                continue
            base = figures if name == "dense" else base
            ratios = [figures[key] / base[key] if base else float("nan") for key in ("cpu", "mib")]
            print(
                f"| {tokens} | {name} | {figures['wall']:.2f} | {figures['cpu']:.2f} | {ratios[0]:.2f} | "
                f"{figures['mib']:.0f} | {ratios[1]:.3f} | {figures['loss']:.6f} | {figures['gradient']:.6f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--kind", choices=list(BETA), default="forward_kl")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--frozen-head", action="store_true", help="no gradient for the student's head, as with LoRA")
    parser.add_argument("--only", choices=list(IMPLEMENTATIONS), nargs="+", default=list(IMPLEMENTATIONS))
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(cell(options.cell[0], int(options.cell[1]), options)))
    else:
        report(options)


if __name__ == "__main__":
    main()
