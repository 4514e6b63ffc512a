#!/usr/bin/env bash
# Does what was built from the sources work where there are no sources? Usage: .ci/check_wheel.sh SITE
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
site=$(cd "$1" && pwd)
elsewhere=$(mktemp -d)
trap 'rm -rf "$elsewhere"' EXIT
cd "$elsewhere"
export PYTHONPATH=$site
python=$root/.venv/bin/python

"$python" - "$site" <<'EOF'
import sys
from pathlib import Path

import opd
import opd.envs
import opd.launch.train

site = Path(sys.argv[1])
for module in (opd, opd.envs, opd.launch.train):
    assert Path(module.__file__).is_relative_to(site), f"{module.__name__} comes from {module.__file__}"
top = {path.name for path in site.iterdir() if path.suffix != ".dist-info" and path.name not in ("bin", "__pycache__")}
assert top == {"opd"}, f"the wheel puts more than opd into site-packages: {sorted(top)}"
assert (site / "opd" / "py.typed").is_file(), "py.typed is not in the wheel, so type checkers ignore opd"
assert list(site.glob("opd-*.dist-info/licenses/LICENSE")), "the licence is not in the wheel"
EOF
"$python" -m opd.launch.cli --version
"$python" -m opd.launch.cli methods
"$python" -m opd.launch.cli envs list
echo "the wheel works from $elsewhere"
