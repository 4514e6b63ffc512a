"""Measures what a baseline does to the variance of the sampled-token gradient, on rollouts of SmolLM2-135M.

    python benchmarks/variance.py                        # the table of docs/divergences.md

The student explains sums; the teacher is the same model, shown the answer. The variance is that of the
gradient by the logits, exact at every state (`opd.maths.variance`), so the only sampling is that of the states.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opd.losses import Divergence
from opd.maths.advantage import chunked_advantages
from opd.maths.divergence import chunked_divergence
from opd.maths.logprobs import chunked_logprobs
from opd.maths.variance import GradientVariance, chunked_gradient_variance
from opd.models.causal import CausalModel
from opd.models.config import ModelConfig
from opd.models.loading import load

BASELINES: dict[str, dict[str, Any]] = {
    "top 100, sum": {"baseline": "top_k", "top_k": 100},
    "top 100, renormalised": {"baseline": "top_k", "top_k": 100, "renormalise": True},
    "full": {"baseline": "full"},
    "optimal": {"baseline": "optimal"},
}
EDGES = [0.0, 0.1, 0.5, 1.0, 2.0, float("inf")]
"""Nats of entropy of the student, between which states are put together."""


def prompts(tokenizer: Any, count: int) -> list[tuple[list[int], list[int]]]:
    """Return the prompt ids of the student and of the teacher, for `count` sums."""
    generator = torch.Generator().manual_seed(0)

    def render(text: str) -> list[int]:
        message = [{"role": "user", "content": text}]
        return list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))

    pairs = []
    for a, b in torch.randint(10, 100, (count, 2), generator=generator).tolist():
        question = f"What is {a} + {b}? Explain your steps briefly."
        pairs.append((render(question), render(f"{question}\n\nThe correct answer is {a + b}.")))
    return pairs


@torch.no_grad()
def rollouts(model: CausalModel, tokenizer: Any, count: int, tokens: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Sample completions: ids [T], and the whole sequences of student and teacher that end with them."""
    transformer: Any = model.model
    result = []
    for student, teacher in prompts(tokenizer, count):
        whole = transformer.generate(
            torch.tensor([student]), max_new_tokens=tokens, do_sample=True, temperature=1.0, top_p=1.0, top_k=0
        )[0]
        completion = whole[len(student) :]
        result.append((completion, whole, torch.cat([torch.tensor(teacher), completion])))
    return result


def rows(model: CausalModel, sequence: Tensor, completion: Tensor) -> Tensor:
    """Return the hidden states that predict the completion: [T, H]."""
    return model.hidden(sequence[None])[0, -len(completion) - 1 : -1]


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Return the least seconds of a few runs: what the work takes when nothing disturbs it."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best


def print_variances(variances: dict[str, GradientVariance], entropy: Tensor) -> None:
    print("| entropy (nats) | states | baseline | variance / none | share of the reachable | raised at |")
    print("| --- | ---: | --- | ---: | ---: | ---: |")
    for low, high in [*itertools.pairwise(EDGES), (1.0, float("inf")), (0.0, float("inf"))]:
        inside = (entropy >= low) & (entropy < high)
        for name, variance in variances.items():
            part = GradientVariance(*(values[inside] for values in variance))
            print(
                f"| {low:g} to {high:g} | {int(inside.sum())} | {name} | {part.ratio:.3f} | {part.reached:.1%} | "
                f"{part.raised:.1%} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=96, help="most tokens in a completion")
    parser.add_argument("--no-times", action="store_true", help="only the variances")
    options = parser.parse_args()
    torch.manual_seed(0)
    loaded = load(ModelConfig(name="smollm2"))
    model = loaded.model
    sampled = rollouts(model, loaded.tokenizer, options.rollouts, options.tokens)
    ids = torch.cat([completion for completion, _, _ in sampled])
    with torch.no_grad():
        student = torch.cat([rows(model, whole, completion) for completion, whole, _ in sampled])
        teacher = torch.cat([rows(model, whole, completion) for completion, _, whole in sampled])
        head = model.head()
        sides = (student, head, teacher, head)
        entropy = torch.cat(
            [torch.distributions.Categorical(logits=model.logits(part)).entropy() for part in student.split(64)]
        )
    variances = {name: chunked_gradient_variance(*sides, **options) for name, options in BASELINES.items()}
    print(f"{len(ids)} states, mean entropy {entropy.mean():.2f} nats\n")
    print_variances(variances, entropy)

    if options.no_times:
        return

    def step() -> None:
        """Do everything of a training step but the rollouts: teacher, student, exact loss, backward."""
        for completion, whole, teachers in sampled:
            with torch.no_grad():
                theirs = rows(model, teachers, completion)
            ours = rows(model, whole, completion)
            weights = torch.ones(len(completion))
            chunked_divergence(
                ours, model.head(), theirs, model.head(), Divergence("reverse_kl"), weights=weights
            ).backward()
        model.zero_grad()

    whole = seconds(step, repeats=1)
    leaf, weight = student.clone().requires_grad_(), head.weight.detach().clone().requires_grad_()
    weights = torch.full((len(ids),), 1 / len(ids))

    def sampled(**baseline: Any) -> Callable[[], None]:
        """Compute the sampled-token loss and its gradients: advantage, log-prob, backward."""

        def run() -> None:
            if baseline:
                advantage = chunked_advantages(student, head, teacher, head, ids, **baseline).values
            else:
                with torch.no_grad():
                    ours, theirs = (chunked_logprobs(side, head, ids) for side in (student, teacher))
                advantage = theirs - ours
            chunked_logprobs(leaf, weight, ids, weights=-advantage * weights).backward()

        return run

    def exact() -> None:
        chunked_divergence(leaf, weight, teacher, head, Divergence("reverse_kl"), weights=weights).backward()

    plain = seconds(sampled())
    print(f"\nA step (teacher, student, exact reverse KL, backward) takes {whole:.1f} CPU s. Of it, the loss:\n")
    print("| loss | CPU s | more than without a baseline, share of a step | gradient variance / none |")
    print("| --- | ---: | ---: | ---: |")
    print(f"| sampled token, no baseline | {plain:.2f} | | 1 |")
    for name, baseline in BASELINES.items():
        taken = seconds(sampled(**baseline))
        print(f"| sampled token, {name} | {taken:.2f} | {(taken - plain) / whole:.1%} | {variances[name].ratio:.3f} |")
    taken = seconds(exact)
    print(f"| exact, full vocabulary | {taken:.2f} | {(taken - plain) / whole:.1%} | 0 |")


if __name__ == "__main__":
    main()
