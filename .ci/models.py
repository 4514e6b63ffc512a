"""`make models`: writes the tables of docs/models.md, of chat templates and of architectures.

    python .ci/models.py              # writes both
    python .ci/models.py --families   # writes the first alone, in seconds
    python .ci/models.py --check      # exit code 1 if the first on the page is another, or the second has other rows

The first checks every family of chat templates in tests/families.py; templates that an absent package carries are told
as absent. The second is made by `.ci/architectures.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import architectures  # noqa: E402

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


def _with_table(page: str, begin: str, end: str, rows: str) -> str:
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{rows}\n{end}{rest.partition(end)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is another")
    parser.add_argument("--families", action="store_true", help="leave the table of architectures as it is")
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    made = _with_table(page, BEGIN, END, table())
    if arguments.check:
        problem = "another table of families" if made != page else architectures.rows_error(page)
        if problem:
            print(f"{PAGE.relative_to(ROOT)}: {problem}", file=sys.stderr)
        return int(problem is not None)
    if not arguments.families:
        made = _with_table(made, architectures.BEGIN, architectures.END, architectures.table())
    PAGE.write_text(made, encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(FAMILIES)} families, {len(architectures.ARCHITECTURES)} architectures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
