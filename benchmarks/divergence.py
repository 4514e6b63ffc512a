"""Measures time and memory of a divergence from hidden states, forward and backward: ours beside what else there is.

    python benchmarks/divergence.py                      # the table of docs/divergences.md
    python benchmarks/divergence.py --tokens 512 --kind jsd --frozen-head
    python benchmarks/divergence.py --device cuda --dtype bfloat16 --tokens 1024 4096 16384
    python benchmarks/divergence.py --device cuda --only "opd, weighted" --tile-mib 256 512 1024

Memory is the peak above inputs and heads, the gradient of the student's head included; times are medians. On a CPU
every cell runs in a process of its own, and CPU seconds say more than wall seconds on a busy machine. On a GPU the
first calls, which compile, are not counted.

Loss and gradients stand beside the times, so that nobody is fast by being wrong. On a GPU the table gives their
distances from the exact ones, which the dense form computes in float64 of the same inputs, a few tokens at a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from opd.losses import Divergence
from opd.maths import divergence_tiles, head
from opd.maths.divergence import chunked_divergence

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


class Inputs(NamedTuple):
    """Holds the inputs of one divergence: [N, H] and [V, H] of each side, and the weights [N]."""

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    weights: Tensor


def dense(inputs: Inputs, kind: str) -> Tensor:
    """Compute the divergence from full logits, as one would write it; softmaxes in float32 at least."""
    student = wide(inputs.hidden @ inputs.head.T).log_softmax(-1)
    with torch.no_grad():
        teacher = wide(inputs.teacher_hidden @ inputs.teacher_head.T).log_softmax(-1)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return kl_div(q, p, log_target=True, reduction="none").sum(-1)

    if kind == "forward_kl":
        return kl(teacher, student) @ inputs.weights
    if kind == "reverse_kl":
        return kl(student, teacher) @ inputs.weights
    mix = torch.logaddexp(student, teacher) - math.log(2)
    return (kl(teacher, mix) + kl(student, mix)) @ inputs.weights / 2


def wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def weighted(inputs: Inputs, kind: Any) -> Tensor:
    return chunked_divergence(*inputs[:4], Divergence(kind), weights=inputs.weights)


def per_token(inputs: Inputs, kind: Any) -> Tensor:
    return chunked_divergence(*inputs[:4], Divergence(kind)) @ inputs.weights


def trl(inputs: Inputs, kind: str) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, head, teacher_hidden, teacher_head, weights = inputs
    values, _ = ChunkedDivergenceFunction.apply(hidden, head, None, teacher_hidden, teacher_head, None, BETA[kind])
    return values @ weights


def liger(inputs: Inputs, kind: str) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # Its defaults, but for the cross-entropy; it has no weights: it takes the mean, and so do all of us here.
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[kind])
    labels = torch.zeros(len(inputs.hidden), dtype=torch.long, device=inputs.hidden.device)
    return loss(*inputs[:4], true_labels=labels)


IMPLEMENTATIONS: dict[str, Callable[[Inputs, str], Tensor]] = {
    "dense": dense,
    "opd, weighted": weighted,
    "opd, per token": per_token,
    "trl": trl,
    "liger": liger,
}
NEEDS = {"trl": "trl", "liger": "liger_kernel"}


def draw(tokens: int, options: argparse.Namespace) -> Inputs:
    torch.manual_seed(0)
    make = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    return Inputs(
        torch.randn(tokens, options.hidden, **make).requires_grad_(),
        torch.randn(options.vocabulary, options.hidden, **make).mul_(0.05).requires_grad_(not options.frozen_head),
        torch.randn(tokens, options.hidden, **make),
        torch.randn(options.vocabulary, options.hidden, **make).mul_(0.05),  # in place: a copy would count as the peak
        torch.full((tokens,), 1 / tokens, device=options.device),
    )


def cpu_cell(name: str, tokens: int, options: argparse.Namespace) -> dict[str, float]:
    """Measure, in a process of its own, what one implementation needs for one size."""
    inputs = draw(tokens, options)
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
    """Return the MiB that this process holds in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def in_a_process(name: str, tokens: int) -> dict[str, float] | str:
    """Return a cell's figures, or the reason why there are none."""
    command = [sys.executable, __file__, *sys.argv[1:], "--cell", name, str(tokens)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        reason = finished.stderr.strip().splitlines()
        return f"failed ({finished.returncode}): {reason[-1] if reason else 'killed'}"
    figures: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return figures


class Exact(NamedTuple):
    """Holds what all are compared with, in the memory of the CPU: it must not count as anybody's."""

    loss: float
    hidden: Tensor
    head: Tensor | None


def exact(inputs: Inputs, kind: str) -> Exact:
    """Compute the dense form in float64, `SLICE` tokens at a time: gradients of slices add up."""
    weight = inputs.head.detach().double().requires_grad_(inputs.head.requires_grad)
    teacher = inputs.teacher_head.double()
    total, slices = 0.0, []
    for rows in head.tiles(len(inputs.hidden), SLICE):
        hidden = inputs.hidden[rows].detach().double().requires_grad_()
        taught = inputs.teacher_hidden[rows].double()
        loss = dense(Inputs(hidden, weight, taught, teacher, inputs.weights[rows].double()), kind)
        loss.backward()
        total += loss.item()
        assert hidden.grad is not None
        slices.append(hidden.grad.cpu())
    return Exact(total, torch.cat(slices), None if weight.grad is None else weight.grad.cpu())


SLICE = 512


def cuda_cell(name: str, inputs: Inputs, truth: Exact, options: argparse.Namespace) -> dict[str, float] | str:
    """Measure what one implementation needs for one size, and how far it is from the exact result."""
    times = []
    torch.cuda.empty_cache()  # of what another one left
    try:
        for _ in range(WARM_UP + options.repeats):
            inputs.hidden.grad = inputs.head.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            loss = IMPLEMENTATIONS[name](inputs, options.kind)
            loss.backward()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
            peak = torch.cuda.max_memory_allocated() - before
    except Exception as error:
        return f"failed: {type(error).__name__} {str(error).partition(chr(10))[0][:80]}"
    return {
        "ms": statistics.median(times[WARM_UP:]),
        "first": times[0] / 1000,
        "mib": peak / 2**20,
        "loss": abs(loss.item() - truth.loss) / truth.loss,
        "hidden": distance(inputs.hidden.grad, truth.hidden),
        "head": distance(inputs.head.grad, truth.head),
    }


WARM_UP = 2


def distance(ours: Tensor | None, theirs: Tensor | None) -> float:
    if ours is None or theirs is None:
        return float("nan")
    theirs = theirs.to(ours.device)
    return float((ours - theirs).norm() / theirs.norm())


def report_cpu(options: argparse.Namespace) -> None:
    """Print the table, row by row as it is measured."""
    print("| tokens | implementation | wall s | CPU s | CPU / dense | MiB | MiB / dense | loss | gradient norm |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for tokens in options.tokens:
        base: dict[str, float] | None = None
        for name in options.only:
            figures = in_a_process(name, tokens) if installed(name) else "not installed"
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


def report_cuda(options: argparse.Namespace) -> None:
    """Print the table, row by row as it is measured, all in this process."""
    print("| tokens | implementation | ms | / dense | MiB | / dense | first call s | loss | hidden | head |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for tokens in options.tokens:
        inputs = draw(tokens, options)
        truth = exact(inputs, options.kind)
        base: dict[str, float] | None = None
        for name, shown in variants(options):
            figures = cuda_cell(name, inputs, truth, options) if installed(name) else "not installed"
            if isinstance(figures, str):
                print(f"| {tokens} | {shown} | {figures} |", flush=True)
                continue
            base = figures if name == "dense" else base
            ratios = [figures[key] / base[key] if base else float("nan") for key in ("ms", "mib")]
            print(
                f"| {tokens} | {shown} | {figures['ms']:.2f} | {ratios[0]:.2f} | {figures['mib']:.0f} | "
                f"{ratios[1]:.3f} | {figures['first']:.1f} | {figures['loss']:.1e} | {figures['hidden']:.1e} | "
                f"{figures['head']:.1e} |",
                flush=True,
            )


def variants(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield the implementations and their labels, ours once for each size of tile; set that size."""
    sizes = options.tile_mib
    for name in options.only:
        ours = name.startswith("opd")
        for tile in sizes if ours else sizes[:1]:
            head.TILE_BYTES["accelerator"] = tile * 2**20
            yield name, f"{name}, tile {tile} MiB" if ours and len(sizes) > 1 else name


def installed(name: str) -> bool:
    return name not in NEEDS or importlib.util.find_spec(NEEDS[name]) is not None


def report(options: argparse.Namespace) -> None:
    width = getattr(torch, options.dtype).itemsize
    gradient = 0 if options.frozen_head else options.vocabulary * options.hidden * width / 2**20
    print(f"{options.kind}, vocabulary {options.vocabulary}, hidden {options.hidden}, {options.dtype}", end=", ")
    print(f"torch {torch.__version__}; MiB include {gradient:.0f} of the head's gradient")
    if options.device == "cpu":
        print(f"{torch.get_num_threads()} threads\n")
        report_cpu(options)
    else:
        how = "operation by operation" if options.plain else "in one kernel"
        print(f"{torch.cuda.get_device_name()}; the work on a tile is done {how}\n")
        report_cuda(options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--kind", choices=list(BETA), default="forward_kl")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--frozen-head", action="store_true", help="no gradient for the student's head, as with LoRA")
    parser.add_argument("--only", choices=list(IMPLEMENTATIONS), nargs="+", default=list(IMPLEMENTATIONS))
    tile = [head.TILE_BYTES["accelerator"] // 2**20]
    parser.add_argument("--tile-mib", type=int, nargs="+", default=tile, help="tile sizes on a GPU")
    parser.add_argument("--plain", action="store_true", help="on a GPU, no kernel for the work on a tile")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    divergence_tiles.KERNEL = not options.plain
    if options.cell:
        print(json.dumps(cpu_cell(options.cell[0], int(options.cell[1]), options)))
    else:
        report(options)


if __name__ == "__main__":
    main()
