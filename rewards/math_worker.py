"""The child of `opd.rewards.mathematics`: a line of JSON in, {"right", "given", "seconds"}; a number or null out."""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

_MEMORY = 4 << 30  # bytes of address space, far more than sympy needs


def main() -> None:
    from math_verify import parse, verify

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed from here on is not an answer
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def equal(right: str, given: str, seconds: int) -> float | None:
        gold = parse(right, parsing_timeout=seconds) or parse(rf"\boxed{{{right}}}", parsing_timeout=seconds)
        if not gold:
            return None
        return float(verify(gold, parse(given, parsing_timeout=seconds), timeout_seconds=seconds))

    def say(answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    say("ready")
    for line in sys.stdin:
        request = json.loads(line)
        # The system itself ends this process then: no signal handler runs while Python multiplies huge integers.
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(used + request["seconds"]) + 1, hard))
        say(equal(request["right"], request["given"], max(1, int(request["seconds"] / 2))))


if __name__ == "__main__":
    main()
