"""docs/utilities.md: the tests that it names exist, and so do the utilities."""

from __future__ import annotations

import re
from pathlib import Path

from tiltflow.plugins import names

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "utilities.md").read_text(encoding="utf-8")


def test_the_tests_that_the_page_names_exist() -> None:
    files = set(re.findall(r"`(test_\w+\.py)", PAGE))
    named = set(re.findall(r"::(test_\w+)", PAGE))
    known = {name for file in files for name in re.findall(r"(?m)^def (test_\w+)", (TESTS / file).read_text(encoding="utf-8"))}
    assert len(named) > 15
    assert named <= known, named - known


def test_the_page_has_every_utility() -> None:
    assert set(re.findall(r"(?m)^\| `([\w-]+)` \|", PAGE)) == set(names("utilities"))
