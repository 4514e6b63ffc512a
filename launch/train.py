"""One run, from settings to a trained export: `opd train FILE`, `opd.train(config)`.

python -m opd.launch.train FILE.yaml [the options of `opd train`]
"""

from __future__ import annotations

import sys

from opd.launch.cli.main import main
from opd.launch.run.runner import RunResult
from opd.launch.run.training import train

__all__ = ["RunResult", "train"]

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
