"""Whether the figures in README.md are those in benchmarks/results.

    python -m benchmarks.readme

A figure agrees when the result, rounded to the digits that the README shows, is what it shows.
The rules are in `benchmarks.claims`.
"""

import re
import sys
from pathlib import Path

from benchmarks.claims import NOT_MEASURED, SENTENCES, TABLES, Table, figures, plain, tables

README = Path(__file__).parent.parent / "README.md"


def main() -> int:
    """Command line program; the exit status is 1 if anything differs."""
    compared, problems = check(README.read_text())
    for problem in problems:
        print(problem)
    print(
        f"{compared} figures of README.md compared with benchmarks/results, {len(problems)} differ"
    )
    return int(bool(problems))


def check(text: str) -> tuple[int, list[str]]:
    """How many figures were compared, and what is wrong, one line each."""
    compared, problems = 0, []
    by_header = {table.header: table for table in TABLES}
    seen = set()
    for header, lines in tables(text):
        rule = next((h for h in by_header if header.startswith(h)), None)
        if rule is None:
            if not header.startswith(NOT_MEASURED):
                problems.append(f"no rule for the table {header}")
            continue
        seen.add(rule)
        for line in lines:
            more, wrong = _check_line(by_header[rule], line)
            compared, problems = compared + more, problems + wrong
    problems += [f"no table begins with {header}" for header in by_header.keys() - seen]
    flat = " ".join(text.split())
    for sentence in SENTENCES:
        found = re.search(sentence.pattern, flat)
        if not found:
            problems.append(f"no such sentence: {sentence.pattern}")
            continue
        for shown, value in zip(found.groups(), sentence.expected(), strict=True):
            compared += 1
            if not agrees(shown, value):
                problems.append(f"{found[0]!r}: {shown} is shown, {value:.5g} is the result")
    return compared, problems


def agrees(shown: str, value: float) -> bool:
    """Whether a value is what is shown when it is rounded to as many digits."""
    mantissa, _, exponent = shown.replace(",", "").partition("e")
    decimals = len(mantissa.partition(".")[2]) - int(exponent or 0)
    # Results are stored with four digits or more: a tie may have gone either way.
    return abs(float(shown.replace(",", "")) - value) <= 0.5001 * 10.0**-decimals


def _check_line(table: Table, line: list[str]) -> tuple[int, list[str]]:
    labels = [plain(line[i]) for i in table.labels]
    try:
        expected = table.expected(labels)
    except KeyError as error:
        return 0, [f"{' | '.join(labels)}: no result for {error}"]
    compared, problems = 0, []
    cells = [cell for i, cell in enumerate(line) if i not in table.labels]
    for cell, values in zip(cells, expected, strict=True):
        shown = figures(cell)
        if len(shown) != len(values):
            problems.append(f"{' | '.join(labels)}: {cell!r} is shown, the result is {values}")
            continue
        for figure, value in zip(shown, values, strict=True):
            compared += 1
            if not agrees(figure, value):
                problems.append(
                    f"{' | '.join(labels)}: {figure} is shown, {value:.5g} is the result"
                )
    return compared, problems


if __name__ == "__main__":
    sys.exit(main())
