"""The figures of the README are those of the results, and the comparison would notice others."""

import re

import pytest

from benchmarks import claims, readme

TEXT = readme.README.read_text()


def test_readme_shows_the_results():
    compared, problems = readme.check(TEXT)
    assert problems == []
    assert compared > 250


@pytest.mark.parametrize(
    "table", [table for table in claims.TABLES], ids=lambda table: table.header[:30]
)
def test_another_figure_in_a_table_is_noticed(table):
    before = readme.check(TEXT)[1]
    start = TEXT.index(table.header)
    line = TEXT[start:].splitlines()[2]
    cells = line.split("|")
    # The last cell that is no label; doubling and adding one changes any figure.
    column = max(
        i for i, cell in enumerate(cells) if claims.figures(cell) and i - 1 not in table.labels
    )
    cells[column] = re.sub(
        r"\d+(\.\d+)?", lambda found: f"{2 * float(found[0]) + 1:.3f}", cells[column], count=1
    )
    after = readme.check(TEXT.replace(line, "|".join(cells)))[1]
    assert len(after) > len(before)


@pytest.mark.parametrize("sentence", claims.SENTENCES, ids=lambda sentence: sentence.pattern[:30])
def test_another_figure_in_a_sentence_is_noticed(sentence):
    flat = " ".join(TEXT.split())
    found = re.search(sentence.pattern, flat)
    at, end = found.span(1)
    digits = len(found[1].partition(".")[2])
    other = flat[:at] + f"{3 * float(found[1].replace(',', '')) + 1:.{digits}f}" + flat[end:]
    shown = re.search(sentence.pattern, other).groups()
    agree = [readme.agrees(*pair) for pair in zip(shown, sentence.expected(), strict=True)]
    assert agree == [False] + [True] * (len(shown) - 1)


def test_a_table_without_a_rule_is_noticed():
    assert any(
        "no rule" in p for p in readme.check(TEXT + "\n\n| a | b |\n|---|---|\n| x | 1 |\n")[1]
    )


def test_a_lost_sentence_is_noticed():
    assert any(
        "no such sentence" in p for p in readme.check(TEXT.replace("compiles in", "took"))[1]
    )


@pytest.mark.parametrize(
    "shown, value, fine",
    [
        ("7.4", 7.4152, True),
        ("7.4", 7.4612, False),
        ("27", 26.95, True),
        ("27", 26.4, False),
        ("2,800", 2800, True),
        ("1e-2", 0.01, True),
        ("1e-2", 0.03, False),
        ("1.000", 0.9997, True),
        ("1.000", 0.9994, False),
    ],
)
def test_agrees(shown, value, fine):
    assert readme.agrees(shown, value) == fine


def test_figures_of_a_cell():
    assert claims.figures("**4.116** ± 0.011 (3 seeds)") == ["4.116", "0.011"]
    assert claims.figures("234, 237, 1,225") == ["234", "237", "1,225"]
    assert claims.figures("0.35 (0.36)") == ["0.35", "0.36"]
