"""docs/laws.md: its tables are what the command prints, and the tests that it names exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "laws.md").read_text(encoding="utf-8")


def test_the_tests_that_the_page_names_exist() -> None:
    named = set(re.findall(r"::(test_\w+)", PAGE))
    known = {
        name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"(?m)^def (test_\w+)", path.read_text())
    }
    assert len(named) > 15
    assert named <= known, named - known
    assert all((ROOT / "tests" / name).exists() for name in re.findall(r"`(test_\w+\.py)", PAGE))


@pytest.mark.slow
@pytest.mark.parametrize("table", ["laws", "rounds", "temperatures"])
def test_the_numbers_of_the_page_are_those_of_the_command(table: str) -> None:
    """To one in the last digit: another machine may round differently."""
    heads, *rows = runpy.run_path(str(ROOT / "benchmarks" / "laws.py"))[table]()
    lines = [line.strip("| ").split(" | ") for line in PAGE.splitlines()]
    start = lines.index(heads)
    for row, line in zip(rows, lines[start + 2 :], strict=False):
        assert re.sub(r"\d+\.\d+", "0", " ".join(row)) == re.sub(r"\d+\.\d+", "0", " ".join(line))
        for ours, theirs in zip(re.findall(r"\d+\.\d+", " ".join(row)), re.findall(r"\d+\.\d+", " ".join(line)), strict=True):
            assert float(ours) == pytest.approx(float(theirs), abs=1.01 * 10.0 ** -len(theirs.partition(".")[2]))
