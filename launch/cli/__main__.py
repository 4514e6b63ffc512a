"""`python -m opd.launch.cli`: the `opd` command where its script is not on the path."""

import sys

from opd.launch.cli.main import main

sys.exit(main())
