"""docs/methods.md: a row for each method and each steering that exist, and what it says of each is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tiltflow.plugins import find, module_of, own_names

DOCS = Path(__file__).parents[1] / "docs"
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (DOCS / "methods.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
]
BY_NAME = {row[0].strip("| `"): row for row in ROWS}


def test_every_method_and_every_steering_has_a_row_and_in_order() -> None:
    names = [row[0].strip("| `") for row in ROWS]
    assert names == [*own_names("methods"), *own_names("steering")]


@pytest.mark.parametrize("name", BY_NAME)
def test_the_paper_is_named_where_the_code_is_and_the_page_speaks_of_it(name: str) -> None:
    package = "methods" if name in own_names("methods") else "steering"
    paper, link = BY_NAME[name][1], BY_NAME[name][6]
    assert paper == "–" or paper in str(module_of(package, name).__doc__)
    found = re.search(r"\]\(([\w-]+\.md)(?:#([\w-]+))?\)", link)
    assert found is not None
    page = (DOCS / found[1]).read_text(encoding="utf-8")
    assert name in page or name.replace("-", " ").title() in page or name.upper() in page
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).strip().lower().replace(" ", "-")
        for line in re.findall(r"^#+ .*", page, re.M)
    }
    assert found[2] is None or found[2] in headings, headings


@pytest.mark.parametrize("name", own_names("methods"))
def test_what_a_row_says_of_a_method_is_what_the_method_says(name: str) -> None:
    method, row = find("methods", name)(), BY_NAME[name]
    assert row[2] == ("yes" if method.needs.reward_gradient else "no")
    assert row[4] == method.target(1).reaches
    assert row[3] in ("any", "SDE" if method.sampling.has_noise else "ODE")


@pytest.mark.parametrize("name", own_names("steering"))
def test_what_a_row_says_of_a_steering(name: str) -> None:
    assert (BY_NAME[name][4] == "exact") is (find("steering", name)().law(4).temperature is not None)
