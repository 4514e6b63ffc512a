"""`make models`: checks every family of chat templates in tests/families.py and writes the table of docs/models.md.

    python .ci/models.py            # writes the table
    python .ci/models.py --check    # exit code 1 if the table on the page is another

Templates that an absent package carries are told as absent.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from opd.errors import ModelError  # noqa: E402
from opd.models.chat import ChatFormat  # noqa: E402
from opd.models.check import Report, check_text  # noqa: E402
from tests.families import FAMILIES, Family, make_tokenizer, template  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- make models: begin -->", "<!-- make models: end -->"
COLUMNS = ("family", "template", "format", "renders", "calls read back", "ends: answer / call", "round trip", "forks")
COLUMNS += ("markup stays text", "refused because")


def row(family: Family) -> list[str]:
    """What is found of one family, as the cells of its row."""
    source = "written here" if family.source.endswith(".jinja") else family.source.partition(":")[0]
    if template(family) is None:
        return [family.name, source, *["absent"] * (len(COLUMNS) - 3), f"{family.source} is not installed"]
    tokenizer = make_tokenizer(family)
    ends = tokenizer.convert_tokens_to_ids(list(family.ends))
    made: list[ChatFormat] = []

    def make() -> ChatFormat:
        made.append(ChatFormat(tokenizer, stop_ids=ends))
        return made[0]

    try:
        report = check_text(tokenizer, make, own_ends=ends)
    except ModelError as error:
        report = Report(problems=[str(error)])
    form, both = "", ""
    if made:
        form = made[0].format.name
        tokens = tokenizer.convert_ids_to_tokens([made[0].ends.answer, made[0].ends.call])
        both = " / ".join(f"`{token}`" for token in dict.fromkeys(tokens))
    told = [_yes(report, fact) for fact in ("renders", "reads_calls")]
    facts = [_yes(report, "round_trip"), _forks(report), _yes(report, "keeps_markup_text")]
    problems = "; ".join(report.problems)
    return [family.name, source, form, *told, both.replace("|", "\\|"), *facts, problems.replace("|", "\\|")]


def _yes(report: Report, fact: str) -> str:
    return {True: "yes", False: "no", None: ""}[report.facts.get(fact)]


def _forks(report: Report) -> str:
    """Whether a conversation goes on in one sequence."""
    rewrites = dict(report.rows).get("rewrites", "")
    if report.facts.get("forks"):
        return "at later turns"
    return "no; old thoughts stay" if "thoughts" in rewrites else "no"


def table() -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(row(family) for family in FAMILIES.values())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is another")
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    made = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if arguments.check:
        return int(made != page)
    PAGE.write_text(made, encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(FAMILIES)} families")
    return 0


if __name__ == "__main__":
    sys.exit(main())
